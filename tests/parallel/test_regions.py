"""The borders of a tensor-parallel region sum what is not contiguous too, which megatron-core's own do not."""

from __future__ import annotations

import torch

from tests.distributed import run_distributed


def test_sums_do_not_depend_on_the_layout_of_the_tensor_in_memory() -> None:
    def sums(rank: int, world: int) -> tuple[list[float], list[float]]:
        from titans_dist.config import ParallelConfig
        from titans_dist.parallel import cpu
        from titans_dist.parallel.processes import make_groups
        from titans_dist.parallel.regions import enter, total

        cpu.install()
        make_groups(ParallelConfig(tensor=world))
        forward, backward = [], []
        for turned in (False, True):
            mine = torch.full((3, 2), float(rank + 1))
            forward.append(total(mine.mT if turned else mine).sum().item())
            x = torch.ones(3, 2, requires_grad=True)
            weight = torch.full((2, 3) if turned else (3, 2), float(rank + 1))
            y = enter(x)
            # The gradient of a transposed use is a transposed tensor.
            ((y.mT if turned else y) * weight).sum().backward()
            assert x.grad is not None
            backward.append(x.grad.sum().item())
        return forward, backward

    assert run_distributed(sums, 2) == [([18.0, 18.0], [18.0, 18.0])] * 2
