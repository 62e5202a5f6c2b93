"""The models."""

from titans_dist.model.describe import describe, planned
from titans_dist.model.language_model import LanguageModel, build_model

__all__ = ["LanguageModel", "build_model", "describe", "planned"]
