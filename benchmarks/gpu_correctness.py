"""The kernels against float64: outputs, the state after, and all gradients.

On a GPU the reference is the torch form, which the tests hold to the recurrence; on a CPU the recurrence itself.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpu_machine import Row, Settings, in_processes
from torch import Tensor
from torch.nn import functional as F

from titans_dist.layers.kernels import failed_check
from titans_dist.memory import MemorySpec, MemoryState, neural_memory
from titans_kernels.table import state_in_registers

BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest ||out - reference|| / ||reference|| of every output and gradient, per dtype of q, k and v."""
BATCH, HEADS = 2, 2
LARGEST_PART = 5
"""Tokens that an initial state inside a chunk has behind it."""


@dataclass(frozen=True)
class Case:
    """One memory and one sequence. state: none, between (two chunks) or inside (a chunk)."""

    dtype: str = "float32"
    depth: int = 2
    expansion: int = 4
    head_dim: int = 64
    chunk_size: int = 64
    momentum: bool = True
    bias: str = "l2"
    residual: bool = True
    read: str = "after"
    is_odd: bool = False
    documents: bool = False
    state: str = "none"
    in_registers: bool = False

    @property
    def spec(self) -> MemorySpec:
        expansion = self.expansion if self.depth > 1 else 1
        return MemorySpec(self.depth, expansion, residual=self.residual, bias=self.bias, momentum=self.momentum)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """float32 has no kernels for the larger tiles, nor any with the state in registers."""
        is_large = self.chunk_size * (64 if self.head_dim <= 64 else 128) > 64 * 64
        return ("bfloat16",) if self.in_registers or is_large else tuple(BOUNDS)

    @property
    def length(self) -> int:
        return 2 * self.chunk_size + self.chunk_size // 2 + 3 if self.is_odd else 3 * self.chunk_size

    def describe(self) -> str:
        """All but the dtype."""
        memory = f"depth 2 x {self.expansion}" if self.depth == 2 else f"depth {self.depth}"
        choices = {
            "no momentum": not self.momentum,
            self.bias: self.bias != "l2",
            "no residual": not self.residual,
            f"read {self.read}": self.read != "after",
            "odd length": self.is_odd,
            "documents": self.documents,
            f"state {self.state}": self.state != "none",
            "in registers": self.in_registers,
        }
        words = [memory, f"head {self.head_dim}", f"chunk {self.chunk_size}"]
        return ", ".join([*words, *(name for name, applies in choices.items() if applies)])


CHOICES: list[dict[str, Any]] = [
    {},
    {"momentum": False},
    {"bias": "dot"},
    {"bias": "huber"},
    {"residual": False},
    {"read": "before"},
    {"is_odd": True},
    {"documents": True},
    {"state": "between"},
    {"state": "inside", "is_odd": True},
    {"read": "before", "documents": True, "is_odd": True},
    {"bias": "huber", "residual": False, "momentum": False, "state": "between"},
]


def cases(settings: Settings) -> list[Case]:
    """Every choice at one structure, and every structure with one choice and one chunk after the other."""
    if settings.tiny:
        small = Case(expansion=2, head_dim=8, chunk_size=4)
        found = [replace(small, **choice) for choice in CHOICES]
    elif settings.quick:
        found = [Case(), Case(expansion=2, documents=True, is_odd=True), Case(depth=1, head_dim=128, bias="huber")]
        found += [Case(expansion=1, chunk_size=128, momentum=False), Case(head_dim=96, chunk_size=32, state="between")]
    else:
        structures = [(1, 1, dim) for dim in (64, 96, 128)]
        structures += [(2, expansion, dim) for expansion in (1, 2, 4) for dim in (64, 96, 128)]
        chunks = itertools.cycle((16, 32, 64, 128, 128))  # five, so that they do not go in step with the dimensions
        each = zip(structures, chunks, CHOICES[5:] + CHOICES[:5], strict=False)
        found = [Case(expansion=2, **choice) for choice in CHOICES]
        for (depth, expansion, dim), chunk, choice in each:
            chunk = min(chunk, 64) if dim > 64 else chunk
            found.append(Case(depth=depth, expansion=expansion, head_dim=dim, chunk_size=chunk, **choice))
    if settings.device == "cuda":
        held = [(2, 1), (2, 2), (1, 1)][: 1 if settings.quick else 3]
        for (depth, expansion), choice in itertools.product(held, CHOICES):
            found.append(Case(depth=depth, expansion=expansion, in_registers=True, **choice))
    return [replace(case, dtype=dtype) for case in found for dtype in BOUNDS if dtype in case.dtypes]


