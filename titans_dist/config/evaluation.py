"""What is measured of a checkpoint, and by how many workers."""

from __future__ import annotations

from dataclasses import dataclass, field

HELD_OUT = ("loss", "positions")
"""What is measured on the held-out text: its loss, and its loss by position and by length of the context."""
HARNESS = "lm/"
"""Before the name of a task of lm-evaluation-harness: lm/piqa. Such a task has no length of the context."""


@dataclass
class FollowConfig:
    """What `evaluate --follow` measures of the checkpoints of a run that is being trained."""

    every: dict[str, int] = field(default_factory=dict)
    """Task -> measure it at every so many checkpoints, >= 1. Those that are not named: at each. The last: all."""
    budget: float = 0.2
    """Share of the follower's time that may go into measuring while the run is trained, 0 < x <= 1."""
    nice: int = 10
    """How far the follower and the Ray that it starts stand back where training wants the same CPU cores, 0 to 19."""
    poll_s: float = 10.0
    """Seconds between two looks for a new checkpoint, > 0."""
    patience_s: float = 3600.0
    """Seconds without a new checkpoint after which it ends, > 0; it ends as well when the run is done."""


@dataclass
class EvaluationConfig:
    """What is measured of a checkpoint, and how it is shared out."""

    tasks: list[str] = field(default_factory=list)
    """What to measure. Empty: the loss on the held-out text by the processes of the layout, without Ray."""
    lengths: list[int] = field(default_factory=list)
    """Lengths of the context in tokens, >= 2."""
    samples: int = 100
    """Questions for each task and length, >= 1; of a task lm/NAME its first documents, at most so many."""
    seed: int = 42
    """Seed of the questions."""
    text: str | None = None
    """File or folder of background text. Unset: the documentation of Python's standard library."""
    babi: str | None = None
    """Folder en-10k of bAbI with qa1_..._train.txt, qa1_..._test.txt and so on, for the tasks babilong_qa1 to _qa5."""
    task_folder: str | None = None
    """Folder of task files of lm-evaluation-harness for tasks lm/NAME. Unset: those it comes with, from the hub."""
    workers: int = 2
    """Ray workers with one copy of the model each, >= 1."""
    tensor: int = 1
    """Processes that share one copy, >= 1; the checkpoint may be of any layout."""
    gpus: float = 0.0
    """GPUs of each process, >= 0; a share of one lets several workers have it. 0: on CPUs."""
    cpus: float = 1.0
    """CPU cores that Ray counts for each process, > 0."""
    address: str | None = None
    """Ray cluster to join. Unset: that of RAY_ADDRESS, else a new one on this machine."""
    shard: int = 8
    """Questions that a worker gets at a time, >= 1: what is lost when it dies."""
    retries: int = 3
    """How often a piece of work is tried again after its worker has died, >= 0."""
    control: list[str] = field(default_factory=list)
    """Names of other runs, such as one with sliding-window attention alone, to stand beside this one in the report."""
    step: int | None = None
    """Checkpoint to measure. Unset: the newest."""
    max_sequences: int | None = None
    """Held-out sequences to read, spread over the text, or with training.carry_state its first. Unset: all, once."""
    micro_batch_size: int = 16
    """Sequences per forward pass of one model copy, >= 1."""
    follow: FollowConfig = field(default_factory=FollowConfig)
    """Group evaluation/, of `evaluate --follow`."""
