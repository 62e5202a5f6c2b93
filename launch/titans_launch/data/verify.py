"""`titans-dist data verify`: every file of the datasets against the sha256 on its card."""

from __future__ import annotations

import sys
import time

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from titans_dist.config import Config, ConfigError
from titans_dist.run.data import dataset_paths
from titans_launch import tables
from titans_launch.data import opened

INTERVAL_S = 10.0
"""Between two lines of progress where there is no terminal."""


def run(config: Config) -> None:
    """Check all datasets, then complain of all bad files together."""
    from titans_data import DataError

    paths = dataset_paths(config)
    if not paths:
        raise ConfigError(f"data={config.data.format} has no checksums to verify; choose a prepared dataset")
    bad: list[str] = []
    for path in paths.values():
        try:
            bad += verify(path, config)
        except DataError as error:  # no card to go by
            if len(paths) == 1:
                raise
            tables.show(path, [("problem", str(error))])
            bad.append(f"{path.rstrip('/')}/dataset.json")
    if bad:
        are = "1 file is" if len(bad) == 1 else f"{len(bad)} files are"
        raise DataError(f"{are} not what the card says: {', '.join(bad)}; restore them, or prepare the dataset again")


def verify(path: str, config: Config) -> list[str]:
    """Check one dataset, print a table, and return its bad files."""
    from titans_data.checksums import Checked, Checksums

    files = Checksums(path, config.data.cache, opened.cache_bytes(config))
    started = time.monotonic()
    bad: list[Checked] = []
    with Meter(path, files.size_bytes) as meter:
        for file in files:
            meter.add(file.size_bytes)
            if file.problem is not None:
                bad.append(file)
    seconds = max(time.monotonic() - started, 1e-9)
    speed = f"{files.size_bytes / seconds / 1e6:,.1f} MB/s"
    tables.show(
        path,
        [
            ("files", f"{len(files):,} checked, {len(bad):,} bad"),
            ("bytes", f"{files.size_bytes:,} in {seconds:.1f} s, {speed}"),
            *((file.where, file.problem or "") for file in bad),
        ],
    )
    return [file.where for file in bad]


class Meter:
    """Bytes checked: a bar on a terminal, else a line per INTERVAL_S."""

    def __init__(self, name: str, total: int) -> None:
        self._name, self._total, self._done, self._said = name, total, 0, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        self._bar = Progress(*columns, TimeRemainingColumn(), disable=not sys.stdout.isatty())
        self._task = self._bar.add_task(name, total=total)

    def __enter__(self) -> Meter:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def add(self, size_bytes: int) -> None:
        """Count a file."""
        self._done += size_bytes
        self._bar.update(self._task, completed=self._done)
        if self._bar.disable and time.monotonic() - self._said > INTERVAL_S:
            self._said = time.monotonic()
            print(f"verify | {self._name} | {self._done / max(self._total, 1):.0%}", flush=True)
