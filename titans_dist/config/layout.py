"""How a model and its batch are split over processes: what follows from the settings, and which settings are legal."""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import lcm

from titans_dist.config.checks import at_least, nearest_divisor, nearest_multiple, one_of
from titans_dist.config.errors import ConfigError
from titans_dist.config.model import ModelConfig
from titans_dist.config.run import Config, ParallelConfig

CONTEXT_MODES = ("auto", "heads", "ring", "scan")


def model_size(parallel: ParallelConfig) -> int:
    """Processes that hold one copy of the model together."""
    return parallel.tensor * parallel.context * parallel.pipeline


def world_size(parallel: ParallelConfig) -> int:
    """Processes of the layout; one copy of the model where `parallel.data` is unset."""
    return model_size(parallel) * (parallel.data or 1)


def describe_layout(parallel: ParallelConfig, copies: int) -> str:
    """The layout in words: tensor 2 x data 4, and what else is more than 1."""
    virtual = f" of {parallel.virtual} parts" if parallel.virtual > 1 else ""
    sizes = {"tensor": parallel.tensor, "context": parallel.context, "pipeline": parallel.pipeline, "data": copies}
    named = [
        f"{k} {n}{virtual if k == 'pipeline' else ''}" for k, n in sizes.items() if n > 1 or k in ("tensor", "data")
    ]
    return " x ".join(named)


def parts(parallel: ParallelConfig, num_layers: int) -> list[range]:
    """The blocks of each part of the model, in order; part i is the (i // pipeline)-th of stage i % pipeline."""
    count = parallel.pipeline * parallel.virtual
    sizes = parallel.layers or [num_layers // count + (i < num_layers % count) for i in range(count)]
    return [range(a, b) for a, b in pairwise(accumulate(sizes, initial=0))]


def is_affine(model: ModelConfig) -> bool:
    """Whether a chunk changes the memory by an affine map, so that chunks can be composed before they are known."""
    choice = model.memory.choice
    linear = choice("depth") == 1 and not choice("residual") and choice("retention") in ("none", "l2")
    return linear and choice("bias") in ("l2", "dot") and not model.memory.channel_wise


def context_mode(config: Config) -> str:
    """heads, ring or scan, with `auto` worked out."""
    model, parallel = config.model, config.parallel
    if parallel.context_mode != "auto":
        return parallel.context_mode
    divides = model.num_heads % (parallel.tensor * parallel.context) == 0
    return "heads" if divides and model.variant != "mac" else "ring"


def uses_ring(config: Config) -> bool:
    """Whether memories hand their state on from process to process."""
    return config.parallel.context > 1 and config.model.has_memory and context_mode(config) == "ring"


def context_groups(parallel: ParallelConfig, rows: int, heads: int) -> int:
    """Groups into which the ring divides `rows` sequences of `heads` heads each: a divisor, rows first.

    With rows alone (MAC) heads is 1.
    """
    wanted = parallel.context_groups or 2 * parallel.context
    by_rows = max(d for d in range(1, rows + 1) if rows % d == 0 and d <= wanted)
    if by_rows < rows:
        return by_rows
    return rows * max(d for d in range(1, heads + 1) if heads % d == 0 and rows * d <= max(wanted, rows))


def bubble(processes: int, groups: int) -> float:
    """Share of the time that each process of a ring waits while `groups` groups go round it."""
    return (processes - 1) / (groups + processes - 1)


def validate_layout(config: Config) -> None:
    """Raise ConfigError naming what cannot be split and the nearest legal setting."""
    parallel = config.parallel
    for key in ("tensor", "pipeline", "virtual", "context"):
        at_least(f"parallel.{key}", getattr(parallel, key), 1)
    for key in ("data", "context_groups"):
        if getattr(parallel, key) is not None:
            at_least(f"parallel.{key}", getattr(parallel, key), 1)
    one_of("parallel.context_mode", parallel.context_mode, CONTEXT_MODES)
    _tensor(config)
    _pipeline(config)
    _context(config)
    _kernels(config)
    _sequence_parallel(config)
    _engine(config)


def check_world(config: Config, world: int) -> int:
    """The data-parallel size of `world` processes. Raises ConfigError where the layout does not fill them exactly."""
    parallel = config.parallel
    one_copy = model_size(parallel)
    copies = world // one_copy
    if one_copy * copies != world or (parallel.data is not None and parallel.data != copies):
        sizes = {name: getattr(parallel, name) for name in ("tensor", "pipeline", "context", "data")}
        asked = " x ".join(f"parallel.{k}={n}" for k, n in sizes.items() if n is not None and (n > 1 or k == "tensor"))
        fit = f"parallel.data={copies}" if world % one_copy == 0 else f"a multiple of {one_copy} processes"
        raise ConfigError(f"{world} processes do not fit {asked}; use {fit}")
    validate_batch(config, copies)
    return copies


def validate_batch(config: Config, copies: int) -> None:
    """Raise ConfigError where `copies` copies of the model cannot share the batch of one step."""
    training, parallel = config.training, config.parallel
    rows = training.micro_batch_size * copies
    if training.global_batch_size % rows:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is no multiple of micro_batch_size x "
            f"data-parallel size = {rows}; the nearest is {nearest_multiple(training.global_batch_size, rows)}"
        )
    count = training.global_batch_size // rows
    if parallel.virtual > 1 and count % parallel.pipeline:
        legal = nearest_multiple(count, parallel.pipeline) * rows
        raise ConfigError(
            f"parallel.virtual={parallel.virtual} takes micro-batches in groups of parallel.pipeline="
            f"{parallel.pipeline}, and there are {count}; use training.global_batch_size={legal} or parallel.virtual=1"
        )


