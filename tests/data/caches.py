"""What tests of the cache share."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from titans_data.remote import Retries

URL = "s3://bucket/corpus"
QUICK = Retries(attempts=4, first_wait_s=0.01, timeout_s=5.0)


def objects(cache: Path) -> list[Path]:
    return sorted((cache / "objects").iterdir())


def assert_whole(cache: Path) -> None:
    """Every object is the content it is named by, and nothing else of any size is left."""
    for path in objects(cache):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
    assert not list((cache / "incoming").iterdir())


def next_line(job: subprocess.Popen[str]) -> str:
    """The next line that is not a warning of a small cache or a download that failed."""
    assert job.stdout is not None
    lines = iter(job.stdout.readline, "")
    return next((line.strip() for line in lines if "working set" not in line and "failed" not in line), "")


def assert_says(job: subprocess.Popen[str], *lines: str) -> None:
    for line in lines:
        said = next_line(job)
        assert said == line, said + (job.stdout.read() if job.stdout and "Traceback" in said else "")
