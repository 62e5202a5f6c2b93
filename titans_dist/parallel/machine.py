"""What one process finds out about its machine before it meets the others: disks, arithmetic, GPU, versions.

Nothing here waits for another process, and what fails is a finding, not an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from titans_dist.parallel.peers import own_versions

FILE_BYTES = 8 << 20
"""Written to each place and read again: more than a block, less than a second on any disk that is fit for training."""
FREE_BYTES = {"run folder": 1 << 30, "/dev/shm": 256 << 20}
"""Least room: of a run folder, for logs and one small checkpoint; of shared memory more than the 64 MB that containers
get by default, in which data workers and NCCL die."""
FREE_MEMORY = 0.9
"""Share of a GPU's memory that must be free: a job of somebody else is on it, or a process that did not die."""
SIZES = {"cpu": 512, "cuda": 8192}
"""Rows of the matrices: a few milliseconds each on an H100, some tens of them on a CPU core."""
TRIES = 8
"""The best time counts, so that what else the machine does at the moment does not; the bits of all must be equal."""
SEED = 20260101
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass
class Product:
    """A matrix product of the same two matrices on all processes."""

    seconds: float
    digest: str
    """Of the bits of the result."""


@dataclasses.dataclass
class Findings:
    """What one process knows of itself."""

    rank: int
    host: str
    job: str = ""
    """Name of the job, where it has one: files of an earlier preflight are not this one's."""
    stage: str = "its start"
    """What it does, or did last."""
    ended: bool = False
    """Whether it has said that it gives up; one that hangs or is gone has not."""
    device: str = ""
    """Kind of device and processor: of equal ones equal bits are expected."""
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    free_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    write_s: dict[str, float] = dataclasses.field(default_factory=dict)
    products: dict[str, Product] = dataclasses.field(default_factory=dict)
    problems: list[str] = dataclasses.field(default_factory=list)
    """What is wrong for sure, whatever the others find."""
    clock_s: float = 0.0
    """How far its clock is ahead of rank 0's."""
    link_bytes_per_s: float | None = None
    """From the rank before it, round a ring of all."""
    wrong_link: bool = False
    """Whether what came from there is not what was sent."""
    wrong_sum: bool = False
    """Whether the sum over all processes is wrong."""

    @classmethod
    def read(cls, facts: dict[str, Any]) -> Findings:
        """From what `dataclasses.asdict` made of them."""
        products = {name: Product(**product) for name, product in facts["products"].items()}
        return cls(**{**facts, "products": products})


def host() -> str:
    """This machine as its scheduler calls it: an exclude list is for that one."""
    return os.environ.get("SLURMD_NODENAME") or os.environ.get("NODE_NAME") or socket.gethostname()


def examine(findings: Findings, run_dir: Path, device: torch.device, mark: Callable[[str], None]) -> None:
    """Fill in what this process can find out alone; `mark` is told what comes next."""
    findings.versions = own_versions()
    for name, folder in (("run folder", run_dir), ("/dev/shm", Path("/dev/shm"))):
        mark(f"a file in the {name}" if name != "/dev/shm" else "a file in /dev/shm")
        if name == "run folder" or folder.is_dir():  # shared memory has no such folder on every system
            _attempt(findings, name, lambda name=name, folder=folder: _file(findings, name, folder))  # type: ignore[misc]
    mark("its device")
    _attempt(findings, "device", lambda: _device(findings, device))
    for name in DTYPES:
        mark(f"a product of {name} matrices")
        _attempt(findings, f"{name} product", lambda name=name: _product(findings, name, device))  # type: ignore[misc]


def _attempt(findings: Findings, what: str, check: Callable[[], None]) -> None:
    try:
        check()
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        findings.problems.append(f"{what}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")


def _file(findings: Findings, name: str, folder: Path) -> None:
    """Room, and a file that is written to the disk and read again."""
    free = findings.free_bytes[name] = shutil.disk_usage(folder).free
    if free < FREE_BYTES[name]:
        findings.problems.append(f"{name}: {free / 2**20:.0f} MiB free, less than {FREE_BYTES[name] / 2**20:.0f}")
    path, data = folder / f".titans-dist-doctor-{findings.host}-{os.getpid()}", os.urandom(FILE_BYTES)
    began = time.monotonic()
    try:
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        findings.write_s[name] = time.monotonic() - began
        if path.read_bytes() != data:
            findings.problems.append(f"{name}: a file does not hold what was written to it")
    finally:
        path.unlink(missing_ok=True)


def _device(findings: Findings, device: torch.device) -> None:
    if device.type == "cpu":
        findings.device = f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return
    about = torch.cuda.get_device_properties(device)
    findings.device = about.name
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    findings.versions |= {"GPU": about.name, "CUDA": str(torch.version.cuda), "NCCL": nccl}
    free, total = torch.cuda.mem_get_info(device)
    findings.free_bytes["GPU"] = free
    if free < FREE_MEMORY * total:
        findings.problems.append(
            f"GPU {device.index}: {free / 2**30:.0f} of {total / 2**30:.0f} GiB free; it is in use"
        )
    if shutil.which("nvidia-smi"):
        query = (
            "--query-gpu=driver_version,ecc.errors.uncorrected.volatile.total,ecc.errors.uncorrected.aggregate.total"
        )
        command = ["nvidia-smi", query, "--format=csv,noheader", f"--id=GPU-{about.uuid}"]
        said = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        driver, *errors = [word.strip() for word in said.stdout.split(",")]
        if said.returncode == 0 and len(errors) == 2:
            findings.versions["driver"] = driver
            if errors[0].isdigit() and int(errors[0]):
                findings.problems.append(f"GPU {device.index}: {errors[0]} uncorrected ECC errors since its last reset")


def _product(findings: Findings, name: str, device: torch.device) -> None:
    """The time and the bits of a matrix product; one process must always get the same."""
    size, generator = SIZES[device.type], torch.Generator().manual_seed(SEED)
    one, other = (torch.randn(size, size, generator=generator).to(device, DTYPES[name]) for _ in range(2))
    best, digests = float("inf"), []
    for number in range(TRIES):
        _wait(device)
        began = time.perf_counter()
        result = one @ other
        _wait(device)
        best = min(best, time.perf_counter() - began)
        if number in (0, TRIES - 1):
            digests.append(hashlib.sha256(result.cpu().view(torch.uint8).numpy().tobytes()).hexdigest()[:16])
    findings.products[name] = Product(best, digests[0])
    if len(set(digests)) > 1:
        findings.problems.append(f"the same {name} product came out differently the second time")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
