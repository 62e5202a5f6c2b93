"""`titans-dist checkpoint prune`: remove the checkpoints that the retention of the configuration does not keep."""

from __future__ import annotations

from titans_dist.checkpoint.lease import Lease
from titans_dist.checkpoint.store import Store
from titans_dist.config import Config
from titans_launch import tables
from titans_launch.checkpoint import opened


def run(config: Config, dry_run: bool = False) -> None:
    """Remove them, or with `dry_run` only say which."""
    store, keep = opened.store(config), config.checkpoint.keep
    steps = store.committed()
    manifests = {step: store.manifest(step) for step in steps}
    if dry_run:
        doomed = store.plan(keep)
    else:
        # A run that is being trained prunes by itself: two must not do it at once.
        lease = Lease.acquire(store.root)
        try:
            doomed = Store(store.root, lease).prune(keep)
        finally:
            lease.release()
    rows = [
        (f"step {step:,}", fate(step, doomed, manifests[step]["permanent"], steps[-keep:], dry_run)) for step in steps
    ]
    tables.show(f"{tables.place(store.root)}, checkpoint.keep={keep}", rows)
    freed = sum(entry["size"] for step in doomed for entry in manifests[step]["files"].values())
    verb = "would be" if dry_run else "are"
    print(f"{opened.size(freed)} in {len(doomed):,} of {len(steps):,} checkpoints {verb} removed")


def fate(step: int, doomed: list[int], is_permanent: bool, newest: list[int], dry_run: bool) -> str:
    """What becomes of a checkpoint, and why."""
    if step in doomed:
        return "would be removed" if dry_run else "removed"
    if step in newest:
        return "stays, one of the newest"
    return "stays, permanent" if is_permanent else "stays, the newest that is whole"
