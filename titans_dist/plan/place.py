"""One process of a layout, and the sizes that most of what it holds and sends is made of."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from titans_dist.config import Config, MemoryConfig
from titans_dist.config.layout import parts
from titans_dist.config.sizes import memory_weights

FLOAT32 = 4
GROUP_TOKENS = 512
"""As in `titans_dist.memory.chunked`."""
LARGEST_HEAD, LARGEST_TILE = 128, {2: 64 * 128, 4: 64 * 64}
WORKSPACE_BYTES, HIDDEN_KINDS = 2**30, 6
"""As in `titans_kernels`."""


@dataclass(frozen=True)
class Place:
    """One process of the layout, and the sizes that most messages are made of."""

    config: Config
    data_size: int
    stage: int
    share: int

    @cached_property
    def rows(self) -> int:
        """Sequences of a micro-batch."""
        return self.config.training.micro_batch_size

    @cached_property
    def micro_batches(self) -> int:
        return self.config.training.global_batch_size // (self.rows * self.data_size)

    @cached_property
    def tokens(self) -> int:
        """Of one sequence."""
        return self.config.data.sequence_length // self.config.parallel.context

    @cached_property
    def width(self) -> int:
        """Bytes of one number of the residual stream."""
        return 2 if self.config.training.precision == "bfloat16" else FLOAT32

    @cached_property
    def residual(self) -> int:
        """Bytes of the residual stream of this process's tokens, before sequence parallelism splits it."""
        return self.rows * self.tokens * self.config.model.hidden_size * self.width

    @cached_property
    def hidden(self) -> int:
        """Channels of this process's heads."""
        return self.config.model.hidden_size // self.config.parallel.tensor

    @cached_property
    def heads(self) -> int:
        return self.config.model.num_heads // self.config.parallel.tensor

    @cached_property
    def is_sequence_parallel(self) -> bool:
        return self.config.parallel.sequence and self.config.parallel.tensor > 1

    @cached_property
    def own(self) -> list[tuple[int, bool, bool]]:
        """(blocks, whether it is the first, and the last) of each part of the model that it holds."""
        every = parts(self.config.parallel, self.config.model.num_layers)
        numbers = range(self.stage, len(every), self.config.parallel.pipeline)
        return [(len(every[n]), n == 0, n == len(every) - 1) for n in numbers]

    @cached_property
    def positions(self) -> int:
        """Tokens of a micro-batch that it works on."""
        return self.rows * self.tokens

    @cached_property
    def full(self) -> int:
        """Bytes of the residual stream inside a region, where it is whole."""
        return self.residual

    @cached_property
    def sequence(self) -> int:
        """Bytes of the residual stream between two regions."""
        return self.residual // (self.config.parallel.tensor if self.is_sequence_parallel else 1)

    @cached_property
    def mine(self) -> int:
        """Bytes of the channels of its heads, of all its tokens."""
        return self.positions * self.hidden * self.width

    @cached_property
    def mine32(self) -> int:
        """The same in float32."""
        return self.positions * self.hidden * FLOAT32

    @cached_property
    def per_head(self) -> int:
        """Bytes of one float32 number for each token and head."""
        return self.positions * self.heads * FLOAT32

    @cached_property
    def is_gpu(self) -> bool:
        return self.config.training.device != "cpu"

    @cached_property
    def has_layer_kernels(self) -> bool:
        """Whether the convolutions, norms and gates around the memory go by kernels."""
        return self.is_gpu and self.config.model.memory.backend in ("auto", "triton")

    @cached_property
    def group_tokens(self) -> int:
        """Tokens whose chunks are worked on together."""
        chunk = self.config.model.memory.chunk_size
        return max(1, GROUP_TOKENS // chunk) * chunk

    @cached_property
    def state(self) -> int:
        """Bytes of the memory, W and S, of all sequences of a micro-batch and the heads of this process."""
        model = self.config.model
        slots = 2 if model.memory.choice("momentum") else 1
        return self.rows * self.heads * slots * memory_weights(model.memory, model.head_dim) * FLOAT32

    def norm(self, size: int) -> int:
        """Bytes that an RMSNorm keeps beside its input and output, both of `size` bytes."""
        if self.is_gpu:
            return 0
        # On CPUs step by step; of bfloat16 twice in float32, and then the input itself is not needed.
        return size if self.width == FLOAT32 else 3 * size


def padded(size: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is no less than `size`."""
    return -(-size // multiple) * multiple


def no_memory_kernels(memory: MemoryConfig, head_dim: int, width: int) -> str | None:
    """Why the memory has no Triton kernels for numbers of `width` bytes, in words, or None; see `titans_kernels`."""
    choice = memory.choice
    if memory.backend in ("torch", "compiled"):
        return f"model.memory.backend={memory.backend}"
    if choice("retention") not in ("none", "l2"):
        return f"retention={choice('retention')} has none"
    if choice("bias") not in ("l2", "dot", "huber"):
        return f"bias={choice('bias')} has none"
    if choice("anchor") == "token" and choice("bias") != "dot":
        return "anchor=token has none"
    if memory.channel_wise:
        return "channel_wise=true has none"
    if choice("depth") > 2:
        return f"depth={choice('depth')} has none, up to 2 have"
    if head_dim > LARGEST_HEAD:
        return f"heads of {head_dim} dimensions have none, up to {LARGEST_HEAD} have"
    largest = LARGEST_TILE[width] // (64 if head_dim <= 64 else 128)
    if memory.chunk_size > largest:
        return f"chunk_size={memory.chunk_size} has none, up to {largest} have"
    return None
