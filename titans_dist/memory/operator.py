"""The memory operator: checks, layout and precision around its forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from titans_dist.memory.chunked import dual_form
from titans_dist.memory.grad_clip import StateGradClip
from titans_dist.memory.kernel_choice import lacking_for, uses_kernels
from titans_dist.memory.kernels import kernel_form
from titans_dist.memory.naive import recurrence
from titans_dist.memory.network import Norm
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.state import MemoryState, initial_state
from titans_dist.memory.tokens import Tokens

READS = ("after", "before", "start")
BACKENDS = ("auto", "torch", "compiled", "triton", "recurrent")


def neural_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    spec: MemorySpec,
    weights: list[Tensor],
    alpha: Tensor | None = None,
    eta: Tensor | None = None,
    theta: Tensor,
    delta: Tensor | None = None,
    norm: Norm | None = None,
    state: MemoryState | None = None,
    start: MemoryState | None = None,
    starts: Tensor | None = None,
    chunk_size: int,
    read: str = "after",
    recompute: bool = False,
    state_grad_clip: float | StateGradClip | None = None,
    backend: str = "auto",
) -> tuple[Tensor, MemoryState]:
    """Write every (k, v) into a memory that learns at test time, and read it with q (Titans, eqs 12-18).

    q, k, v: (B, T, H, D), of one dtype: float64, float32 or bfloat16.
    alpha (share forgotten), eta (momentum kept), theta (inner learning rate): (B, T, H), or (B, T, H, D) where
    `spec.channel_wise`; alpha is not used by retention "none", eta not without momentum: they may then be None.
    delta: (B, T, H), where Huber's loss becomes linear; needed for bias "huber".
    weights: the learned memory W_0, one (H, d_in, d_out) per layer; of retentions "lq", "lq_paper" and "kl" what W_0 is
    the link of. norm: gain and bias, (H, D) or (D,), of the memory's LayerNorm; needed where `spec.residual`.
    state: what an earlier call returned; this call goes on from there, at any token. Without it the sequence begins
    with `start`, by default `weights` and no momentum.
    starts: (B, T) bool, tokens that are the first of a document: the memory begins anew at `start`. The grid of chunks
    is the sequence's; the first chunk of a document that begins inside one is shorter, its gradients are at `start`.
    chunk_size: tokens whose inner gradients are taken at the same memory; 1 is the online recurrence.
    read: "after" (a token sees its own write), "before", or "start" (all of a chunk see the memory it began with).
    recompute: keep one state per group of chunks for the backward pass and work the rest out again.
    state_grad_clip: largest norm, for each sequence and head, of the gradient that goes back from one group of chunks
    to the one before, as a multiple of that of the gradient at what this call returns; None keeps it exact. Over many
    chunks it can explode while every output is sound: the memory is then a chaotic system. A `StateGradClip` is shared
    by the calls that write one sequence.
    backend: "torch", the chunked form; "compiled", the same through torch.compile, which what is not a plain memory
    (MLP, l2 retention or none) of whole chunks does without; "triton", kernels for NVIDIA GPUs, an error where there
    are none for these arguments; "auto", "triton" where it can be had and "torch" elsewhere; "recurrent", token by
    token: the definition, and the form for decoding.

    Returns y (B, T, H, D) in q's dtype, and the state after the last token in float32 (float64 for float64 inputs).
    Differentiable in every input. Raises ValueError for shapes, types or choices that do not fit.
    """
    _check(q, k, v, spec, weights, alpha, eta, theta, delta, norm, starts, chunk_size, read, backend)
    accumulate = torch.promote_types(q.dtype, torch.float32)
    batch = q.shape[0]
    for name, given in (("start", start), ("state", state)):
        if given is not None:
            _check_state(name, given, spec, q, chunk_size)
    if start is None and (state is None or starts is not None):
        start = initial_state(spec, [w.to(accumulate) for w in weights], batch)
    now = start if state is None else state
    assert now is not None
    begin = now if start is None else start  # without documents nothing begins anew

    def precise(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(accumulate)

    alpha = None if spec.retention == "none" else precise(alpha)
    eta = precise(eta) if spec.momentum else None
    delta = precise(delta) if spec.bias == "huber" else None
    may_use = backend in ("auto", "triton")
    by_kernels = may_use and uses_kernels(backend, lacking_for(backend, spec, q, chunk_size, read))
    q_, k_, v_ = (q, k, v) if by_kernels else (q.to(accumulate), k.to(accumulate), v.to(accumulate))
    tokens = Tokens(q_, k_, v_, alpha, eta, theta.to(accumulate), delta, starts)
    norm = norm if spec.residual else None
    rows = None if norm is None else (_every_row(norm[0].to(accumulate), q), _every_row(norm[1].to(accumulate), q))
    if backend == "recurrent":
        y, after = recurrence(spec, tokens, rows, now, begin, chunk_size, read)
    else:
        clip, is_own = state_grad_clip, False
        if clip is not None and not isinstance(clip, StateGradClip):
            clip, is_own = StateGradClip(clip), True
        if by_kernels:
            y, after = kernel_form(spec, tokens, norm, rows, now, begin, chunk_size, read, recompute, clip)
        else:
            is_compiled = backend == "compiled"
            y, after = dual_form(spec, tokens, rows, now, begin, chunk_size, read, recompute, clip, is_compiled)
        if clip is not None and is_own:
            y, *ends = clip.results(y, *after.weights, *after.momentum)
            after = replace(after, weights=ends[: spec.depth], momentum=ends[spec.depth :])
    return y.to(q.dtype), after


def memory_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    alpha: Tensor | None = None,
    eta: Tensor | None = None,
    theta: Tensor,
    delta: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, MemoryState]:
    """One token of `neural_memory`, for decoding: q, k, v (B, H, D), gates (B, H) or (B, H, D) -> y (B, H, D), state.

    All other arguments are those of `neural_memory`.
    """

    def one(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.unsqueeze(1)

    y, state = neural_memory(
        q.unsqueeze(1),
        k.unsqueeze(1),
        v.unsqueeze(1),
        alpha=one(alpha),
        eta=one(eta),
        theta=theta.unsqueeze(1),
        delta=one(delta),
        backend="recurrent",
        **options,
    )
    return y.squeeze(1), state


def _every_row(x: Tensor, q: Tensor) -> Tensor:
    """LayerNorm's (D,) or (H, D) for every sequence and head, (B H, 1, D)."""
    batch, _, heads, dim = q.shape
    return x.expand(batch, heads, dim).reshape(batch * heads, 1, dim)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: MemorySpec,
    weights: list[Tensor],
    alpha: Tensor | None,
    eta: Tensor | None,
    theta: Tensor,
    delta: Tensor | None,
    norm: Norm | None,
    starts: Tensor | None,
    chunk_size: int,
    read: str,
    backend: str,
) -> None:
    if q.dim() != 4 or q.shape[1] < 1:
        raise ValueError(f"q has shape {tuple(q.shape)}; it must be (B, T, H, D) with T >= 1")
    if q.dtype not in (torch.float64, torch.float32, torch.bfloat16):
        raise ValueError(f"q has dtype {q.dtype}; use float64, float32 or bfloat16")
    batch, length, heads, dim = q.shape
    gate = (batch, length, heads, dim) if spec.channel_wise else (batch, length, heads)
    needed = {"alpha": spec.retention != "none", "eta": spec.momentum, "theta": True, "delta": spec.bias == "huber"}
    for name, x in (("alpha", alpha), ("eta", eta), ("theta", theta), ("delta", delta)):
        if x is None and needed[name]:
            raise ValueError(f"{name} is missing; this memory ({_why(spec, name)}) needs it, of shape {gate}")
    for name, x, shape in (
        ("k", k, (batch, length, heads, dim)),
        ("v", v, (batch, length, heads, dim)),
        ("alpha", alpha, gate),
        ("eta", eta, gate),
        ("theta", theta, gate),
        ("delta", delta, (batch, length, heads)),
    ):
        if x is None:
            continue
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(x.shape)}; q of shape {tuple(q.shape)} asks for {shape}")
        if not x.is_floating_point() or (name in "kv" and x.dtype != q.dtype):
            raise ValueError(f"{name} has dtype {x.dtype}; q has {q.dtype}, use the same")
    expected = [(heads, *shape) for shape in spec.shapes(dim)]
    if [tuple(w.shape) for w in weights] != expected:
        raise ValueError(f"weights have shapes {[tuple(w.shape) for w in weights]}; the spec asks for {expected}")
    if spec.residual and norm is None:
        raise ValueError("norm is missing; a memory with residual=True needs the pair (gain, bias)")
    for x in norm or ():
        if tuple(x.shape) not in ((dim,), (heads, dim)):
            raise ValueError(f"norm has a tensor of shape {tuple(x.shape)}; use ({dim},) or ({heads}, {dim})")
    if starts is not None and (tuple(starts.shape) != (batch, length) or starts.dtype != torch.bool):
        raise ValueError(
            f"starts has shape {tuple(starts.shape)} and dtype {starts.dtype}; it must be {(batch, length)} and bool"
        )
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is too small; use 1 or more")
    if chunk_size > 1 and not spec.has_chunked_form:
        raise ValueError(
            f"chunk_size={chunk_size} with anchor='token' needs depth=1, residual=False, momentum=False and bias 'l2' "
            "or 'dot'; use chunk_size=1 or anchor='chunk'"
        )
    if read not in READS:
        raise ValueError(f"read={read!r} is unknown; choose one of {', '.join(READS)}")
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of {', '.join(BACKENDS)}")


