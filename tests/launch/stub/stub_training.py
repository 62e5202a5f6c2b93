"""A training loop without a model: steps, checkpoints, resume, signals; STUB_* variables make it misbehave.

STUB_FAIL=WHAT:RANK (or WHAT for all ranks) fails in each of the first STUB_ATTEMPTS attempts (all of them), after step
STUB_STEP (the first; 0: before it; with commas: of one attempt after the other). WHAT is the name of a signal, `bug`,
or an error of titans_dist.config.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

TIMEOUT_S = 3.0
START_S = 20.0


def train(config):
    from titans_dist import config as errors
    from titans_dist.tracking import StepRow, Tracker

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    print(f"rank {rank} of {world}, {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    os.write(2, f"rank {rank} from below Python\n".encode())
    if "STUB_SAY" in os.environ:
        print(os.environ["STUB_SAY"], flush=True)
    fail_if_due(0)
    time.sleep(float(os.environ.get("STUB_START_S", "0")))

    stopped = []
    deaf = "STUB_DEAF" in os.environ
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: stopped.append(True))
    run_dir = Path(config.run_dir)
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    saved = sorted(int(path.name) for path in folder.iterdir())
    start = saved[-1] if saved else 0
    tracker = Tracker(run_dir, config, resumed_step=start or None) if rank == 0 else None
    together = Together(run_dir, rank, [] if "STUB_ALONE" in os.environ else range(world))
    for step in range(start + 1, config.training.steps + 1):
        time.sleep(0.02)
        stops = together.any(bool(stopped))
        if tracker:
            tracker.step(StepRow(step, 8.0 / (step + 1), 1.0, 1e-3, step * 100, 1000.0, 0.02, 0.0, 1 << 30))
            if step % config.checkpoint.interval == 0 or step == config.training.steps or stops:
                (folder / str(step)).touch()
                tracker.event("checkpoint", step=step)
        if stops:
            time.sleep(float(os.environ.get("STUB_SAVE_S", "0")) * rank)
            raise errors.Interrupted(f"stopped and saved at step {step}")
        fail_if_due(step)
    if tracker:
        tracker.close()


class Together:
    """What collectives are to the real loop: all ranks are at the same step, and fail where one is gone."""

    def __init__(self, run_dir, rank, ranks):
        # Of this attempt of this job: torchrun's address is its own.
        name = f"{os.environ.get('MASTER_PORT')}-{os.environ.get('TORCHELASTIC_RESTART_COUNT')}"
        self.folder = run_dir / "together" / name
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rank, self.others, self.calls = rank, [other for other in ranks if other != rank], 0

    def any(self, value):
        """Whether it is true on any rank."""
        from titans_dist.config import UserError

        with (self.folder / str(self.rank)).open("ab") as file:
            file.write(b"y" if value else b"n")
        self.calls += 1
        timeout_s = START_S if self.calls == 1 else TIMEOUT_S
        for other in self.others:
            path = self.folder / str(other)
            if not wait_until(lambda path=path: path.exists() and path.stat().st_size >= self.calls, timeout_s):
                raise UserError(f"rank {other} is gone or stopped; rank {self.rank} was in a collective")
            value = value or path.read_bytes()[self.calls - 1 : self.calls] == b"y"
        return value


def fail_if_due(step):
    """Misbehave, if this is the rank, the step and the attempt."""
    from titans_dist import config as errors

    rank, restart = int(os.environ["RANK"]), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    what, _, only = os.environ.get("STUB_FAIL", "").partition(":")
    if not what or (only and int(only) != rank):
        return
    steps = os.environ.get("STUB_STEP", "1").split(",")
    if step != int(steps[restart % len(steps)]) or restart >= int(os.environ.get("STUB_ATTEMPTS", "1000")):
        return
    if what.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, what))
    if what == "bug":
        raise ZeroDivisionError("a bug in the program")
    if not only and rank > 0:  # all fail: rank 0 comes first, or the launcher rightly tells another's
        first = Path(os.environ.get("TITANS_DIST_REPORTS", "nowhere"), f"{restart}-0.json")
        wait_until(first.exists, 20 if first.parent.exists() else 0)
        time.sleep(float(os.environ.get("STUB_LATER_S", "0")))
    raise getattr(errors, what)(f"a sentence\n  from rank {rank}")


def wait_until(condition, timeout_s):
    """Whether it came true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.01)
    return True
