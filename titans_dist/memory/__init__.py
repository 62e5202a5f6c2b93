"""The memory operator: definition, exact chunked form, state."""

from titans_dist.memory.operator import initial_state, neural_memory
from titans_dist.memory.spec import MemorySpec, MemoryState

__all__ = ["MemorySpec", "MemoryState", "initial_state", "neural_memory"]
