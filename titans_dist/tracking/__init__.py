"""Where the numbers of a run go: metrics.jsonl (the truth), the console and, when asked for, Weights & Biases."""

from titans_dist.tracking.console import human
from titans_dist.tracking.metrics import StepRow, losses, read_metrics
from titans_dist.tracking.tracker import Tracker

__all__ = ["StepRow", "Tracker", "human", "losses", "read_metrics"]
