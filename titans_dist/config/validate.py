"""Checks that need no torch and no data: run before anything is started."""

from __future__ import annotations

from titans_dist.config.architecture import validate_model
from titans_dist.config.checks import at_least, between, nearest_divisor, nearest_multiple, one_of, positive
from titans_dist.config.errors import ConfigError
from titans_dist.config.evaluation import HARNESS, EvaluationConfig
from titans_dist.config.layout import validate_batch, validate_layout
from titans_dist.config.machines import validate_cluster
from titans_dist.config.mixture import validate_mixture
from titans_dist.config.run import Config, DataConfig, HealthConfig

__all__ = ["validate", "validate_model"]

FORMATS = ("stdlib", "text", "jsonl", "parquet", "huggingface", "mds", "mixture", "tokens", "synthetic")


def validate(config: Config) -> None:
    """Raise ConfigError, one sentence with the mend, for the first thing that cannot work."""
    validate_model(config.model)
    _data(config.data)
    validate_layout(config)
    _optimizer(config)
    _training(config)
    validate_mixture(config)
    _conformance(config)
    _inspect(config)
    _plan(config)
    _checkpoint(config)
    _health(config.health)
    _evaluation(config.evaluation)
    validate_cluster(config)
    _carried_state(config)


def _data(data: DataConfig) -> None:
    one_of("data.format", data.format, FORMATS)
    one_of("data.dtype", data.dtype, ("uint16", "uint32"))
    one_of("data.documents", data.documents, ("packed", "joined"))
    at_least("data.sequence_length", data.sequence_length, 2)
    at_least("data.vocab_size", data.vocab_size, 2)
    at_least("data.synthetic_tokens", data.synthetic_tokens, 1)
    at_least("data.workers", data.workers, 0)
    at_least("data.shuffle_shards", data.shuffle_shards, 1)
    at_least("data.fetch_ahead", data.fetch_ahead, 0)
    positive("data.cache_gb", data.cache_gb)
    if data.end_of_document is not None:
        at_least("data.end_of_document", data.end_of_document, 0)
    if not 0 < data.validation_fraction < 0.5:
        raise ConfigError(
            f"data.validation_fraction={data.validation_fraction} leaves no training or no held-out text; "
            "use a share above 0 and below 0.5, such as 0.01"
        )
    at_least("data.prepare_workers", data.prepare_workers, 0)
    for key in ("min_characters", "max_characters"):
        if getattr(data, key) is not None:
            at_least(f"data.{key}", getattr(data, key), 1)
    for key in ("max_compression_ratio", "min_compression_ratio"):
        if getattr(data, key) is not None:
            positive(f"data.{key}", getattr(data, key))
    if data.max_repeated_lines is not None:
        between("data.max_repeated_lines", data.max_repeated_lines, 0, 1)
    if data.source is None and data.format in ("text", "jsonl", "parquet", "huggingface"):
        raise ConfigError(f"data={data.format} needs to know the corpus; add data.source=PATH")


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


def _conformance(config: Config) -> None:
    for key, low in (("vocab_size", 2), ("length", 4), ("batch", 2), ("probes", 1)):
        at_least(f"conformance.{key}", getattr(config.conformance, key), low)


def _plan(config: Config) -> None:
    if config.plan.search is not None:
        at_least("plan.search", config.plan.search, 1)


def _inspect(config: Config) -> None:
    inspect, batch = config.inspect, config.training.global_batch_size
    for key, low in (("step", 1), ("to_step", inspect.step or 1), ("ranks", 1), ("sequences", 1), ("max_tokens", 1)):
        if getattr(inspect, key) is not None:
            at_least(f"inspect.{key}", getattr(inspect, key), low)
    ranks, key = inspect.ranks, "inspect.ranks"
    if ranks is None:
        ranks, key = config.parallel.data or 1, "parallel.data"
    if batch % ranks:
        raise ConfigError(
            f"{key}={ranks} does not divide training.global_batch_size={batch}; use {nearest_divisor(batch, ranks)}"
        )
    if not 0 <= inspect.rank < ranks:
        many = f"0 to {ranks - 1}" if ranks > 1 else "0"
        raise ConfigError(f"inspect.rank={inspect.rank} is not one of {ranks} ranks; use {many}, or more inspect.ranks")


