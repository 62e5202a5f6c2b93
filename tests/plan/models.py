"""Small configurations for the tests of plans."""

from __future__ import annotations

from typing import Any

from titans_dist.config import Config, ModelConfig


def small(
    variant: str = "mag",
    *,
    length: int = 256,
    rows: int = 2,
    recompute: str = "selective",
    blocks: int = 1,
    **more: Any,
) -> Config:
    """Heads of 32 dimensions, chunks of 16, windows of 48 and segments of 128 tokens, on the CPU.

    `more`: fields of the model, and those of its memory with `memory_` before them; `precision`.
    """
    memory = {key.removeprefix("memory_"): more.pop(key) for key in list(more) if key.startswith("memory_")}
    precision = more.pop("precision", "float32")
    sizes: dict[str, Any] = {"hidden_size": 128, "num_heads": 4, "vocab_size": 512, "window": 48, **more}
    model = ModelConfig(
        variant=variant,
        num_layers=blocks,
        segment_length=128,
        persistent_tokens=8,
        memory={"chunk_size": 16, **memory},  # type: ignore[arg-type]
        **sizes,
    )
    config = Config(name="plan", run_dir="plan", model=model)
    config.data.format, config.data.path, config.data.sequence_length = "synthetic", "none", length
    training = config.training
    training.micro_batch_size = training.global_batch_size = rows
    training.recompute, training.precision, training.device = recompute, precision, "cpu"
    return config
