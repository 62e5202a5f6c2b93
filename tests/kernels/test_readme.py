"""The program in the kernels' README runs."""

from __future__ import annotations

import re
from pathlib import Path

import torch

README = Path(__file__).parents[2] / "kernels" / "README.md"


def test_the_readmes_program_runs() -> None:
    (program,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(program, names)
    q, y = names["q"], names["y"]
    assert isinstance(q, torch.Tensor) and isinstance(y, torch.Tensor) and q.grad is not None
    assert y.shape == q.shape and y.isfinite().all() and q.grad.count_nonzero()
