"""Checkpoints: the commit protocol on a folder (``store``), who may write there (``lease``), what the ranks write and
read (``sharded``), and how that goes on beside training (``saver``)."""
