"""The wave round a ring: who waits how long, how much is sent, and what it computes, with real processes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_distributed
from titans_dist.config import ParallelConfig
from titans_dist.config.layout import bubble


def running_sums(rank: int, world: int, groups: int) -> dict[str, Any]:
    """y_t = w s_t with s_t = c s_(t-1) + x_t, for `groups` rows of 4 tokens on each process."""
    from unittest import mock

    import torch.distributed as dist

    from titans_dist.parallel import cpu
    from titans_dist.parallel.context import ring
    from titans_dist.parallel.context.group import own_context
    from titans_dist.parallel.processes import make_groups

    cpu.install()
    make_groups(ParallelConfig(context=world))
    x, first, weight = data(world, groups)
    context = own_context()
    own = context.share(x.detach()).requires_grad_()

    def cell(
        inputs: list[Tensor], state: list[Tensor], shared: list[Tensor], clip: object
    ) -> tuple[Tensor, list[Tensor]]:
        (s,), outputs = state, []
        for token in inputs[0].unbind(1):
            s = 0.5 * s + token
            outputs.append(shared[0] * s)
        return torch.stack(outputs, 1)[..., None, None], [s]

    waves = [ring.Group([own[g : g + 1]], [first[g : g + 1]]) for g in range(groups)]
    ring.turns = []
    with mock.patch.object(ring.dist, "isend", wraps=dist.isend) as sent:
        outputs, ends = ring.wavefront(cell, waves, [weight], None, context)
        y = torch.cat(outputs)
        (y.flatten() * torch.arange(1.0, 1 + y.numel())).sum().backward()
    turns: list[Any] = [None] * world
    dist.all_gather_object(turns, ring.turns)
    return {
        "y": y.detach(),
        "end": torch.cat([end[0] for end in ends]),
        "grads": (own.grad, first.grad, weight.grad),
        "waiting": [ring.waiting(wave) for wave in ring.waves(turns)],
        "sent": sent.call_count,
    }


def data(world: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, 4 * world, generator=generator)
    first = torch.randn(groups, generator=generator)
    return x.requires_grad_(), first.requires_grad_(), torch.tensor(1.5, requires_grad=True)


@pytest.mark.parametrize(("world", "groups"), [(2, 1), (2, 4), (3, 2), (4, 3)])
def test_the_wave_computes_one_sequence_and_waits_as_its_formula_says(world: int, groups: int) -> None:
    x, first, weight = data(world, groups)
    states, s = [], first
    for token in x.unbind(1):
        s = 0.5 * s + token
        states.append(s)
    y = weight * torch.stack(states, 1)
    factors = [torch.arange(1.0, 1 + 4 * groups).view(groups, 4)] * world  # each process's loss is its own
    (y * torch.cat(factors, 1)).sum().backward()
    assert x.grad is not None

    ranks = run_distributed(running_sums, world, groups)
    torch.testing.assert_close(torch.cat([rank["y"][..., 0, 0] for rank in ranks], 1), y.detach())
    torch.testing.assert_close(ranks[-1]["end"], s.detach())
    torch.testing.assert_close(torch.cat([rank["grads"][0] for rank in ranks], 1), x.grad)
    # What a sequence begins with has its gradient where it begins, and zeros elsewhere.
    torch.testing.assert_close(ranks[0]["grads"][1], first.grad)
    assert all(not rank["grads"][1].any() for rank in ranks[1:])
    torch.testing.assert_close(sum(rank["grads"][2] for rank in ranks), weight.grad)
    for number, rank in enumerate(ranks):
        assert rank["waiting"] == pytest.approx([bubble(world, groups)] * 2)
        # One message for each border and group: forward to the next process, backward to the one before.
        assert rank["sent"] == groups * ((number < world - 1) + (number > 0))
