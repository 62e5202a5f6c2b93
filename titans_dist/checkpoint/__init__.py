"""Checkpoints: the commit protocol on a folder (``store``) and what the ranks write into it (``sharded``)."""