def _tensor(config: Config) -> None:
    model, tensor = config.model, config.parallel.tensor
    shared = model.num_heads == 1 and tensor > 1 and model.variant == "lmm"
    if shared:
        _full_width(config)
    for key, value in (
        ("model.num_heads", 0 if shared else model.num_heads),
        ("model.num_kv_heads", 0 if shared else model.kv_heads),
        ("model.vocab_size", model.vocab_size),
        ("the MLP width (model.intermediate_size)", model.mlp_size),
    ):
        if value % tensor:
            raise ConfigError(
                f"parallel.tensor={tensor} does not divide {key}={value}; "
                f"the nearest legal parallel.tensor is {nearest_divisor(value, tensor)}"
            )


def _full_width(config: Config) -> None:
    """Rules for a memory of one head, whose hidden units the tensor-parallel processes share out."""
    model, tensor = config.model, config.parallel.tensor
    choice, what = model.memory.choice, f"parallel.tensor={tensor} shares out the hidden units of the one head"
    for key, value, legal in (
        ("model.memory.depth", choice("depth"), (2,)),
        ("model.memory.retention", choice("retention"), ("none", "l2")),
        ("model.memory.anchor", choice("anchor"), ("chunk",)),
        ("model.memory.channel_wise", model.memory.channel_wise, (False,)),
        ("model.memory.global_chunk_size", model.memory.global_chunk_size, (None,)),
        ("data.documents", config.data.documents, ("joined",)),
        ("parallel.context", config.parallel.context, (1,)),
    ):
        if value not in legal:
            raise ConfigError(
                f"{what}, which is not offered with {key}={value}; use {key}={' or '.join(map(str, legal))}, "
                "or parallel.tensor=1"
            )
    if model.hidden_size % tensor:
        raise ConfigError(
            f"{what}, but does not divide model.hidden_size={model.hidden_size}; "
            f"the nearest legal parallel.tensor is {nearest_divisor(model.hidden_size, tensor)}"
        )


def _kernels(config: Config) -> None:
    """Forms of the memory that go over several processes are written in torch."""
    parallel = config.parallel
    if config.model.memory.backend != "triton":
        return
    for key, value, applies in (
        ("parallel.context_mode", context_mode(config), parallel.context > 1 and context_mode(config) != "heads"),
        ("model.num_heads", 1, config.model.num_heads == 1 and parallel.tensor > 1),
    ):
        if applies:
            raise ConfigError(
                f"model.memory.backend=triton is not offered with {key}={value} over several processes, which has no "
                "kernels; use model.memory.backend=auto"
            )


def _pipeline(config: Config) -> None:
    parallel, layers = config.parallel, config.model.num_layers
    count = parallel.pipeline * parallel.virtual
    if parallel.virtual > 1 and parallel.pipeline == 1:
        raise ConfigError(
            f"parallel.virtual={parallel.virtual} interleaves parts of a pipeline, and parallel.pipeline=1 is none; "
            "use parallel.pipeline=2 or more, or parallel.virtual=1"
        )
    if parallel.layers is None:
        if count > layers:
            raise ConfigError(
                f"parallel.pipeline={parallel.pipeline} x parallel.virtual={parallel.virtual} is more than "
                f"model.num_layers={layers}; use at most {layers} parts in all"
            )
        return
    if len(parallel.layers) != count or sum(parallel.layers) != layers or min(parallel.layers) < 1:
        raise ConfigError(
            f"parallel.layers={list(parallel.layers)} does not divide model.num_layers={layers} into {count} parts of "
            f"1 or more; an even split is {[len(part) for part in parts(ParallelConfig(pipeline=count), layers)]}"
        )


