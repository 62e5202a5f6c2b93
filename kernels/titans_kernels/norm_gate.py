# mypy: disable-error-code="no-untyped-def"
"""RMSNorm of every head, times SiLU of the gate, in one kernel. All arithmetic is in float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from titans_kernels.ahead_of_time import Configuration
from titans_kernels.device import on_device_of
from titans_kernels.sigmoid import sigmoid

WARPS = 8
ELEMENTS = WARPS * 32 * 16  # of a program: some tokens of one head


def norm_gate(y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y / rms(y) * weight * SiLU(gate) -> (B, T, H, D); y, gate (B, T, H, D); weight (H, D); rms over D."""
    with on_device_of(y):
        return _NormGate.apply(y, gate, weight, eps)


class _NormGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, gate, weight = y.contiguous(), gate.contiguous(), weight.contiguous()
        ctx.save_for_backward(y, gate, weight)
        ctx.eps = eps
        out = torch.empty_like(y)
        heads, tokens, constants = weight.shape[0], y.numel() // weight.numel(), _constants(y.shape[-1])
        programs = heads * triton.cdiv(tokens, constants["TOKENS"])
        _forward_kernel[(programs,)](y, gate, weight, out, tokens, heads, eps, **constants, num_warps=WARPS)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, gate, weight = ctx.saved_tensors
        g_y, g_gate = torch.empty_like(y), torch.empty_like(gate)
        heads, tokens, constants = weight.shape[0], y.numel() // weight.numel(), _constants(y.shape[-1])
        blocks = triton.cdiv(tokens, constants["TOKENS"])
        # A program's share each, summed afterwards: the order of the sum, and so the result, is always the same.
        g_weight = y.new_empty(blocks, *weight.shape, dtype=torch.float32)
        _backward_kernel[(heads * blocks,)](
            y,
            gate,
            weight,
            grad.contiguous(),
            g_y,
            g_gate,
            g_weight,
            tokens,
            heads,
            ctx.eps,
            **constants,
            num_warps=WARPS,
        )
        return g_y, g_gate, g_weight.sum(0).to(weight.dtype), None


def _constants(head_dim: int) -> dict[str, Any]:
    padded = triton.next_power_of_2(head_dim)
    return {"HEAD_DIM": head_dim, "PADDED_DIM": padded, "TOKENS": max(1, ELEMENTS // padded)}


def configurations() -> Iterator[Configuration]:
    for dtype, head_dim in product(("bf16", "fp32"), (64, 96, 128)):
        pointer, rest = f"*{dtype}", {"tokens": "i32", "heads": "i32", "eps": "fp32"}
        inputs = {"y": pointer, "gate": pointer, "weight": pointer}
        gradients = {"g_out": pointer, "g_y": pointer, "g_gate": pointer, "g_weight": "*fp32"}
        for kind, kernel, more in (
            ("forward", _forward_kernel, {"out": pointer}),
            ("backward", _backward_kernel, gradients),
        ):
            name = f"norm_gate {kind} {dtype} head_dim={head_dim}"
            yield Configuration(name, kernel, inputs | more | rest, _constants(head_dim), WARPS)


@triton.jit
def _forward_kernel(
    y, gate, weight, out, tokens, heads, eps, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr
):
    at, inside, weight_at, dim_inside = _place(tokens, heads, HEAD_DIM, PADDED_DIM, TOKENS)
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + weight_at, mask=dim_inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + eps)
    gated = value * inverse[:, None] * scale * opening * sigmoid(opening)
    tl.store(out + at, gated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    y,
    gate,
    weight,
    g_out,
    g_y,
    g_gate,
    g_weight,
    tokens,
    heads,
    eps,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
):
    at, inside, weight_at, dim_inside = _place(tokens, heads, HEAD_DIM, PADDED_DIM, TOKENS)
    value = tl.load(y + at, mask=inside, other=0.0).to(tl.float32)
    opening = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(g_out + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(weight + weight_at, mask=dim_inside, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + eps)[:, None]
    normed = value * inverse
    opened = sigmoid(opening)

    g_opening = g * normed * scale * opened * (1.0 + opening * (1.0 - opened))
    tl.store(g_gate + at, g_opening.to(g_gate.dtype.element_ty), mask=inside)
    g *= opening * opened
    share = tl.program_id(0) // heads
    tl.store(g_weight + share * heads * HEAD_DIM + weight_at, tl.sum(g * normed, 0)[None, :], mask=dim_inside)
    g *= scale
    along = tl.sum(g * normed, 1) / HEAD_DIM
    tl.store(g_y + at, ((g - normed * along[:, None]) * inverse).to(g_y.dtype.element_ty), mask=inside)


@triton.jit
def _place(tokens, heads, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS: tl.constexpr):
    """A program's elements (tokens, dim) and weights (1, dim), and which of them there are.

    Neighbors have the same tokens of other heads: what they read at a time is whole rows of memory.
    """
    head = tl.program_id(0) % heads
    token = tl.program_id(0) // heads * TOKENS + tl.arange(0, TOKENS)[:, None]
    dim = tl.arange(0, PADDED_DIM)[None, :]
    at = (token.to(tl.int64) * heads + head) * HEAD_DIM + dim
    return at, (token < tokens) & (dim < HEAD_DIM), head * HEAD_DIM + dim, dim < HEAD_DIM
