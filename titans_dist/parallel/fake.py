"""What a rank of a layout needs, measured without its machines: the training step itself on tensors without numbers.

The engine that trains is built for one rank and makes a step under torch's FakeTensorMode, with torch's fake process
group in the place of all other ranks: the same stage, buckets, optimizer, schedule and collectives, and no formula.
What cannot be as in training:

* A number that Python asks a tensor for (the loss, whether a document begins) is 1. So in packed rows a document
  begins in every group of chunks, which is the most that can happen.
* The norm of the gradients is 1 as well: megatron-core reads it from lists of tensors, which fakes cannot be.
* The memory is in its torch form; Triton's kernels are not run on fakes. On GPUs they keep less.
* The tensors are fakes of the CPU. Attention is torch's fused kernel there, which keeps what those on GPUs keep; what
  an allocator rounds up is not seen.
* Of what ranks say to each other at the start, every other one says the same as this one.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import lcm
from multiprocessing import get_context
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from titans_dist.config import Config, ConfigError
from titans_dist.config.layout import check_world, parts, world_size
from titans_dist.memory.chunked import group_chunks
from titans_dist.parallel.communication import Communication, Sent, count_communication
from titans_dist.parallel.engine import Engine
from titans_dist.parallel.fake_processes import FakeTensors, fake_processes
from titans_dist.parallel.live import Live, states_marked
from titans_dist.parallel.optimizer_state import make_missing_state
from titans_dist.parallel.stage import MicroBatch
from titans_dist.plan.memory import Memory
from titans_dist.plan.truth import Ran, in_torch


def _attention(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **_: Any) -> int:
    """Scores and their product with the values, (B, H, T, D) each; of causal attention what is seen."""
    rows, heads, queries, dim = q.shape
    seen = queries * (queries + 1) // 2 if is_causal else queries * k.shape[2]
    return 4 * rows * heads * seen * dim


def _attention_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any, **_: Any) -> int:
    """Two gradients of each product, and the scores once more."""
    _out, _logsumexp, dropout_p, is_causal = others[:4]
    return _attention(q, k, v, dropout_p, is_causal) * 5 // 2


_aten = torch.ops.aten
# torch counts those of GPUs alone.
_FLOPS: dict[Any, Any] = {
    **flop_registry,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


@dataclass(frozen=True)
class Measured:
    """What one rank has and does in one step of `micro_batches` micro-batches."""

    memory: Memory
    """What is kept. The activations: all that is there when the last forward pass in flight ends, or reaches the head,
    but for the states of memories. The logits: the most there is beyond that until the head's backward pass is done."""
    others: int
    """Bytes of what else is there between two steps: constants of layers, flags."""
    peak: int
    """The most bytes that are there at once, temporary ones as well."""
    parameters: int
    """Elements of this rank's parameters, without padding."""
    flops: float
    """Of the products in the forward and backward pass of one micro-batch, with what is recomputed."""
    micro_batches: int
    """As many as are in flight on this stage."""
    sent: Communication
    """What this rank sends."""

    @property
    def ran(self) -> Ran:
        """What formulas are compared with."""
        sent = {key: (one.calls, one.size_bytes) for key, one in self.sent.counts.items()}
        return Ran(self.memory, self.peak - self.others, self.flops, self.micro_batches, sent)


def measured(config: Config, rank: int, sampled: bool = True) -> Measured:
    """Build and run one rank of the layout of `config`; in a process without process groups, of which it makes fakes.

    sampled: of micro-batches in flight one is run, and of blocks and of long sequences without full attention one and
    two (of tokens: two and three whole groups of chunks, windows and segments), and what all need follows in a straight
    line. Parameters, gradients, optimizer and what is sent once a step are always of the whole.
    Raises ConfigError for training.engine=deepspeed, and for a rank that the layout does not have.
    """
    world = world_size(config.parallel)
    if config.training.engine != "megatron":
        raise ConfigError("training.engine=deepspeed is not measured on fake tensors; use training.engine=megatron")
    if not 0 <= rank < world:
        raise ConfigError(f"rank {rank} is none of the layout's {world} processes; use 0 to {world - 1}")
    check_world(config, world)
    config = in_torch(config)
    with fake_processes(config.parallel, rank, world), FakeTensors(allow_non_fake_inputs=True):
        passes = _in_lines(config, _axes(config) if sampled else [], sampled)
        with _built(config) as engine:
            return engine.with_passes(passes, _in_flight(config))


