"""The write pass backward with its adjoint in registers, in an emulated Gluon, against autograd of the forward pass."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.gluon_emulator import Emulator, Half
from tests.kernels.test_write_resident import (
    ACTIVATIONS,
    BFLOAT16,
    CHUNK,
    DOCUMENTS,
    EXACT,
    Memory,
    assert_close,
)
from titans_kernels import write_backward_resident

BORDER = 2


class Limit(torch.autograd.Function):
    """A row's state; its gradient, all matrices of it together, is no longer than `most`."""

    @staticmethod
    def forward(ctx: Any, most: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        ctx.most = most
        return tuple(x.clone() for x in state)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        norm = torch.stack([(g**2).sum() for g in grads]).sum().sqrt()
        return None, *(g if norm <= ctx.most else g / norm * ctx.most for g in grads)


class Backward(Memory):
    """What the reads ask of every chunk, the forward pass the kernel starts from, and the gradients by autograd."""

    def __init__(self, limited: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.limited = limited
        tokens, units = (CHUNK, self.head), (CHUNK, self.hidden)
        sizes = {x: w.shape[1:] for x, w in self.state.items()}
        sizes |= {"reads": tokens, "descents": tokens, "inputs": units, "hidden": units}
        self.asked = {x: self.random(self.rows, self.count, *size) for x, size in sizes.items()}
        self.end = {x: self.random(*w.shape) for x, w in self.state.items()}
        self.most = torch.full((self.rows,), 50.0).double()
        self.most[-1] = 1e9

    def run(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the forward pass leaves, and the gradients."""
        k, v, limit, add, keep = (x.clone().requires_grad_() for x in (self.k, self.v, self.limit, self.add, self.keep))
        head_of = [row % self.heads for row in range(self.rows)]
        gain, bias = (x[head_of][:, None].repeat(1, self.count, 1).requires_grad_() for x in (self.gain, self.bias))
        before = {x: w.clone().requires_grad_() for x, w in self.state.items()}
        begin = {x: w.clone().requires_grad_() for x, w in self.begin.items()}
        left = {f"chunk_{x}": self.nothing(*w.shape[1:]) for x, w in before.items()}
        left |= {x: self.nothing(CHUNK, self.head) for x in ("outputs", "descents")}
        left |= {x: self.nothing(CHUNK, self.hidden) for x in ("inner", "pulled")}
        total = torch.zeros((), dtype=torch.float64)
        for row in range(self.rows):
            batch, head = divmod(row, self.heads)
            state = {x: w[row] for x, w in before.items()}
            for i in range(self.count):
                n = self.first + i
                flag = int(self.flags[batch, n])
                if self.limited and flag & BORDER:
                    state = dict(zip(state, Limit.apply(self.most[row], *state.values()), strict=True))
                if self.resets is not None and flag & 1:
                    state = {x: w[row] for x, w in begin.items()}
                length, start = int(self.length[batch, n]), int(self.begins[batch, n])
                tokens = slice(start, start + length)
                key = k[batch, tokens, head]
                z1 = key @ state["w1"]
                a = ACTIVATIONS[self.activation](z1)
                z2 = a @ state["w2"]
                (slope,) = torch.autograd.grad(a.sum(), z1, create_graph=True)
                d2 = self.descent_of(
                    z2, key, v[batch, tokens, head], limit[batch, tokens, head], gain[row, i], bias[row, i]
                )
                pulled = d2 @ state["w2"].T
                d1 = pulled * slope
                asked = {x: w[row, i] for x, w in self.asked.items()}
                total = total + sum((state[x] * asked[x]).sum() for x in state)
                for x, made in (("reads", key), ("descents", d2), ("inputs", a), ("hidden", d1)):
                    total = total + (made * asked[x][:length]).sum()
                for x in state:
                    left[f"chunk_{x}"][row, i] = state[x].detach()
                made_here = {"outputs": z2, "descents": d2, "inner": z1, "pulled": pulled}
                for x, made in made_here.items():
                    left[x][row, i, :length] = made.detach()
                keep_w, keep_t, keep_s, _ = keep[row, i]
                add_w, add_s = add[row, i, :, :length, None]
                after = {}
                for layer, inputs, d in (("1", key, d1), ("2", a, d2)):
                    after[f"w{layer}"] = keep_w * state[f"w{layer}"] + (add_w * inputs).T @ d
                    if self.momentum:
                        past = state[f"s{layer}"]
                        after[f"w{layer}"] = after[f"w{layer}"] + keep_t * past
                        after[f"s{layer}"] = keep_s * past + (add_s * inputs).T @ d
                state = {x: after[x] for x in state}
            total = total + sum((state[x] * self.end[x][row]).sum() for x in state)
        total.backward()
        found = {"k": k, "v": v, "add": add, "keep": keep, **before}
        if self.loss == "huber":
            found["limit"] = limit
        if self.residual:
            found |= {"gain": gain, "bias": bias}
        if self.resets is not None:
            found |= {f"begin_{x}": w for x, w in begin.items()}
        return left, {x: torch.zeros_like(w) if w.grad is None else w.grad for x, w in found.items()}

    def descent_of(self, z: Tensor, k: Tensor, v: Tensor, limit: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
        """-dl/dz, differentiable."""
        f = z
        if self.residual:
            f = k + torch.nn.functional.layer_norm(z, z.shape[1:], gain, bias, eps=1e-6)
        size = ((f - v) ** 2).sum(-1)
        losses = {"l2": size, "dot": -2 * (f * v).sum(-1)}
        if self.loss == "huber":
            length = size.sqrt()
            losses["huber"] = torch.where(length <= limit, size, 2 * limit * length - limit**2)
        return -torch.autograd.grad(losses[self.loss].sum(), z, create_graph=True)[0]

    def gradients(self, emulator: Emulator, left: dict[str, Tensor]) -> dict[str, Tensor]:
        """By the kernel, from what the forward pass left."""
        dtype = torch.bfloat16 if emulator.rounds else emulator.number

        def numbers(x: Tensor, dtype: torch.dtype = emulator.number) -> Tensor:
            return x.to(dtype, copy=True).contiguous()

        def half(x: Tensor) -> Half:
            return Half(numbers(x, dtype))

        masked = {x: w.clone() for x, w in self.asked.items()}
        for row, i in itertools.product(range(self.rows), range(self.count)):
            for x in ("reads", "descents", "inputs", "hidden"):
                masked[x][row, i, self.length[row // self.heads, self.first + i] :] = float("nan")
        grads = {x: numbers(torch.full_like(y, float("nan")), dtype) for x, y in (("k", self.k), ("v", self.v))}
        grads |= {x: numbers(w) for x, w in self.end.items()}
        grads |= {x: numbers(torch.zeros_like(y)) for x, y in (("add", self.add), ("keep", self.keep))}
        given: dict[str, Any] = {
            "k": half(self.k), "v": half(self.v), "outputs": numbers(left["outputs"]),
            **{x: half(left[x]) for x in ("descents", "inner", "pulled")},
            "begins": self.begins, "lengths": self.length, "flags": self.flags,
            "add": numbers(self.add), "keep": numbers(self.keep),
            **{f"chunk_{x}": half(left[f"chunk_{x}"]) for x in self.state},
            **{f"from_{x}": half(self.asked[x]) for x in self.state},
            **{f"g_{x}": numbers(masked[x]) for x in ("reads", "descents")},
            **{f"g_{x}": half(masked[x]) for x in ("inputs", "hidden")},
            "length_t": self.length_t, "heads": self.heads, "chunks": self.length.shape[1], "first": self.first,
            "count": self.count, "HEAD": self.head, "HIDDEN": self.hidden, "DIM": self.head, "BLOCK": 32,
            "CHUNK": CHUNK, "DEPTH": 2, "MOMENTUM": self.momentum, "RESIDUAL": self.residual, "LOSS": self.loss,
            "ACTIVATION": self.activation, "STARTS": self.resets is not None, "LIMITED": self.limited,
            "PRECISION": "tf32",
        }  # fmt: skip
        if self.loss == "huber":
            given["limit"], grads["limit"] = numbers(self.limit), numbers(torch.zeros_like(self.limit))
        if self.residual:
            given |= {"gain": numbers(self.gain), "bias": numbers(self.bias)}
            sums = torch.ones(self.rows, self.count, self.head)  # added to
            grads |= {"gain": numbers(sums), "bias": numbers(sums)}
        if self.resets is not None:
            grads |= {f"begin_{x}": numbers(torch.ones_like(w)) for x, w in self.begin.items()}
        if self.limited:
            given["largest"] = numbers(self.most)
        given |= {f"g_{x}": Half(w) if x in ("k", "v") else w for x, w in grads.items()}
        kernel = write_backward_resident.write_backward_resident_kernel
        emulator.launch(kernel, self.rows, {x: given.get(x) for x in kernel.arg_names}, write_backward_resident.WARPS)
        for x in grads:
            if x in ("gain", "bias") or x.startswith("begin_"):
                grads[x] -= 1
        return grads


def check(memory: Backward, emulator: Emulator, tolerance: float, of_keep: float | None = None) -> None:
    left, expected = memory.run()
    tokens = torch.arange(memory.length_t) < memory.length.sum(1)[:, None]  # of the others nothing is asked
    found = memory.gradients(emulator, left)
    for x in ("k", "v"):
        expected[x][~tokens] = float("nan")
    expected["keep"] = expected["keep"] * torch.tensor([1, 1 if memory.momentum else 0, 1 if memory.momentum else 0, 0])
    assert_close({"keep": found.pop("keep")}, {"keep": expected.pop("keep")}, of_keep or tolerance)
    assert_close(found, expected, tolerance)


SIZES: dict[str, dict[str, Any]] = {
    "x1": {},
    "x1 no momentum": {"momentum": False},
    "x2": {"hidden": 128},
    "x2 no momentum": {"hidden": 128, "momentum": False},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("loss", ["l2", "dot", "huber"])
def test_gradients_are_autograds(size: str, residual: bool, loss: str) -> None:
    check(Backward(**SIZES[size], residual=residual, loss=loss), EXACT, 1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    check(Backward(activation=activation), EXACT, 1e-5 if activation == "gelu" else 1e-9)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limited", [True, False])
def test_documents_tails_empty_chunks_and_limits(size: str, limited: bool) -> None:
    check(Backward(**SIZES[size], **DOCUMENTS, loss="huber", limited=limited), EXACT, 1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_limits_between_all_chunks(size: str) -> None:
    check(Backward(**SIZES[size], lengths=[[64, 64, 30]], heads=2, limited=True), EXACT, 1e-9)


def test_a_segment_of_the_chunks() -> None:
    memory = Backward(lengths=[[64, 20, 64, 33], [64, 64, 5, 0]], heads=2, first=2)
    left, expected = memory.run()
    found = memory.gradients(EXACT, left)
    for x in ("k", "v"):
        expected[x][found[x].isnan()] = float("nan")
    expected["keep"][..., 3] = 0
    assert_close(found, expected, 1e-9)


@pytest.mark.parametrize("size", SIZES)
def test_bfloat16(size: str) -> None:
    memory = Backward(**SIZES[size], **DOCUMENTS, activation="gelu")
    memory.k, memory.v = memory.k.bfloat16().double(), memory.v.bfloat16().double()
    check(memory, BFLOAT16, 4e-2, of_keep=0.25)  # few numbers, each a sum of many that cancel each other
