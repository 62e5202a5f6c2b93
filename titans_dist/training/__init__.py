"""What a training step, a run and a resume are."""

from titans_dist.training.loop import train

__all__ = ["train"]
