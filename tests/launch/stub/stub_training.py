"""A training loop without a model: steps, checkpoints, resume, signals; STUB_* variables make it misbehave."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path


def train(config):
    from titans_dist import config as errors
    from titans_dist.tracking import StepRow, Tracker

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    print(f"rank {rank} of {world}, {os.environ['OMP_NUM_THREADS']} threads", flush=True)
    os.write(2, f"rank {rank} from below Python\n".encode())
    failing = os.environ.get("STUB_FAIL", "").split(":")  # WHAT:RANK, or WHAT for all ranks
    if failing[0] and (len(failing) == 1 or int(failing[1]) == rank):
        if failing[0] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if failing[0] == "bug":
            raise ZeroDivisionError("a bug in the program")
        if len(failing) == 1 and rank > 0:  # all fail: rank 0 comes first, or the launcher rightly tells another's
            first, deadline = Path(os.environ["TITANS_DIST_REPORTS"], "0.json"), time.monotonic() + 20
            while not first.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
        raise getattr(errors, failing[0])(f"a sentence\n  from rank {rank}")

    stopped = []
    deaf = "STUB_DEAF" in os.environ
    signal.signal(signal.SIGTERM, signal.SIG_IGN if deaf else lambda *_: stopped.append(True))
    run_dir = Path(config.run_dir)
    folder = run_dir / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    saved = sorted(int(path.name) for path in folder.iterdir())
    start = saved[-1] if saved else 0
    tracker = Tracker(run_dir, config, resumed_step=start or None) if rank == 0 else None
    for step in range(start + 1, config.training.steps + 1):
        time.sleep(0.02)
        if tracker:
            tracker.step(StepRow(step, 8.0 / (step + 1), 1.0, 1e-3, step * 100, 1000.0, 0.02, 0.0, 1 << 30))
            if step % config.training.checkpoint_interval == 0 or step == config.training.steps or stopped:
                (folder / str(step)).touch()
                tracker.event("checkpoint", step=step)
        if stopped:
            raise errors.Interrupted(f"stopped and saved at step {step}")
    if tracker:
        tracker.close()