def _why(spec: MemorySpec, gate: str) -> str:
    reasons = {"alpha": f"retention={spec.retention!r}", "eta": "momentum=True", "delta": f"bias={spec.bias!r}"}
    return reasons.get(gate, "every memory")


def _check_state(name: str, state: MemoryState, spec: MemorySpec, q: Tensor, chunk_size: int) -> None:
    batch, _, heads, dim = q.shape
    expected = [(batch, heads, *shape) for shape in spec.shapes(dim)]
    is_inside = state.position != 0
    for part, tensors, needed in (
        ("weights", state.weights, True),
        ("momentum", state.momentum, spec.momentum),
        ("anchor", state.anchor, is_inside),
    ):
        found, asked = [tuple(x.shape) for x in tensors], expected if needed else []
        if found != asked:
            raise ValueError(f"{name} has {part} of shapes {found}; q and the spec ask for {asked}")
    accumulate = torch.promote_types(q.dtype, torch.float32)
    for x in (*state.weights, *state.momentum, *state.anchor):
        if x.dtype != accumulate:
            raise ValueError(f"{name} is of {x.dtype}; inputs of {q.dtype} need a state of {accumulate}")
    if not 0 <= state.position < chunk_size:
        raise ValueError(
            f"{name} is at token {state.position} of a chunk; chunk_size={chunk_size} is not the one it was made with"
        )
    if is_inside and (state.kept is None or tuple(state.kept.shape) != (batch, heads)):
        raise ValueError(
            f"{name} is inside a chunk but has no `kept` of shape {(batch, heads)}; pass it on as returned"
        )
    if name == "start" and is_inside:
        raise ValueError("start is inside a chunk; a document begins at a chunk's border")
