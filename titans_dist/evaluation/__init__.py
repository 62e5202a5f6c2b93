"""Evaluation of checkpoints."""

from titans_dist.evaluation.heldout import evaluate

__all__ = ["evaluate"]