def _training(config: Config) -> None:
    training = config.training
    one_of("training.precision", training.precision, ("float32", "bfloat16"))
    one_of("training.device", training.device, ("auto", "cuda", "cpu"))
    for key in ("steps", "global_batch_size", "micro_batch_size", "log_interval"):
        at_least(f"training.{key}", getattr(training, key), 1)
    if training.max_minutes is not None:
        positive("training.max_minutes", training.max_minutes)
    at_least("tracking.memory_interval", config.tracking.memory_interval, 0)
    validate_batch(config, config.parallel.data or 1)


def _checkpoint(config: Config) -> None:
    checkpoint = config.checkpoint
    at_least("checkpoint.interval", checkpoint.interval, 1)
    at_least("checkpoint.keep", checkpoint.keep, 2)
    if checkpoint.permanent_interval is not None:
        at_least("checkpoint.permanent_interval", checkpoint.permanent_interval, 1)
    at_least("checkpoint.retries", checkpoint.retries, 0)
    at_least("checkpoint.margin", checkpoint.margin, 1)
    one_of("export.format", config.export.format, ("hf", "deepspeed"))
    positive("export.shard_gb", config.export.shard_gb)
    at_least("drill.faults", config.drill.faults, 1)
    at_least("drill.seed", config.drill.seed, 0)
    if config.drill.hours is not None:
        positive("drill.hours", config.drill.hours)


def _health(health: HealthConfig) -> None:
    for key in ("spike", "memory_spike", "skips", "rollbacks"):
        at_least(f"health.{key}", getattr(health, key), 0)
    at_least("health.window", health.window, 8)
    for key in ("lower_steps", "rollback_to"):
        at_least(f"health.{key}", getattr(health, key), 1)
    positive("health.lower_lr", health.lower_lr)
    between("health.lower_lr", health.lower_lr, 0, 1)
    if not (health.straggler == 0 or health.straggler > 1):
        raise ConfigError(f"health.straggler={health.straggler} would report every rank; use more than 1, or 0 for off")


def _evaluation(evaluation: EvaluationConfig) -> None:
    lows = {"samples": 1, "seed": 0, "workers": 1, "tensor": 1, "gpus": 0, "shard": 1, "retries": 0}
    for key, low in {**lows, "micro_batch_size": 1, "max_sequences": 1, "step": 0}.items():
        if getattr(evaluation, key) is not None:
            at_least(f"evaluation.{key}", getattr(evaluation, key), low)
    positive("evaluation.cpus", evaluation.cpus)
    for length in evaluation.lengths:
        at_least("evaluation.lengths", length, 2)
    follow = evaluation.follow
    for key in ("budget", "poll_s", "patience_s"):
        positive(f"evaluation.follow.{key}", getattr(follow, key))
    between("evaluation.follow.budget", follow.budget, 0, 1)
    between("evaluation.follow.nice", follow.nice, 0, 19)
    for task, every in follow.every.items():
        at_least(f"evaluation.follow.every.{task}", every, 1)
        one_of("evaluation.follow.every", task, tuple(evaluation.tasks))
    if any(not task.startswith(HARNESS) for task in evaluation.tasks) and not evaluation.lengths:
        raise ConfigError("evaluation.tasks needs lengths of the context; add evaluation.lengths=[2048,4096]")


def _carried_state(config: Config) -> None:
    model, length = config.model, config.data.sequence_length
    if not config.training.carry_state:
        return
    if config.data.documents != "packed":
        raise ConfigError(
            f"training.carry_state=true begins anew with every document, which data.documents={config.data.documents} "
            "does not; use data.documents=packed"
        )
    if model.variant == "transformer":
        raise ConfigError(
            "training.carry_state=true is not possible with model.variant=transformer, whose state grows with every "
            "token; use variant=swa or one with a memory"
        )
    # Then a state between two steps has no running chunk, and all states of a model have the same tensors.
    chunk = model.memory.global_chunk_size or model.memory.chunk_size
    if model.has_memory and length % chunk:
        name = "global_chunk_size" if model.memory.is_tnt else "chunk_size"
        raise ConfigError(
            f"training.carry_state=true needs sequences of whole chunks, and data.sequence_length={length} is no "
            f"multiple of model.memory.{name}={chunk}; the nearest is {nearest_multiple(length, chunk)}"
        )
