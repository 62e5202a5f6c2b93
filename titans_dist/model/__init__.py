"""The models."""

from titans_dist.model.describe import describe, planned
from titans_dist.model.generate import generate
from titans_dist.model.language_model import LanguageModel, build_model
from titans_dist.model.state import ModelState, flatten, load_state, save_state, unflatten

__all__ = [
    "LanguageModel",
    "ModelState",
    "build_model",
    "describe",
    "flatten",
    "generate",
    "load_state",
    "planned",
    "save_state",
    "unflatten",
]