def _context(config: Config) -> None:
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    ways = parallel.context
    if ways == 1:
        return
    if config.training.carry_state:
        raise ConfigError(
            f"parallel.context={ways} is not possible with training.carry_state=true: what one step leaves at the end "
            "of the sequence the next one needs at its beginning; use parallel.context=1 or carry_state=false"
        )
    share, grains = length // ways, _grains(model)
    whole = lcm(*grains.values())
    for key, value in grains.items():
        if length % (ways * value):
            what = f"{key}={value}" if value > 1 else "a token"
            possible = nearest_divisor(length // whole, ways) if length % whole == 0 else 1
            raise ConfigError(
                f"parallel.context={ways} splits data.sequence_length={length} inside {what}; use "
                f"data.sequence_length={nearest_multiple(length, ways * whole)} or parallel.context={possible}"
            )
    if model.has_memory and share < model.conv_kernel - 1:
        raise ConfigError(
            f"parallel.context={ways} leaves {share} tokens to each process, fewer than a convolution of "
            f"model.conv_kernel={model.conv_kernel} looks back; use a smaller parallel.context"
        )
    if not model.has_memory:
        return
    mode, ranks = parallel.context_mode, parallel.tensor * ways
    if mode == "heads" and model.variant == "mac":
        raise ConfigError(
            "parallel.context_mode=heads is not offered for model.variant=mac, whose segments mix the heads one after "
            "the other; use parallel.context_mode=ring"
        )
    if mode == "heads" and model.num_heads % ranks:
        raise ConfigError(
            f"parallel.context_mode=heads needs parallel.tensor x parallel.context={ranks} to divide model.num_heads="
            f"{model.num_heads}; use parallel.context_mode=ring, or "
            f"parallel.context={nearest_divisor(max(1, model.num_heads // parallel.tensor), ways)}"
        )
    if mode == "scan" and (model.variant == "mac" or not is_affine(model)):
        raise ConfigError(
            "parallel.context_mode=scan composes affine maps: a memory of depth=1 with bias=l2 or dot, retention=none "
            "or l2, residual=false and gates per head, outside of mac; this one needs parallel.context_mode=ring"
        )


def _grains(model: ModelConfig) -> dict[str, int]:
    """What a process must hold whole numbers of, in tokens."""
    if not model.has_memory:
        return {"": 1}
    grains = {"model.memory.chunk_size": model.memory.chunk_size}
    if model.variant == "mac":
        grains["model.segment_length"] = model.segment_length
    if model.memory.global_chunk_size is not None:
        grains["model.memory.global_chunk_size"] = model.memory.global_chunk_size
        grains["model.memory.shard_size"] = model.memory.shard_size
    return grains


def _sequence_parallel(config: Config) -> None:
    model, parallel, length = config.model, config.parallel, config.data.sequence_length
    ways = parallel.tensor
    if ways == 1 or not parallel.sequence:
        return
    if length % (ways * parallel.context):
        over = f"parallel.tensor={ways}" + (f" x parallel.context={parallel.context}" if parallel.context > 1 else "")
        raise ConfigError(
            f"data.sequence_length={length} cannot be split over {over}; "
            f"use {nearest_multiple(length, ways * parallel.context)} or parallel.sequence=false"
        )
    # What the variant sums over processes inside a block is split along the sequence too.
    inner = {"mac": ("segment_length", model.segment_length), "mal": ("persistent_tokens", model.persistent_tokens)}
    key, value = inner.get(model.variant, ("", 0))
    if value % ways:
        raise ConfigError(
            f"model.{key}={value} cannot be split over parallel.tensor={ways} with model.variant={model.variant}; "
            f"use {nearest_multiple(value, ways)} or parallel.sequence=false"
        )


def _engine(config: Config) -> None:
    training, parallel = config.training, config.parallel
    one_of("training.engine", training.engine, ("megatron", "deepspeed"))
    one_of("training.recompute", training.recompute, ("none", "selective", "full"))
    if training.zero_stage not in (0, 1, 2, 3):
        raise ConfigError(f"training.zero_stage={training.zero_stage} is unknown; use 0, 1, 2 or 3")
    if training.engine == "megatron":
        if training.zero_stage != 1 or training.offload:
            key = "offload=true" if training.offload else f"zero_stage={training.zero_stage}"
            raise ConfigError(f"training.{key} needs training.engine=deepspeed; add that, or leave it out")
        return
    if parallel.pipeline > 1:
        raise ConfigError(
            f"training.engine=deepspeed is not offered with parallel.pipeline={parallel.pipeline}; "
            "use parallel.pipeline=1, or training.engine=megatron"
        )
    if training.zero_stage == 0 and training.precision == "bfloat16":
        raise ConfigError(
            "training.zero_stage=0 is not offered with training.precision=bfloat16, in which DeepSpeed would add "
            "gradients up; use training.zero_stage=1, or training.precision=float32"
        )
    if training.zero_stage > 1 and training.carry_state:
        raise ConfigError(
            f"training.zero_stage={training.zero_stage} is not offered with training.carry_state=true: it reduces "
            "gradients in the order in which they come, which is another one where no document begins; "
            "use training.zero_stage=1"
        )
    if training.zero_stage == 3 and parallel.context > 1 and config.model.variant == "mac":
        raise ConfigError(
            f"training.zero_stage=3 is not offered with parallel.context={parallel.context} and model.variant=mac: its "
            "processes do not need the split parameters at the same time; use training.zero_stage=2"
        )
    if training.offload and training.zero_stage == 0:
        raise ConfigError("training.offload=true needs training.zero_stage=1 or more, whose states it moves; use 1")
