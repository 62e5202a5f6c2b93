"""Checks that need no torch and no data: run before anything is started."""

from __future__ import annotations

import math

from titans_dist.config.errors import ConfigError
from titans_dist.config.model import ModelConfig
from titans_dist.config.run import Config, DataConfig

VARIANTS = ("mag",)
ACTIVATIONS = ("gelu", "silu", "relu", "identity")
READS = ("after", "before")
FORMATS = ("stdlib", "text", "jsonl", "parquet", "huggingface", "tokens", "synthetic")


def validate(config: Config) -> None:
    """Raise ConfigError, one sentence with the mend, for the first thing that cannot work."""
    validate_model(config.model)
    _data(config.data)
    _parallel(config)
    _optimizer(config)
    _training(config)


def validate_model(model: ModelConfig) -> None:
    """Raise ConfigError for a model that cannot be built, on any layout."""
    memory = model.memory
    one_of("model.variant", model.variant, VARIANTS)
    one_of("model.memory.activation", memory.activation, ACTIVATIONS)
    one_of("model.memory.read", memory.read, READS)
    at_least("model.num_layers", model.num_layers, 1)
    at_least("model.hidden_size", model.hidden_size, 1)
    at_least("model.num_heads", model.num_heads, 1)
    at_least("model.vocab_size", model.vocab_size, 2)
    at_least("model.window", model.window, 1)
    at_least("model.persistent_tokens", model.persistent_tokens, 0)
    at_least("model.conv_kernel", model.conv_kernel, 1)
    at_least("model.memory.expansion", memory.expansion, 1)
    at_least("model.memory.chunk_size", memory.chunk_size, 1)
    between("model.memory.depth", memory.depth, 1, 4)
    positive("model.rope_theta", model.rope_theta)
    positive("model.norm_eps", model.norm_eps)
    positive("model.init_std", model.init_std)
    if model.intermediate_size is not None:
        at_least("model.intermediate_size", model.intermediate_size, 1)
    if memory.theta_max is not None:
        positive("model.memory.theta_max", memory.theta_max)
    if model.hidden_size % model.num_heads or model.head_dim % 2:
        step = 2 * model.num_heads
        raise ConfigError(
            f"model.hidden_size={model.hidden_size} does not give {model.num_heads} heads of an even width; "
            f"use a multiple of {step}, such as {nearest_multiple(model.hidden_size, step)}, or change model.num_heads"
        )


def _data(data: DataConfig) -> None:
    one_of("data.format", data.format, FORMATS)
    one_of("data.dtype", data.dtype, ("uint16", "uint32"))
    at_least("data.sequence_length", data.sequence_length, 2)
    at_least("data.vocab_size", data.vocab_size, 2)
    at_least("data.synthetic_tokens", data.synthetic_tokens, 1)
    at_least("data.workers", data.workers, 0)
    if not 0 < data.validation_fraction < 0.5:
        raise ConfigError(
            f"data.validation_fraction={data.validation_fraction} leaves no training or no held-out text; "
            "use a share above 0 and below 0.5, such as 0.01"
        )
    if data.source is None and data.format in ("text", "jsonl", "parquet", "huggingface"):
        raise ConfigError(f"data={data.format} needs to know the corpus; add data.source=PATH")


def _parallel(config: Config) -> None:
    model, tensor = config.model, config.parallel.tensor
    at_least("parallel.tensor", tensor, 1)
    if config.parallel.data is not None:
        at_least("parallel.data", config.parallel.data, 1)
    for key, value in (
        ("model.num_heads", model.num_heads),
        ("model.vocab_size", model.vocab_size),
        ("the MLP width (model.intermediate_size)", model.mlp_size),
    ):
        if value % tensor:
            raise ConfigError(
                f"parallel.tensor={tensor} does not divide {key}={value}; "
                f"the nearest legal parallel.tensor is {nearest_divisor(value, tensor)}"
            )
    if tensor > 1 and config.parallel.sequence and config.data.sequence_length % tensor:
        raise ConfigError(
            f"data.sequence_length={config.data.sequence_length} cannot be split over parallel.tensor={tensor}; "
            f"use {nearest_multiple(config.data.sequence_length, tensor)} or parallel.sequence=false"
        )


def _optimizer(config: Config) -> None:
    optimizer = config.optimizer
    positive("optimizer.lr", optimizer.lr)
    positive("optimizer.eps", optimizer.eps)
    between("optimizer.min_lr_ratio", optimizer.min_lr_ratio, 0, 1)
    at_least("optimizer.warmup_steps", optimizer.warmup_steps, 0)
    at_least("optimizer.weight_decay", optimizer.weight_decay, 0)
    at_least("optimizer.clip_grad", optimizer.clip_grad, 0)
    for key in ("beta1", "beta2"):
        value = getattr(optimizer, key)
        if not 0 <= value < 1:
            raise ConfigError(f"optimizer.{key}={value} is no decay; use a number from 0 to below 1, such as 0.95")


def _training(config: Config) -> None:
    training = config.training
    one_of("training.precision", training.precision, ("float32", "bfloat16"))
    one_of("training.device", training.device, ("auto", "cuda", "cpu"))
    for key in ("steps", "global_batch_size", "micro_batch_size", "log_interval", "checkpoint_interval"):
        at_least(f"training.{key}", getattr(training, key), 1)
    at_least("training.keep_checkpoints", training.keep_checkpoints, 2)
    at_least("evaluation.micro_batch_size", config.evaluation.micro_batch_size, 1)
    if config.evaluation.max_sequences is not None:
        at_least("evaluation.max_sequences", config.evaluation.max_sequences, 1)
    at_least("cluster.timeout_s", config.cluster.timeout_s, 1)
    at_least("cluster.threads", config.cluster.threads, 1)
    rows = training.micro_batch_size * (config.parallel.data or 1)
    if training.global_batch_size % rows:
        raise ConfigError(
            f"training.global_batch_size={training.global_batch_size} is no multiple of micro_batch_size x "
            f"data-parallel size = {rows}; the nearest is {nearest_multiple(training.global_batch_size, rows)}"
        )


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ConfigError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{key}={value} is unknown; choose one of {', '.join(allowed)}")


def at_least(key: str, value: float, low: float) -> None:
    """Raise ConfigError unless `value >= low`."""
    if not value >= low:
        raise ConfigError(f"{key}={value} is too small; use {low} or more")


def between(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless `low <= value <= high`."""
    if not low <= value <= high:
        raise ConfigError(f"{key}={value} is out of range; use {low} to {high}")


def positive(key: str, value: float) -> None:
    """Raise ConfigError unless `value` is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ConfigError(f"{key}={value} must be a finite number above 0")


def nearest_multiple(value: int, step: int) -> int:
    """The multiple of `step`, at least `step`, that is nearest to `value`."""
    return max(step, round(value / step) * step)


def nearest_divisor(value: int, wanted: int) -> int:
    """The divisor of `value` that is nearest to `wanted` (the smaller one on a tie)."""
    divisors = [d for d in range(1, value + 1) if value % d == 0]
    return min(divisors, key=lambda d: (abs(d - wanted), d))
