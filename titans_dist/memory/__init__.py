"""The memory operator: definition, exact chunked form, state."""

from titans_dist.memory.operator import memory_step, neural_memory
from titans_dist.memory.spec import MemorySpec
from titans_dist.memory.state import MemoryState, initial_state

__all__ = ["MemorySpec", "MemoryState", "initial_state", "memory_step", "neural_memory"]