def correctness(settings: Settings) -> list[Row]:
    """A row per case, and one on whether two runs give the same bits."""
    reference = "torch" if settings.device == "cuda" else "recurrent"
    todo = [
        Check(case, settings.device, settings.backend, reference, settings.seed + i)
        for i, case in enumerate(cases(settings))
    ]
    workers = 0 if settings.device == "cpu" else min(os.cpu_count() or 1, 12, len(todo))
    seconds = min(settings.seconds_left, 80 if settings.quick else 230)
    found = {done: row for done, row in in_processes(run, todo, workers, seconds)}
    rows = [{"case": one.case.describe(), "dtype": one.case.dtype, **found[one]} for one in todo]
    return rows + (layer_kernels() if settings.device == "cuda" else [])


def layer_kernels() -> list[Row]:
    """The kernels of the layer around the memory, held to torch as `titans_dist` does before it uses them."""
    rows = []
    for head_dim, dtype in itertools.product((64, 96, 128), BOUNDS):
        differs = failed_check(head_dim, 4, getattr(torch, dtype), torch.device("cuda", 0))
        case = f"convolution, norm and gate, head {head_dim}"
        rows.append({"case": case, "dtype": dtype, "error": differs or "as in torch", "passed": differs is None})
    return rows


@dataclass(frozen=True)
class Check:
    case: Case
    device: str
    backend: str
    reference: str
    seed: int


def run(check: Check) -> Row:
    """The largest relative error of a case, of what it is, and whether all are within the bound and repeat."""
    case, bound = check.case, BOUNDS[check.case.dtype]
    torch.set_num_threads(1)
    inputs = draw(case, check.seed)
    reference = results(case, inputs, torch.float64, check.reference, check.device)
    with contextlib.ExitStack() as during:
        if check.device == "cuda":
            during.enter_context(state_in_registers(torch.device("cuda", 0), case.in_registers))
        dtype = getattr(torch, case.dtype)
        found, again = (results(case, inputs, dtype, check.backend, check.device) for _ in range(2))
    errors = {name: relative_error(found[name], reference[name]) for name in reference}
    worst = max(errors, key=lambda name: errors[name] if errors[name] == errors[name] else float("inf"))
    is_same = all(torch.equal(found[name], again[name]) for name in found)
    return {
        "worst": worst,
        "error": errors[worst],
        "bound": bound,
        "deterministic": is_same,
        "passed": is_same and all(error <= bound for error in errors.values()),
        "errors": errors,
    }


def relative_error(found: Tensor, reference: Tensor) -> float:
    """||found - reference|| / ||reference||; where the reference is 0 what was found must be so too."""
    size, off = reference.norm().item(), (found.double() - reference).norm().item()
    return off / size if size else (0.0 if off == 0 else float("inf"))