def measured_apart(config: Config, rank: int, sampled: bool = True) -> Measured:
    """`measured` in a fresh process, which leaves this one without megatron-core's global state."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(measured, config, rank, sampled).result()


# One engine


@dataclass
class _Built:
    """A real engine of fake tensors, with its optimizer's state."""

    engine: Engine
    live: Live
    memory: Memory
    """Between two steps."""
    others: int

    def passes(self, config: Config) -> Numbers:
        """One step, but for what is done once however many micro-batches there are."""
        batches = _batches(config)
        watch = _Watch(self.live, self.engine)
        self.live.restart()
        with count_communication() as sent, _Flops() as flops:
            self.engine.step(batches)
        grown = self.live.peak - self.others - self.memory.total()
        found: Numbers = {**watch.found(), "grown": grown, "flops": flops.total}
        once = self.once()
        for key, all_ in sent.counts.items():
            last = once.counts.get(key, Sent())
            found["calls", key] = all_.calls - last.calls
            found["bytes", key] = all_.size_bytes - last.size_bytes
        return found

    def once(self) -> Communication:
        """Sum the gradients over processes, update, and hand parameters on: what is done once a step."""
        for module in self.engine.modules:
            module.zero_grad_buffer()
        with count_communication() as sent:
            for module in self.engine.modules:
                module.start_grad_sync()
            finalize_model_grads(list(self.engine.modules))
            self.engine._update(self.engine._grad_norm())
        return sent

    def with_passes(self, passes: Numbers, micro_batches: int) -> Measured:
        """The whole step, whose passes need so much."""
        self.live.restart()
        sent = self.once()
        kept = {name: round(passes[name]) for name in ("activations", "states", "logits")}
        memory = dataclasses.replace(self.memory, **kept)
        peak = max(self.live.peak, self.others + max(memory.total(), self.memory.total() + round(passes["grown"])))
        for key in [key for what, key in filter(_is_sent, passes) if what == "calls"]:
            last = sent.counts.get(key, Sent())
            calls, size = round(passes["calls", key]), passes["bytes", key]
            sent.counts[key] = Sent(last.calls + calls, last.size_bytes + size)
        elements = sum(x.numel() for stage in self.engine.stages for x in stage.parameters())
        flops = passes["flops"] / micro_batches
        return Measured(memory, self.others, peak, elements, flops, micro_batches, sent)


@contextmanager
def _built(config: Config) -> Iterator[_Built]:
    with Live() as live, states_marked(live):
        engine = Engine(config, torch.device("cpu"))
        gc.collect()  # of what was made on the way
        for part in engine.optimizer.chained_optimizers:
            make_missing_state(part)
        # Read from lists of tensors; see the module's text.
        with mock.patch.object(engine.optimizer, "get_grad_norm", lambda: 1.0):
            parameters = [x for stage in engine.stages for x in stage.parameters()]
            gradients = [x.main_grad for x in parameters]
            adams = [part.optimizer for part in engine.optimizer.chained_optimizers]
            state = [x for adam in adams for values in adam.state.values() for x in values.values()]
            mains = [x for adam in adams for group in adam.param_groups for x in group["params"]]
            own = live.of(parameters)
            optimizer = live.of([*parameters, *state, *mains]) - own  # in float32 the main weights are the parameters
            memory = Memory(own, live.of(gradients), optimizer, 0, 0, 0)
            yield _Built(engine, live, memory, live.now - memory.total())


class _Watch:
    """Looks at what is kept whenever a forward pass has ended, or has reached the head."""

    def __init__(self, live: Live, engine: Engine) -> None:
        self.live, self.before = live, live.now
        self.kept = self.states = self.logits = 0
        self._at_head: int | None = None
        live.settle()
        forward = engine._forward
        for stage in engine.stages:
            if stage.post_process:
                stage.model.norm.register_forward_pre_hook(self._reach_head)

        def watched(batches: Any, module: nn.Module) -> Any:
            result = forward(batches, module)
            if self._at_head is None:
                self._look()
            return result

        engine._forward = watched  # type: ignore[method-assign]

    def found(self) -> dict[str, int]:
        """Of `Memory`, what is not there between two steps."""
        return {"activations": self.kept - self.states, "states": self.states, "logits": self.logits}

    def _look(self) -> None:
        if self.live.now - self.before > self.kept:
            self.kept, self.states = self.live.now - self.before, self.live.states()

    def _reach_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._look()
        self._at_head, self._peak = self.live.now, self.live.peak
        self.live.restart()
        args[0].register_hook(self._leave_head)

    def _leave_head(self, grad: Tensor) -> None:
        assert self._at_head is not None
        self.logits = max(self.logits, self.live.peak - self._at_head)
        self.live.peak, self._at_head = max(self.live.peak, self._peak), None


