"""Without a GPU the kernels run in Triton's interpreter, which must be chosen before Triton is first imported."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import triton
import triton.language as tl

if os.environ.get("TRITON_INTERPRET") == "1" and isinstance(tl.cdiv, triton.JITFunction):
    raise RuntimeError(
        "Triton was imported before tests/kernels/conftest.py could choose its interpreter: "
        "set TRITON_INTERPRET=1 in the environment, or run tests/kernels by itself"
    )

from titans_kernels.ahead_of_time import Usage, compile_in_subprocess, table

USAGES = pytest.StashKey[dict[str, Usage]]()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def usages(request: pytest.FixtureRequest) -> dict[str, Usage]:
    """What every kernel takes of an H100, by the name of its configuration."""
    found = compile_in_subprocess()
    request.config.stash[USAGES] = found
    return found


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table of the kernels, if they were compiled."""
    if USAGES in config.stash:
        terminalreporter.section("kernels compiled for sm_90, per thread; bytes")
        terminalreporter.write_line(table(config.stash[USAGES]))
