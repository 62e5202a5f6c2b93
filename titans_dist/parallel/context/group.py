"""This process's place in its context-parallel group."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.core import parallel_state
from torch import Tensor
from torch.distributed import ProcessGroup, get_global_rank


@dataclass(frozen=True)
class Context:
    """The processes that share each sequence, in the order of its tokens."""

    group: ProcessGroup
    rank: int
    size: int

    @property
    def before(self) -> int | None:
        """Global rank of the process with the tokens before; None for the first."""
        return self._global(self.rank - 1)

    @property
    def after(self) -> int | None:
        """Global rank of the process with the tokens after; None for the last."""
        return self._global(self.rank + 1)

    def share(self, x: Tensor) -> Tensor:
        """This process's tokens of whole rows, (B, T, ...) -> (B, T / size, ...)."""
        return x.chunk(self.size, 1)[self.rank]

    def _global(self, rank: int) -> int | None:
        return get_global_rank(self.group, rank) if 0 <= rank < self.size else None


def own_context() -> Context:
    """The context-parallel group of this process, of one process where the layout has none."""
    group = parallel_state.get_context_parallel_group()
    return Context(group, group.rank(), group.size())


def split_along_context(x: Tensor) -> Tensor:
    """This process's share of whole rows, (B, T, ...) -> (B, T / cp, ...)."""
    return own_context().share(x)
