"""Pretraining of Titans and MIRAS language models at scale."""

__version__ = "0.1.0"