def _in_flight(config: Config) -> int:
    """Micro-batches that are in flight on this stage with 1F1B; twice as many as stages are enough if interleaved."""
    training, parallel = config.training, config.parallel
    stage = parallel_state.get_pipeline_model_parallel_rank()
    most = parallel.pipeline - stage if parallel.virtual == 1 else 2 * parallel.pipeline
    copies = parallel_state.get_data_parallel_world_size()
    return int(min(most, training.global_batch_size // training.micro_batch_size // copies))


def _batches(config: Config) -> list[MicroBatch]:
    rows, length = config.training.micro_batch_size, config.data.sequence_length
    batch = {"tokens": torch.zeros(rows, length + 1, dtype=torch.int64)}
    if config.data.documents == "packed":
        batch["starts"] = torch.zeros(rows, length, dtype=torch.bool)
    return [batch] * _in_flight(config)


class _Flops(TorchDispatchMode):
    """torch's FlopCounterMode without its look for what a call decomposes into: autograd's calls are single already."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        count = _FLOPS.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **kwargs, out_val=result)
        return result


# Straight lines

Numbers = dict[Any, float]
"""What forward and backward passes need, by its name; of what is sent by ("calls" or "bytes", (kind, operation))."""
_Axis = tuple[Callable[[Config, int], Config], float]
"""The configuration with 1, 2, ... of something, and how many there really are."""


def _in_lines(config: Config, axes: list[_Axis], sampled: bool) -> Numbers:
    """Passes with the number on every axis, of which one and two are run."""
    if not axes:
        in_flight = _in_flight(config)
        if not sampled or config.parallel.virtual > 1:  # interleaved, parts of a stage differ
            with _built(config) as engine:
                return engine.passes(config)
        with _built(_with_one_micro_batch(config)) as engine:
            return _times(engine.passes(_with_one_micro_batch(config)), in_flight)
    (change, count), *others = axes
    one, two = (_in_lines(change(config, number), others, sampled) for number in (1, 2))
    return {key: one.get(key, 0) + (count - 1) * (two.get(key, 0) - one.get(key, 0)) for key in one | two}


def _axes(config: Config) -> list[_Axis]:
    """What there are more of than are worth running."""
    axes: list[_Axis] = []
    parallel = config.parallel
    stage = parallel_state.get_pipeline_model_parallel_rank()
    own = [len(part) for part in parts(parallel, config.model.num_layers)[stage :: parallel.pipeline]]
    if max(own) > 3:
        axes.append((_with_blocks, sum(own) / len(own)))
    unit, length = _unit(config), config.data.sequence_length
    if config.model.variant != "transformer" and length > 5 * unit:
        # Two and three, as one window by itself is another case.
        axes.append((lambda settings, number: _with_tokens(settings, (number + 1) * unit), length / unit - 1))
    return axes


def _unit(config: Config) -> int:
    """Tokens of a sequence that are whole groups of chunks, windows and segments on every process."""
    model, parallel = config.model, config.parallel
    whole = [parallel.tensor]
    if model.variant in ("swa", "mag", "mal"):
        whole.append(model.window)
    if model.variant == "mac":
        whole.append(model.segment_length)
    if model.has_memory:
        memory = model.memory
        sizes = [memory.chunk_size, *([memory.global_chunk_size] if memory.global_chunk_size else [])]
        whole += [group_chunks(size) * size for size in sizes]
        whole += [memory.shard_size] if memory.is_tnt else []
    return parallel.context * lcm(*whole)


def _with_blocks(config: Config, blocks: int) -> Config:
    count = config.parallel.pipeline * config.parallel.virtual
    model = dataclasses.replace(
        config.model, num_layers=count * blocks, intermediate_size=config.model.mlp_size, parameters=None
    )
    return dataclasses.replace(config, model=model, parallel=dataclasses.replace(config.parallel, layers=None))


def _with_one_micro_batch(config: Config) -> Config:
    size = config.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
    return dataclasses.replace(config, training=dataclasses.replace(config.training, global_batch_size=size))


def _times(one: Numbers, in_flight: int) -> Numbers:
    """Passes of so many micro-batches in flight, of those of one: each keeps, computes and sends the same."""
    found = {
        key: value * (1 if key in ("logits", "grown") or _is_control(key) else in_flight) for key, value in one.items()
    }
    found["grown"] += (in_flight - 1) * (one["activations"] + one["states"])
    return found


def _with_tokens(config: Config, length: int) -> Config:
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sequence_length=length))


def _is_control(key: Any) -> bool:
    return _is_sent(key) and key[1][0] == "control"  # once a step


def _is_sent(key: Any) -> bool:
    return isinstance(key, tuple)
