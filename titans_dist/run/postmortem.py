"""The postmortem folder of a run: what there is to know about an abnormal end, gathered in one place.

    runs/<name>/postmortem/2026-07-29_14-03-11/
        README.txt report.json     what happened, to whom, who is suspected
        ranks/ logs/               how each process ended; the last lines of its log, its stacks, its flight recorder
        config.yaml metrics.jsonl  the configuration, and the last rows
        environment.json           versions, the machine, and what launchers and libraries were told

Several processes may write to one folder, each its own part. No secret goes in: of the environment only what is on a
list, and in every text the values of variables that look like secrets are blotted out.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

KEPT = 5
"""The newest postmortems that a run keeps."""
LINES = 200
"""Of each log, and rows of metrics.jsonl."""
MAX_BYTES = 1 << 20
"""Of each log; a line may be very long."""
MAX_FILE_BYTES = 32 << 20
"""Of stacks and flight recorders; what is larger stays where it is."""

_ALLOWED = re.compile(
    r"(SLURM|TORCHELASTIC|TORCH_ELASTIC|TORCH_FR|TORCH_NCCL|NCCL|GLOO|OMP|PYTORCH)_\w+"
    r"|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|CUDA_VISIBLE_DEVICES"
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|JWT|AUTH", re.IGNORECASE)
_SHORTEST_SECRET = 6
"""What is shorter would be blotted out of innocent words."""


def open_bundle(run_dir: Path, claim: str | None = None) -> tuple[Path, bool]:
    """The folder for one postmortem, and whether it was made just now; of the others only the newest are kept.

    All that give the same `claim` (one start of one job) get the same folder, without a word between them.
    """
    parent = run_dir / "postmortem"
    parent.mkdir(parents=True, exist_ok=True)
    name = time.strftime("%Y-%m-%d_%H-%M-%S")
    if claim is None:
        folder = _new_folder(parent, name)
    else:
        note = parent / f".{re.sub(r'[^A-Za-z0-9-]', '_', claim)}"
        try:
            note.symlink_to(name)  # in one act: whoever is second finds the whole name
        except FileExistsError:
            folder = parent / note.readlink()
            if folder.parent != parent:
                raise ValueError(f"{note} does not name a postmortem") from None
            folder.mkdir(exist_ok=True)
            return folder, False
        folder = parent / name
        folder.mkdir(exist_ok=True)
    _forget_old(parent, folder)
    return folder, True


def add_rank(bundle: Path, run_dir: Path, command: str, rank: int, since: float) -> None:
    """Add the end of one rank's log and, where they are younger than `since`, its stacks and flight recorder."""
    logs = run_dir / "logs"
    _copy_end(logs / f"{command}-rank{rank}.log", bundle / "logs")
    for path in (logs / f"stacks-rank{rank}.txt", logs / f"flight-rank{rank}.json"):
        if path.exists() and path.stat().st_mtime >= since and path.stat().st_size <= MAX_FILE_BYTES:
            _write(bundle / "logs" / path.name, path.read_text(errors="replace"))


def add_report(bundle: Path, rank: int, report: Mapping[str, Any]) -> None:
    """Add how one rank ended."""
    _write(bundle / "ranks" / f"rank{rank}.json", json.dumps(report, indent=1) + "\n")


def reports(bundle: Path) -> list[dict[str, Any]]:
    """How the ranks ended that have been added so far, in order of rank."""
    found = [json.loads(path.read_text()) for path in (bundle / "ranks").glob("*.json")]
    return sorted(found, key=lambda report: report["rank"])


def add_common(bundle: Path, run_dir: Path, command: str, versions: Mapping[str, str]) -> None:
    """Add what is the same for all ranks."""
    for path in (run_dir / "logs").glob(f"{command}-torchrun*.log"):
        _copy_end(path, bundle / "logs")
    _copy_end(run_dir / "metrics.jsonl", bundle)
    if (run_dir / "config.yaml").exists():
        _write(bundle / "config.yaml", (run_dir / "config.yaml").read_text())
    _write(bundle / "environment.json", json.dumps(environment(run_dir, versions), indent=1) + "\n")


def add_summary(bundle: Path, text: str, facts: Mapping[str, Any]) -> None:
    """Write README.txt and report.json, in place of earlier ones."""
    _write(bundle / "README.txt", text)
    _write(bundle / "report.json", json.dumps(facts, indent=1) + "\n")


def environment(run_dir: Path, versions: Mapping[str, str]) -> dict[str, Any]:
    """Versions, the machine this process runs on, and the variables that are known to hold no secret."""
    disk = shutil.disk_usage(run_dir)
    memory = Path("/proc/meminfo")
    lines = memory.read_text().splitlines()[:3] if memory.exists() else []
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "memory": dict(re.split(r":\s*", line, maxsplit=1) for line in lines),
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
        "versions": dict(versions),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if _ALLOWED.fullmatch(name) and not _SECRET.search(name)
        },
    }


def tail(path: Path, lines: int = LINES, max_bytes: int = MAX_BYTES) -> str:
    """The last whole lines of a file, read from its end; a single longer line is cut at its beginning."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        start = max(0, size - max_bytes)
        file.seek(start)
        found = file.read(max_bytes).split(b"\n")
    last = [] if found[-1] else [found.pop()]  # a file that ends with its last line ends with a line break
    if start > 0 and len(found) > 1:
        del found[0]
    return b"\n".join(found[-lines:] + last).decode(errors="replace")


def last_step(run_dir: Path) -> int | None:
    """The last step that metrics.jsonl tells of."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return None
    for line in reversed(tail(path).splitlines()):
        try:
            row = json.loads(line)
        except ValueError:  # torn by a kill
            continue
        if isinstance(row, dict) and row.get("kind") == "train":
            return int(row["step"])
    return None


def _new_folder(parent: Path, name: str) -> Path:
    """One that nobody has made before; within one second names get a number."""
    number = 1
    while True:
        folder = parent / (name if number == 1 else f"{name}_{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            number += 1


def _forget_old(parent: Path, newest: Path) -> None:
    bundles = sorted(path for path in parent.iterdir() if path.is_dir() and not path.is_symlink() and path != newest)
    for old in bundles[: len(bundles) - (KEPT - 1)] if len(bundles) >= KEPT else []:
        shutil.rmtree(old, ignore_errors=True)
    for note in (path for path in parent.iterdir() if path.is_symlink() and not path.exists()):
        if note.readlink() != Path(newest.name):
            note.unlink(missing_ok=True)


def _copy_end(path: Path, folder: Path) -> None:
    if path.exists():
        _write(folder / path.name, tail(path))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    new.write_text(without_secrets(text, os.environ.items()))
    new.replace(path)


def without_secrets(text: str, variables: Iterable[tuple[str, str]]) -> str:
    """`text` with the values of those variables blotted out whose names look like secrets, and passwords in addresses.

    >>> without_secrets("logged in as abcdef123", {"WANDB_API_KEY": "abcdef123"}.items())
    'logged in as ***'
    >>> without_secrets("via http://me:pass@proxy:80/", [])
    'via http://***@proxy:80/'
    """
    for name, value in variables:
        if _SECRET.search(name) and len(value) >= _SHORTEST_SECRET and not Path(value).exists():
            text = text.replace(value, "***")
    return re.sub(r"(\w+://)[^\s/@:]+:[^\s/@]+@", r"\1***@", text)