def draw(case: Case, seed: int) -> dict[str, Tensor]:
    """Inputs and the gradients of the outputs, on the CPU; values that the case's dtype can hold."""
    g = torch.Generator().manual_seed(seed)
    shape, dim = (BATCH, case.length, HEADS, case.head_dim), case.head_dim
    q, k, v = (torch.randn(shape, generator=g) for _ in range(3))
    alpha, eta, theta = (torch.rand(shape[:3], generator=g) * most for most in (0.02, 0.9, 1 / case.chunk_size))
    # Far from every error's norm: a token that rounding takes to the other side has other gradients, rightly.
    delta = torch.where(torch.rand(shape[:3], generator=g) < 0.5, 0.2, 5.0) * dim**0.5
    inputs = {"q": F.normalize(q, dim=-1), "k": F.normalize(k, dim=-1), "v": v, "g_y": torch.randn(shape, generator=g)}
    inputs = {name: x.to(getattr(torch, case.dtype)).float() for name, x in inputs.items()}
    inputs |= {"alpha": alpha, "eta": eta, "theta": theta, "delta": delta}
    inputs |= {
        "gain": 1 + 0.1 * torch.randn(HEADS, dim, generator=g),
        "bias": 0.1 * torch.randn(HEADS, dim, generator=g),
    }
    for i, (size, std) in enumerate(zip(case.spec.shapes(dim), case.spec.initial_std(dim), strict=True)):
        inputs[f"w{i}"] = torch.randn(HEADS, *size, generator=g) * std
        scale = inputs[f"w{i}"].norm() / inputs[f"w{i}"].numel() ** 0.5
        inputs[f"state w{i}"] = torch.randn(BATCH, HEADS, *size, generator=g) * scale
        inputs[f"state s{i}"] = torch.randn(BATCH, HEADS, *size, generator=g) * scale / 10
        inputs[f"state anchor{i}"] = inputs[f"state w{i}"] + torch.randn(BATCH, HEADS, *size, generator=g) * scale / 10
        inputs[f"g_w{i}"], inputs[f"g_s{i}"] = (torch.randn(BATCH, HEADS, *size, generator=g) for _ in range(2))
    inputs["state kept"] = 0.9 + 0.1 * torch.rand(BATCH, HEADS, generator=g)
    starts = torch.rand(shape[:2], generator=g) < 4 / case.length
    starts[:, case.chunk_size // 2] = True
    return inputs | {"starts": starts}


def results(case: Case, inputs: dict[str, Tensor], dtype: torch.dtype, backend: str, device: str) -> dict[str, Tensor]:
    """Every output and gradient by name, on the CPU."""
    precise = torch.promote_types(dtype, torch.float32)
    given = {
        name: x.to(device)
        if x.dtype == torch.bool
        else x.to(device, dtype if name in ("q", "k", "v", "g_y") else precise)
        for name, x in inputs.items()
    }
    leaves = {name: given[name].requires_grad_() for name in _leaves(case)}
    layers = range(case.depth)
    weights = [given[f"w{i}"] for i in layers]
    y, after = neural_memory(
        given["q"],
        given["k"],
        given["v"],
        spec=case.spec,
        weights=weights,
        alpha=given["alpha"],
        eta=given["eta"] if case.momentum else None,
        theta=given["theta"],
        delta=given["delta"] if case.bias == "huber" else None,
        norm=(given["gain"], given["bias"]) if case.residual else None,
        state=_state(case, given),
        starts=given["starts"] if case.documents else None,
        chunk_size=case.chunk_size,
        read=case.read,
        backend=backend,
    )
    outputs = {"y": (y, given["g_y"])}
    for letter, tensors in (("w", after.weights), ("s", after.momentum)):
        outputs |= {f"after {letter}{i}": (x, given[f"g_{letter}{i}"]) for i, x in enumerate(tensors)}
    asked, wanted = zip(*outputs.values(), strict=True)
    grads = torch.autograd.grad(asked, list(leaves.values()), wanted, allow_unused=True)
    found = {name: x for name, (x, _) in outputs.items()}
    found |= {f"gradient of {name}": torch.zeros_like(x) if g is None else g
              for (name, x), g in zip(leaves.items(), grads, strict=True)}  # fmt: skip
    return {name: x.detach().cpu() for name, x in found.items()}


def _leaves(case: Case) -> Iterator[str]:
    yield from ("q", "k", "v", "alpha", "theta")
    yield from ["eta"] * case.momentum + ["delta"] * (case.bias == "huber") + ["gain", "bias"] * case.residual
    for i in range(case.depth):
        yield from [f"w{i}"] * (case.state == "none" or case.documents)
        if case.state != "none":
            yield from [f"state w{i}"] + [f"state s{i}"] * case.momentum
            yield from [f"state anchor{i}"] * (case.state == "inside")
    yield from ["state kept"] * (case.state == "inside")


def _state(case: Case, given: dict[str, Tensor]) -> MemoryState | None:
    if case.state == "none":
        return None
    parts = {part: [given[f"state {part}{i}"] for i in range(case.depth)] for part in ("w", "s", "anchor")}
    state = MemoryState(parts["w"], parts["s"] if case.momentum else [])
    if case.state == "inside":
        # Where a chunk is shorter than that, it is all but one of its tokens.
        position = min(LARGEST_PART, case.chunk_size - 1)
        state = replace(state, anchor=parts["anchor"], kept=given["state kept"], position=position)
    return state
