"""Checkpoints in the form that Hugging Face `transformers` loads, and back."""

from titans_dist.export.folder import Exported, export
from titans_dist.export.reading import read_export

__all__ = ["Exported", "export", "read_export"]
