"""The write pass with its state in registers, in an emulated Gluon: numbers, documents, tails, and no races."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.kernels.gluon_emulator import EmulationError, Emulator, Half
from titans_kernels import launch, table, write, write_backward_resident, write_resident

CHUNK = 64
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "identity": lambda x: x}


@dataclass
class Memory:
    """Some rows' chunks, and what `write_kernel` takes for them; tensors in float64."""

    head: int = 64
    hidden: int = 64
    depth: int = 2
    momentum: bool = True
    residual: bool = True
    loss: str = "l2"
    activation: str = "silu"
    lengths: list[list[int]] = field(default_factory=lambda: [[64, 64, 64]])
    resets: list[list[int]] | None = None
    heads: int = 1
    first: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        batch, chunks = len(self.lengths), len(self.lengths[0])
        self.count = chunks - self.first
        self.rows, self.length_t = batch * self.heads, max(sum(x) for x in self.lengths)
        self.k, self.v = (
            F.normalize(self.random(batch, self.length_t, self.heads, self.head), dim=-1) for _ in range(2)
        )
        self.v *= 3
        self.limit = torch.rand(batch, self.length_t, self.heads).double() * 6
        self.gain, self.bias = 1 + 0.3 * self.random(self.heads, self.head), 0.3 * self.random(self.heads, self.head)
        self.length = torch.tensor(self.lengths, dtype=torch.int32)
        self.begins = (self.length.cumsum(1) - self.length).int()
        self.flags = torch.full_like(self.length, 2) if self.resets is None else torch.tensor(self.resets).int()
        self.add = 0.2 * torch.rand(self.rows, self.count, 2, CHUNK).double()
        for row, i in itertools.product(range(self.rows), range(self.count)):
            self.add[row, i, :, self.length[row // self.heads, self.first + i] :] = 0
        self.keep = torch.rand(self.rows, self.count, 4).double()
        self.keep[..., 3] = 0
        self.state, self.begin = self.new_state(), self.new_state()

    @staticmethod
    def random(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64)

    def new_state(self) -> dict[str, Tensor]:
        sizes = {"1": (self.head, self.hidden), "2": (self.hidden, self.head)}
        slots = [x + y for x in ("ws" if self.momentum else "w") for y in "12"[-self.depth :]]
        return {x: self.random(self.rows, *sizes[x[1]]) / sizes[x[1]][0] ** 0.5 for x in slots}

    def emulated(self, emulator: Emulator, module: ModuleType = write_resident) -> dict[str, Tensor]:
        """What the kernel makes of it: the state, each chunk's start, outputs and descents."""
        dtype = torch.bfloat16 if emulator.rounds else emulator.number

        def numbers(x: Tensor, dtype: torch.dtype = emulator.number) -> Tensor:
            return x.to(dtype, copy=True).contiguous()

        def empty(*sizes: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.full((self.rows, self.count, *sizes), float("nan"), dtype=dtype)

        state = {x: numbers(w) for x, w in self.state.items()}
        made = {f"chunk_{x}": empty(*w.shape[1:]) for x, w in state.items()}
        made |= {"outputs": empty(CHUNK, self.head, dtype=emulator.number), "descents": empty(CHUNK, self.head)}
        given: dict[str, Any] = {
            **state,
            **{x: made[x] if x == "outputs" else Half(made[x]) for x in made},
            "k": Half(numbers(self.k, dtype)), "v": Half(numbers(self.v, dtype)),
            "begins": self.begins, "lengths": self.length, "flags": self.flags,
            "add": numbers(self.add), "keep": numbers(self.keep),
            "length_t": self.length_t, "heads": self.heads, "chunks": self.length.shape[1], "first": self.first,
            "count": self.count, "HEAD": self.head, "HIDDEN": self.hidden, "DIM": self.head, "BLOCK": 32,
            "CHUNK": CHUNK, "DEPTH": self.depth, "MOMENTUM": self.momentum, "RESIDUAL": self.residual,
            "LOSS": self.loss, "ACTIVATION": self.activation, "STARTS": self.resets is not None, "PRECISION": "tf32",
        }  # fmt: skip
        if self.loss == "huber":
            given["limit"] = numbers(self.limit)
        if self.residual:
            given |= {"gain": numbers(self.gain), "bias": numbers(self.bias)}
        if self.resets is not None:
            given |= {f"begin_{x}": numbers(w) for x, w in self.begin.items()}
        kernel = module.write_resident_kernel
        emulator.launch(kernel, self.rows, {x: given.get(x) for x in kernel.arg_names}, write_resident.WARPS)
        return {**state, **made}

    def expected(self) -> dict[str, Tensor]:
        """The same by the chunk's equations, with gradients by autograd."""
        state = {x: w.clone() for x, w in self.state.items()}
        found = {f"chunk_{x}": self.nothing(*w.shape[1:]) for x, w in state.items()}
        found |= {x: self.nothing(CHUNK, self.head) for x in ("outputs", "descents")}
        for row, i in itertools.product(range(self.rows), range(self.count)):
            batch, head = divmod(row, self.heads)
            n = self.first + i
            if self.resets is not None and self.resets[batch][n] & 1:
                for x in state:
                    state[x][row] = self.begin[x][row]
            for x in state:
                found[f"chunk_{x}"][row, i] = state[x][row]
            begin, length = int(self.begins[batch, n]), int(self.length[batch, n])
            tokens = slice(begin, begin + length)
            k, v = self.k[batch, tokens, head], self.v[batch, tokens, head]
            layers = [(k, x) for x in ("1", "2")[-self.depth :]]
            pre = []
            a = k
            for j, (_, layer) in enumerate(layers):
                layers[j] = (a.detach(), layer)
                pre.append((a @ state[f"w{layer}"][row]).requires_grad_())
                a = ACTIVATIONS[self.activation](pre[-1])
            *inner, z = pre
            # The descent at each layer's output: the loss as a function of that output alone.
            d = self.descent(z, z, k, v, batch, head, tokens)
            descents = [d]
            if inner:
                out = ACTIVATIONS[self.activation](inner[0]) @ state["w2"][row]
                descents.insert(0, self.descent(out, inner[0], k, v, batch, head, tokens))
            found["outputs"][row, i, :length], found["descents"][row, i, :length] = z.detach(), d
            keep_w, keep_t, keep_s, _ = self.keep[row, i]
            add_w, add_s = self.add[row, i, :, :length, None]
            for (a, layer), d in zip(layers, descents, strict=True):
                w = keep_w * state[f"w{layer}"][row] + (add_w * a).T @ d
                if self.momentum:
                    s = state[f"s{layer}"][row]
                    w += keep_t * s
                    state[f"s{layer}"][row] = keep_s * s + (add_s * a).T @ d
                state[f"w{layer}"][row] = w
        return {**state, **found}

    def nothing(self, *sizes: int) -> Tensor:
        return torch.full((self.rows, self.count, *sizes), float("nan"), dtype=torch.float64)

    def descent(self, z: Tensor, at: Tensor, k: Tensor, v: Tensor, batch: int, head: int, tokens: slice) -> Tensor:
        """-dl/d`at` of the inner losses of outputs z."""
        f = z
        if self.residual:
            f = k + F.layer_norm(z, z.shape[1:], self.gain[head], self.bias[head], eps=1e-6)
        size = (f - v).norm(dim=-1)
        limit = self.limit[batch, tokens, head]
        losses = {
            "l2": size**2,
            "dot": -2 * (f * v).sum(-1),
            "huber": torch.where(size <= limit, size**2, 2 * limit * size - limit**2),
        }
        return -torch.autograd.grad(losses[self.loss].sum(), at)[0]


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        got = found[name].double()
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: other elements are written"
        got, want = got.nan_to_num(), want.nan_to_num()
        error = (got - want).norm() / want.norm().clamp_min(1e-30)
        assert error <= tolerance, f"{name}: {error:.1e}"


EXACT = Emulator(torch.float64, rounds=False)
BFLOAT16 = Emulator(torch.float32, rounds=True)
CASES = {
    "x1": {},
    "x2": {"hidden": 128},
    "linear": {"depth": 1},
    "linear 128": {"depth": 1, "head": 128, "hidden": 128},
}
DOCUMENTS = {
    "lengths": [[64, 7, 64, 0], [1, 30, 64, 64]],
    "resets": [[2, 1, 0, 1], [1, 0, 3, 0]],
    "heads": 2,
}


@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("loss", ["l2", "dot", "huber"])
def test_it_is_the_chunk_recurrence(size: str, residual: bool, momentum: bool, loss: str) -> None:
    memory = Memory(**CASES[size], residual=residual, momentum=momentum, loss=loss)  # type: ignore[arg-type]
    assert_close(memory.emulated(EXACT), memory.expected(), 1e-10)


@pytest.mark.parametrize("hidden", [64, 128])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(hidden: int, activation: str) -> None:
    memory = Memory(hidden=hidden, activation=activation)
    assert_close(memory.emulated(EXACT), memory.expected(), 1e-5 if activation == "gelu" else 1e-10)


@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("momentum", [True, False])
def test_documents_tails_and_empty_chunks(size: str, momentum: bool) -> None:
    memory = Memory(**CASES[size], **DOCUMENTS, momentum=momentum, loss="huber")  # type: ignore[arg-type]
    assert_close(memory.emulated(EXACT), memory.expected(), 1e-10)


def test_flags_mean_nothing_without_documents() -> None:
    memory = Memory(lengths=[[64, 64]])
    memory.flags.fill_(3)
    assert_close(memory.emulated(EXACT), memory.expected(), 1e-10)


def test_a_segment_of_the_chunks() -> None:
    memory = Memory(lengths=[[64, 20, 64, 33], [64, 64, 5, 0]], heads=2, first=2)
    assert_close(memory.emulated(EXACT), memory.expected(), 1e-10)


@pytest.mark.parametrize("size", CASES)
def test_bfloat16(size: str) -> None:
    memory = Memory(**CASES[size], **DOCUMENTS, activation="gelu")  # type: ignore[arg-type]
    memory.k, memory.v = memory.k.bfloat16().double(), memory.v.bfloat16().double()
    assert_close(memory.emulated(BFLOAT16), memory.expected(), 2e-2)


def test_what_it_supports() -> None:
    for size in CASES.values():
        memory = Memory(**size)  # type: ignore[arg-type]
        assert write_resident.supports(torch.bfloat16, memory.head, memory.hidden, memory.depth, CHUNK)
    assert not write_resident.supports(torch.float32, 64, 64, 2, 64)
    assert not write_resident.supports(torch.bfloat16, 64, 64, 2, 32)
    assert not write_resident.supports(torch.bfloat16, 64, 256, 2, 64)
    assert not write_resident.supports(torch.bfloat16, 128, 128, 2, 64)
    assert not write_resident.supports(torch.bfloat16, 64, 128, 1, 64)
    assert not write_resident.supports(torch.bfloat16, 32, 32, 1, 64)


def mutant(path: Path, old: str, new: str, occurrence: int = 0) -> ModuleType:
    """The module with one place changed: where `old` is inside of the loop over chunks."""
    source = Path(write_resident.__file__).read_text()
    start = source.index("for i in range(count)")
    places = [m.start() for m in re.finditer(re.escape(old), source) if m.start() > start]
    at = places[occurrence]
    path.write_text(source[:at] + new + source[at + len(old) :])
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MUTATIONS = {
    "no fence after the copies": ("fence_async_shared()", "pass", 0, "no fence_async_shared since"),
    "no fence after the activation": ("fence_async_shared()", "pass", 1, "no fence_async_shared since"),
    "no fence after the descent": ("fence_async_shared()", "pass", 2, "no fence_async_shared since"),
    "no fence after the inner descent": ("fence_async_shared()", "pass", 3, "no fence_async_shared since"),
    "no barrier after a fence": ("debug_barrier()", "pass", 0, "no barrier since fence_async_shared"),
    "copies are not awaited": ("async_copy.wait_group(0)", "pass", 0, "before cp.async was waited for"),
    "copies run on": ("async_copy.wait_group(0)", "pass", 1, "ends before its asynchronous copies"),
    "a product is not awaited": ("wait(2, [W2", "wait(4, [W2", 0, "products may be outstanding"),
    "a result is used at once": (
        "z2 = warpgroup_mma_wait(0, [z2_now])",
        "z2 = z2_now",
        0,
        "used before it was waited for",
    ),
    "keys arrive while they are read": (
        "x = key.load(head_rows)",
        "x = key.load(head_rows)\n        _copy_tokens(key, k, begin, length, heads, zero, HEAD, CHUNK, head_rows)",
        0,
        "written while a wgmma reads there",
    ),
    "other warps read yet": (
        "w2_now.store(W2.to(bf16))",
        "d2.store(down.to(bf16))\n        w2_now.store(W2.to(bf16))",
        0,
        "no barrier since it was waited for",
    ),
    "nothing was written": ("a.slice(j, PART, 1).store(active)", "pass", 0, "before it was written"),
    "outside of the descents": ("descents + of_rows", "descents + 10**6 + of_rows", 0, "outside of a tensor"),
    "two layouts": ("d1.load(inner)", "d1.load(inner_rows)", 0, "layouts meet that differ"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_the_emulator_finds(name: str, tmp_path: Path) -> None:
    *change, message = MUTATIONS[name]
    module = mutant(tmp_path / "mutant.py", *change)  # type: ignore[arg-type]
    with pytest.raises(EmulationError, match=message):
        Memory(lengths=[[64, 64]]).emulated(EXACT, module)


COMPILE = """
import json, triton
from titans_kernels import ahead_of_time, write_resident
compile, programs = triton.compile, {}
for c in write_resident.configurations():
    def kept(*arguments, **options):
        compiled = compile(*arguments, **options)
        programs[c.name] = compiled.asm["ptx"]
        return compiled
    triton.compile = kept
    ahead_of_time.compile_ahead(c.kernel, c.signature, c.constants, c.num_warps)
print(json.dumps(programs))
"""


@pytest.mark.aot
def test_compiled_code_fences_before_wgmma() -> None:
    """On every way through the PTX a wgmma comes after a barrier, that after a fence, and that after all stores."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = str(Path(write_resident.__file__).parents[1])
    done = subprocess.run([sys.executable, "-c", COMPILE], env=env, check=True, stdout=subprocess.PIPE, text=True)
    programs = json.loads(done.stdout)
    assert len(programs) == len(list(write_resident.configurations()))
    for name, ptx in programs.items():
        assert unfenced(ptx) == [], name
        # That the check sees something: one fence less, and it fails.
        assert all(unfenced(x) for x in without_one(ptx, "fence.proxy.async")), name


def without_one(ptx: str, instruction: str) -> list[str]:
    lines = ptx.splitlines()
    return ["\n".join(lines[:i] + lines[i + 1 :]) for i, line in enumerate(lines) if instruction in line]


CLEAN, FENCED, STORED = range(3)


def unfenced(ptx: str) -> list[int]:
    """Lines with a wgmma that may see shared memory as it was before a store."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\$L__BB\w+:", line)}
    state = {0: CLEAN}
    work = [0]
    found = set()
    while work:
        i = work.pop()
        now, line = state[i], lines[i]
        after = [i + 1]
        if re.match(r"(@!?%p\d+ )?(st\.shared|stmatrix|cp\.async\.c)", line):
            now = STORED
        elif line.startswith("fence.proxy.async"):
            now = min(now, FENCED)
        elif line.startswith("bar.sync") and now == FENCED:
            now = CLEAN
        elif line.startswith("wgmma.mma_async") and now != CLEAN:
            found.add(i)
        elif branch := re.match(r"(@!?%p\d+ )?bra(\.uni)?\s+(\$L__BB\w+);", line):
            after = [labels[branch[3]], *([i + 1] if branch[1] else [])]
        elif line.startswith("ret"):
            after = []
        for j in after:
            if j < len(lines) and state.get(j, -1) < now:
                state[j] = now
                work.append(j)
    return sorted(found)


def test_the_table_chooses_it() -> None:
    """Only where the table says so, and only for what it supports."""
    shape = launch.Shape(
        1, 64, 2, 64, 128, 2, True, True, True, "l2", "gelu", "after", 64, torch.bfloat16, torch.device("cpu")
    )
    kernel, options = launch._sequential(shape, "write")
    assert kernel is write.write_kernel
    with table.state_in_registers(shape.device):
        kernel, options = launch._sequential(shape, "write")
        assert kernel is write_resident.write_resident_kernel and options["num_warps"] == write_resident.WARPS
        kernel, options = launch._sequential(shape, "write_backward")
        assert kernel is write_backward_resident.write_backward_resident_kernel
        assert set(options) - {"num_warps", "num_stages"} <= set(kernel.arg_names)
        kernel, _ = launch._sequential(replace(shape, dtype=torch.float32), "write")
        assert kernel is write.write_kernel
    assert launch._sequential(shape, "write")[0] is write.write_kernel
