"""What the memory operator must compute and move, and how fast a GPU of the Hopper kind could do it.

Counts are per chunk of b tokens, one head of one sequence. A layer l has d_in x d_out weights and m slots: W and, with
momentum, S. P = sum d_in d_out over the layers, P' = P without the first layer, I = sum d_in, O = sum d_out. A product
of (b, d_in) with (d_in, d_out) is 2 b d_in d_out FLOP; summed over the layers 2 b P, below one "product".

Times are a model, not a measurement: every unit of one multiprocessor at its nominal rate. What is guessed says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

KIB = 1024


@dataclass(frozen=True)
class Card:
    """One GPU, and what the vendor's datasheet says of its memory."""

    name: str
    memory_bytes_per_s: float


H100, H200 = Card("H100", 3.35e12), Card("H200", 4.8e12)
MULTIPROCESSORS = 132
PEAK_FLOP_PER_S = 989e12
"""Dense bfloat16 by the datasheet."""
MATMUL_FLOP_PER_S = 790e12
"""What a bfloat16 product of 8192 x 8192 x 8192 reached on lent H100 and H200 machines (769 to 798)."""
CLOCK_HZ = 1.7e9
"""Guess: the clock under load."""
TENSOR_FLOP_PER_CLOCK = 4096
"""Of one multiprocessor, with products of 64 rows or more (wgmma)."""
SMALL_TILE = 0.6
"""Guess: share of that rate which products of fewer rows reach (mma.sync)."""
LANES, SPECIAL_PER_CLOCK = 128, 16
"""float32 operations and special functions (exp) per clock and multiprocessor."""
L2_BYTES, L2_BYTES_PER_S = 50e6, 5.5e12
REGISTER_BYTES, SHARED_BYTES = 256 * KIB, 227 * KIB
STATE_REGISTER_BYTES = REGISTER_BYTES // 2
"""What a resident state may take of the registers. With 128 KiB the ahead-of-time probe used 255 registers a thread."""
STAGE_CLOCKS = 250
"""Guess: from one product to the next that needs it (registers to shared memory, fence, barrier, latency)."""
EXCHANGE_CLOCKS = 1500
"""Guess: adding up b x d numbers over the programs of a cluster, once per chunk."""
ACTIVATION_OPERATIONS = 30
"""Guess: GELU by erf with its slope, per number; about 10 with tanh.approx, which differs from GELU by up to 1e-3."""
OTHER_OPERATIONS = 11
"""Guess: conversions, products with slopes and gates, per hidden number of the keys or of the queries."""
STATE_OPERATIONS = 5
"""Guess: per number of the state and pass: scale, add, convert, store."""
HIDDEN_BLOCK = 64


