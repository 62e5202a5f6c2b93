"""Checks that need no torch and no data: run before anything is started."""

from __future__ import annotations

from titans_dist.config.architecture import validate_model
from titans_dist.config.checks import at_least, between, nearest_multiple, one_of, positive
from titans_dist.config.errors import ConfigError
from titans_dist.config.layout import validate_batch, validate_layout
from titans_dist.config.run import Config, DataConfig

__all__ = ["validate", "validate_model"]

FORMATS = ("stdlib", "text", "jsonl", "parquet", "huggingface", "tokens", "synthetic")


def validate(config: Config) -> None:
    """Raise ConfigError, one sentence with the mend, for the first thing that cannot work."""
    validate_model(config.model)
    _data(config.data)
    validate_layout(config)
    _optimizer(config)
    _training(config)
    _conformance(config)
    _carried_state(config)


def _data(data: DataConfig) -> None:
    one_of("data.format", data.format, FORMATS)
    one_of("data.dtype", data.dtype, ("uint16", "uint32"))
    one_of("data.documents", data.documents, ("packed", "joined"))
    at_least("data.sequence_length", data.sequence_length, 2)
    at_least("data.vocab_size", data.vocab_size, 2)
    at_least("data.synthetic_tokens", data.synthetic_tokens, 1)
    at_least("data.workers", data.workers, 0)
    if data.end_of_document is not None:
        at_least("data.end_of_document", data.end_of_document, 0)
    if not 0 < data.validation_fraction < 0.5:
        raise ConfigError(
            f"data.validation_fraction={data.validation_fraction} leaves no training or no held-out text; "
            "use a share above 0 and below 0.5, such as 0.01"
        )
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


def _training(config: Config) -> None:
    training = config.training
    one_of("training.precision", training.precision, ("float32", "bfloat16"))
    one_of("training.device", training.device, ("auto", "cuda", "cpu"))
    for key in ("steps", "global_batch_size", "micro_batch_size", "log_interval", "checkpoint_interval"):
        at_least(f"training.{key}", getattr(training, key), 1)
    at_least("training.keep_checkpoints", training.keep_checkpoints, 2)
    at_least("tracking.memory_interval", config.tracking.memory_interval, 0)
    at_least("evaluation.micro_batch_size", config.evaluation.micro_batch_size, 1)
    if config.evaluation.max_sequences is not None:
        at_least("evaluation.max_sequences", config.evaluation.max_sequences, 1)
    at_least("cluster.timeout_s", config.cluster.timeout_s, 1)
    at_least("cluster.threads", config.cluster.threads, 1)
    validate_batch(config, config.parallel.data or 1)


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
