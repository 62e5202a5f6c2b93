"""What crosses the borders between shares of a sequence, with its way back for the gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from torch import Tensor

from titans_dist.parallel.context.group import Context


def tokens_before(x: Tensor, count: int, context: Context) -> Tensor:
    """The last `count` tokens before this process's own (B, T, ...), in order; fewer where the sequence has fewer.

    The first process gets (B, 0, ...), and must still use it, so that its backward pass takes part in the exchange.
    """
    return _TokensBefore.apply(x, count, context)


class _TokensBefore(torch.autograd.Function):
    """One message from each process whose tokens are within reach; whole shares from all but the farthest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, context: Context) -> Tensor:
        own = x.shape[1]
        wanted = [min(own, count - hop * own) for hop in range(context.size - 1)]
        ctx.context, ctx.own, ctx.sizes = context, own, {hop: n for hop, n in enumerate(wanted, 1) if n > 0}
        sent = {context.rank + hop: x[:, own - n :] for hop, n in ctx.sizes.items()}
        found = _exchange(sent, {context.rank - hop: n for hop, n in ctx.sizes.items()}, x, context)
        return torch.cat([x[:, :0], *(found[peer] for peer in sorted(found))], 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        context = ctx.context
        sources = {context.rank - hop: n for hop, n in ctx.sizes.items() if hop <= context.rank}
        sent, first = {}, 0
        for peer in sorted(sources):
            sent[peer] = grad[:, first : first + sources[peer]]
            first += sources[peer]
        found = _exchange(sent, {context.rank + hop: n for hop, n in ctx.sizes.items()}, grad, context)
        total = grad.new_zeros(grad.shape[0], ctx.own, *grad.shape[2:])
        for part in found.values():
            total[:, ctx.own - part.shape[1] :] += part
        return total, None, None


def _exchange(sent: dict[int, Tensor], wanted: dict[int, int], like: Tensor, context: Context) -> dict[int, Tensor]:
    """Send tensors to ranks of the group and receive (B, n, ...) from others; ranks that do not exist are left out."""
    found, ops = {}, []
    for peer, x in sent.items():
        if 0 <= peer < context.size:
            ops.append(dist.P2POp(dist.isend, x.contiguous(), group=context.group, group_peer=peer))
    for peer, n in wanted.items():
        if 0 <= peer < context.size:
            found[peer] = like.new_empty(like.shape[0], n, *like.shape[2:])
            ops.append(dist.P2POp(dist.irecv, found[peer], group=context.group, group_peer=peer))
    for request in dist.batch_isend_irecv(ops) if ops else []:
        request.wait()
    return found


def gathered(x: Tensor, context: Context) -> Tensor:
    """All processes' tokens, (B, T, ...) -> (B, T size, ...)."""
    return gather_from_sequence_parallel_region(x.transpose(0, 1), group=context.group).transpose(0, 1)


def stacked(x: Tensor, context: Context) -> Tensor:
    """All processes' tensors, (...) -> (size, ...)."""
    return gather_from_sequence_parallel_region(x.unsqueeze(0), group=context.group)


def to_heads(x: Tensor, context: Context) -> Tensor:
    """Shares of sequences with all heads for whole sequences of a share of the heads: (B, T, H, C) -> (B, T size,
    H / size, C)."""
    x = x.unflatten(2, (context.size, -1)).permute(2, 0, 1, 3, 4)
    return all_to_all(context.group, x).permute(1, 0, 2, 3, 4).flatten(1, 2)


def to_tokens(x: Tensor, context: Context) -> Tensor:
    """The way back of `to_heads`: (B, T, H, C) -> (B, T / size, H size, C)."""
    x = x.unflatten(1, (context.size, -1)).transpose(0, 1)
    return all_to_all(context.group, x).permute(1, 2, 0, 3, 4).flatten(2, 3)