@dataclass(frozen=True)
class Memory:
    """The sizes that count: the (d_in, d_out) of each layer, tokens per chunk, slots (2 with momentum)."""

    layers: tuple[tuple[int, int], ...]
    chunk_size: int
    slots: int = 2

    @classmethod
    def of(cls, depth: int, head_dim: int, expansion: int, chunk_size: int, momentum: bool = True) -> Memory:
        """The MLP of `depth` layers whose hidden layers are `expansion` times as wide as a head."""
        widths = [head_dim, *[head_dim * expansion] * (depth - 1), head_dim]
        return cls(tuple(pairwise(widths)), chunk_size, 2 if momentum else 1)

    @property
    def head_dim(self) -> int:
        return self.layers[0][0]

    @property
    def hidden(self) -> int:
        """Width of the hidden layer; 0 for a matrix."""
        return self.layers[0][1] if len(self.layers) > 1 else 0

    @property
    def weights(self) -> int:
        """P."""
        return sum(d_in * d_out for d_in, d_out in self.layers)

    @property
    def later_weights(self) -> int:
        """P', of the layers through which the inner gradient goes back."""
        return self.weights - self.layers[0][0] * self.layers[0][1]

    @property
    def earlier_weights(self) -> int:
        """Of all layers but the last."""
        return self.weights - self.layers[-1][0] * self.layers[-1][1]

    @property
    def widths(self) -> tuple[int, int]:
        """I and O."""
        return sum(d_in for d_in, _ in self.layers), sum(d_out for _, d_out in self.layers)

    @property
    def state_bytes(self) -> int:
        """W and S in float32."""
        return 4 * self.slots * self.weights

    def padded(self) -> Memory:
        """As Triton holds it: head dimension a power of two, hidden columns in whole blocks."""
        dim = 1 << (self.head_dim - 1).bit_length()
        hidden = -(-self.hidden // HIDDEN_BLOCK) * HIDDEN_BLOCK
        return replace(self, layers=((dim, hidden), (hidden, dim)) if hidden else ((dim, dim),))

    def share(self, programs: int) -> Memory:
        """What one of `programs` holds of a memory of two layers that is split by hidden columns."""
        dim, hidden = self.head_dim, self.hidden // programs
        return replace(self, layers=((dim, hidden), (hidden, dim)))


def forward_flops(memory: Memory) -> int:
    """FLOP of a chunk's writes and reads.

    Keys through the layers 1 product, the inner gradient back through all but the first P', the outer products added to
    m slots m, queries through m slots m: 2 b ((1 + 2 m) P + P'). Inside the chunk, scores x a^T and their product with
    the deltas: 2 b^2 (I + O), counted in full although half lies above the diagonal.
    With momentum and two layers: 11 b P + 2 b^2 (I + O).
    """
    b, (inputs, outputs) = memory.chunk_size, memory.widths
    return 2 * b * ((1 + 2 * memory.slots) * memory.weights + memory.later_weights) + 2 * b * b * (inputs + outputs)


def backward_flops(memory: Memory) -> int:
    """FLOP of the gradients of all inputs, from what the forward pass has left; nothing is worked out again.

    From the slots after the chunk to its deltas and inputs 2 m products, from the reads to the queries and slots 2 m.
    Through the inner gradient P' for what comes to a delta from the one below, P for the inputs, and P + P' for the
    weights, which it used twice. Together 2 b (4 m P + 2 P + 2 P'). The two products inside the chunk have two
    gradients each: 4 b^2 (I + O).
    With momentum and two layers: 22 b P + 4 b^2 (I + O).
    """
    b, (inputs, outputs) = memory.chunk_size, memory.widths
    products = (4 * memory.slots + 2) * memory.weights + 2 * memory.later_weights
    return 2 * b * products + 4 * b * b * (inputs + outputs)


def forward_bytes(memory: Memory) -> int:
    """Fewest bytes of a chunk's forward pass: q, k, v in and y out in bfloat16, three gates in float32."""
    return memory.chunk_size * (8 * memory.head_dim + 12)


def backward_bytes(memory: Memory) -> int:
    """Fewest bytes of its backward pass: q, k, v, the gradient of y and the gates in, five kinds of gradients out."""
    return memory.chunk_size * (14 * memory.head_dim + 24)


@dataclass(frozen=True)
class Pass:
    """What one kernel does with a chunk of one head."""

    name: str
    flops: float = 0
    l2_bytes: float = 0
    """Of the state, between chunks; device memory's where 132 states do not fit into L2."""
    memory_bytes: float = 0
    operations: float = 0
    """In float32."""
    special: float = 0
    """exp."""
    stages: int = 0
    """Products that wait for each other, where chunks come one after another; else other programs fill the time."""
    waits: float = 0.0
    """Further clocks per chunk in which nothing else can be done."""

    def clocks(self, card: Card, memory: Memory) -> dict[str, float]:
        """Clocks of one multiprocessor for each unit."""
        per_clock = MULTIPROCESSORS * CLOCK_HZ
        rate = TENSOR_FLOP_PER_CLOCK * (1.0 if memory.chunk_size >= 64 else SMALL_TILE)
        is_cached = MULTIPROCESSORS * memory.state_bytes <= L2_BYTES
        memory_bytes = self.memory_bytes + (0 if is_cached else self.l2_bytes)
        return {
            "tensor": self.flops / rate,
            "lanes": self.operations / LANES + self.special / SPECIAL_PER_CLOCK,
            "L2": self.l2_bytes / (L2_BYTES_PER_S / per_clock),
            "HBM": memory_bytes / (card.memory_bytes_per_s / per_clock),
            "latency": self.stages * STAGE_CLOCKS + self.waits,
        }


@dataclass(frozen=True)
class Cost:
    """A forward and backward pass by some plan: clocks of one multiprocessor per chunk and head."""

    overlapped: float
    """Every pass as long as its busiest unit."""
    one_by_one: float
    """Every pass as long as all its units together."""
    bound: str
    """The busiest unit of the longest pass."""

    def share(self, flops: float) -> tuple[float, float]:
        """`flops` of a chunk as shares of the measured matrix product rate, one by one and overlapped."""
        rate = MATMUL_FLOP_PER_S / MULTIPROCESSORS / CLOCK_HZ
        return flops / self.one_by_one / rate, flops / self.overlapped / rate


def cost(passes: list[Pass], card: Card, memory: Memory, programs: int = 1) -> Cost:
    """Of `programs` that work on one head together, each of them doing `passes` with its share, `memory`."""
    clocks = [one.clocks(card, memory) for one in passes]
    longest = max(clocks, key=lambda units: max(units.values()))
    return Cost(
        programs * sum(max(units.values()) for units in clocks),
        programs * sum(sum(units.values()) for units in clocks),
        max(longest, key=lambda unit: longest[unit]),
    )


def resident_shared_bytes(memory: Memory) -> int:
    """Shared memory of a program that keeps the state in registers and writes and reads one chunk after another.

    W and S in bfloat16 as operands; q, k, v and the gates' b x b twice, one pair being loaded; a, d of the keys, x of
    the queries; the last deltas; scores. Chosen so that it is what two kernels compiled ahead of time need: 136 and 192
    KiB for heads of 64, expansion 1 and 2, chunks of 64. A third, of expansion 1 and chunks of 128, needed 256: this
    says 288, and neither fits.
    """
    b, dim, hidden = memory.chunk_size, memory.head_dim, memory.hidden
    operands = 2 * memory.slots * memory.weights
    return operands + 2 * (6 * b * dim + 2 * b * b) + 6 * b * hidden + 2 * b * dim + 2 * b * b


def is_resident(memory: Memory) -> bool:
    """Whether a program can hold the state and a chunk on one multiprocessor."""
    return memory.state_bytes <= STATE_REGISTER_BYTES and resident_shared_bytes(memory) <= SHARED_BYTES


def programs_needed(memory: Memory) -> int | None:
    """Programs of a cluster (8 at most) that hold the state together, split by hidden columns; None: no number does."""
    for programs in (2, 4, 8):
        fits = memory.hidden % (programs * HIDDEN_BLOCK) == 0 and is_resident(memory.share(programs))
        if fits:
            return programs
    return None


def resident_passes(memory: Memory, exchange: float = 0.0) -> list[Pass]:
    """Plans A and B: one kernel for writes and reads; backward a parallel pass over the reads, then a reverse one.

    The state each chunk began with goes to device memory in bfloat16, for the backward pass.
    """
    b, dim, state = memory.chunk_size, memory.head_dim, memory.slots * memory.weights
    forward = Pass(
        "writes and reads",
        flops=forward_flops(memory),
        memory_bytes=2 * state + 10 * b * dim + 4 * b * b,
        operations=_lanes(memory, 2, 2) + STATE_OPERATIONS * state,
        special=2 * b * memory.hidden,
        stages=8,
        waits=exchange,
    )
    reverse = replace(_reverse_writes(memory), stages=12, waits=exchange)
    return [_gates(memory), forward, *_reads_backward(memory), reverse, _gates(memory, is_backward=True)]


def cached_passes(memory: Memory) -> list[Pass]:
    """Plan C, as our Triton kernels have it: state in L2 or device memory, hidden columns in blocks.

    Writes first, which leave the state every chunk began with; then all reads at once. A write goes over the hidden
    blocks twice, because the second layer's output needs all of them: the first layer is worked out twice. The backward
    pass repeats the writes instead of keeping their states, and stores the hidden numbers that two kernels need.
    """
    b, dim, state = memory.chunk_size, memory.head_dim, memory.slots * memory.weights
    write = _cached_writes(memory)
    read = Pass(
        "reads",
        flops=2 * b * (_recomputed(memory) + state) + 2 * b * b * sum(memory.widths),
        memory_bytes=2 * state + 10 * b * dim + 4 * b * b,
        operations=_lanes(memory, 2, 2),
        special=2 * b * memory.hidden,
    )
    again = replace(write, name="writes again")
    backward = [*_reads_backward(memory), _cached_reverse(memory), _gates(memory, is_backward=True)]
    return [_gates(memory), write, read, again, *backward]


def merged_passes(memory: Memory) -> list[Pass]:
    """Plan C with the reads beside the writes, forward and backward: no chunk's gradient of the state is stored.

    Nor are hidden numbers. Only for so many sequences and heads that one program for each fills the GPU.
    """
    b, dim, state = memory.chunk_size, memory.head_dim, memory.slots * memory.weights
    write, reverse, of_reads = _cached_writes(memory), _cached_reverse(memory), _reads_backward(memory)
    again = _recomputed(memory) + memory.weights - memory.earlier_weights
    forward = replace(
        write,
        name="writes and reads",
        flops=write.flops + 2 * b * state + 2 * b * b * sum(memory.widths),
        memory_bytes=10 * b * dim + 4 * b * b,
        operations=_lanes(memory, 3, 3) + STATE_OPERATIONS * state,
        special=3 * b * memory.hidden,
        stages=6 * _blocks(memory) + 2,
    )
    backward = replace(
        reverse,
        name="reverse writes and reads",
        flops=reverse.flops + sum(one.flops for one in of_reads) + 2 * b * again,
        memory_bytes=2 * state + 14 * b * dim + 8 * b * b,
        operations=_lanes(memory, 4, 6) + (STATE_OPERATIONS + 3) * state,
        special=4 * b * memory.hidden,
        stages=10 * _blocks(memory) + 4,
    )
    write_again = replace(write, name="writes again")
    return [_gates(memory), forward, write_again, backward, _gates(memory, is_backward=True)]


def _blocks(memory: Memory) -> int:
    return max(1, memory.hidden // HIDDEN_BLOCK)


def _cached_writes(memory: Memory) -> Pass:
    """W once for the output; then W and S in float32 in and out. Leaves the chunk's first state in bfloat16."""
    b, state = memory.chunk_size, memory.slots * memory.weights
    return Pass(
        "writes",
        flops=2 * b * (memory.weights + _recomputed(memory) + state),
        l2_bytes=4 * memory.weights + 8 * state,
        memory_bytes=2 * state + 10 * b * memory.head_dim,
        operations=_lanes(memory, 2, 1) + STATE_OPERATIONS * state,
        special=2 * b * memory.hidden,
        stages=4 * _blocks(memory) + 2,
    )


def _reverse_writes(memory: Memory) -> Pass:
    """From the last chunk to the first: the state's adjoint, the gradients of k, v and the gates.

    In bfloat16: the chunk's first state, what the reads add to its adjoint, and five kinds of hidden numbers.
    """
    b, dim, state = memory.chunk_size, memory.head_dim, memory.slots * memory.weights
    return Pass(
        "reverse writes",
        flops=2 * b * (2 * state + 2 * memory.weights + 2 * memory.later_weights),
        memory_bytes=4 * state + 10 * b * memory.hidden + 30 * b * dim,
        operations=_lanes(memory, 2, 4) + (STATE_OPERATIONS + 3) * state,
        special=2 * b * memory.hidden,
    )


def _cached_reverse(memory: Memory) -> Pass:
    """The same with the adjoint in L2, float32: read, then read and written."""
    state = memory.slots * memory.weights
    return replace(_reverse_writes(memory), l2_bytes=12 * state, stages=6 * _blocks(memory) + 4)


def _recomputed(memory: Memory) -> int:
    """Weights of the products that give the hidden inputs and deltas once more: z of all layers but the last, d a."""
    return memory.earlier_weights + memory.later_weights


def _reads_backward(memory: Memory) -> list[Pass]:
    """Gradients of q, of the gates' matrices and, per chunk, of the state, the inputs and the deltas.

    Two kernels: back through the reads to the queries; then to all that was read. Between them four hidden numbers.
    """
    b, dim, hidden = memory.chunk_size, memory.head_dim, memory.hidden
    state = memory.slots * memory.weights
    queries = Pass(
        "queries backward",
        flops=2 * b * (_recomputed(memory) + memory.slots * memory.earlier_weights + state)
        + 2 * b * b * (sum(memory.widths) if hidden else 0),
        memory_bytes=2 * state + 16 * b * dim + 8 * b * hidden + 4 * b * b,
        operations=_lanes(memory, 2, 3),
        special=2 * b * hidden,
    )
    reads = Pass(
        "reads backward",
        flops=2 * b * state + 2 * b * b * (5 * dim + (2 * dim + 4 * hidden if hidden else 0)),
        memory_bytes=2 * state + 22 * b * dim + 12 * b * hidden + 8 * b * b,
        operations=_lanes(memory, 1, 3),
        special=b * hidden,
    )
    return [queries, reads]


def _gates(memory: Memory, is_backward: bool = False) -> Pass:
    """The recurrence of G row by row; no matrix products."""
    b = memory.chunk_size
    name, each = ("gates backward", 12) if is_backward else ("gates", 6)
    return Pass(name, memory_bytes=4 * b * b + 24 * b, operations=each * b * b)


def _lanes(memory: Memory, activations: int, others: int) -> float:
    """float32 operations but for those on the state: `activations` and `others` times per hidden number."""
    b = memory.chunk_size
    per_hidden = activations * ACTIVATION_OPERATIONS + others * OTHER_OPERATIONS
    return b * memory.hidden * per_hidden + 20 * b * memory.head_dim + 4 * b * b * len(memory.layers)
