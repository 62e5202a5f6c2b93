"""What the model is, in the form of `transformers`: the fields of ModelConfig, each under its own name."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from titans_dist.config import ModelConfig

FIELDS = tuple(field.name for field in dataclasses.fields(ModelConfig))


class TitansConfig(PretrainedConfig):
    """The model of `TitansForCausalLM`; `memory` is a dict of the fields of MemoryConfig.

    `parameters` is left out: the width of the MLP is what it has come to.
    """

    model_type = "titans"
    attribute_map = {  # noqa: RUF012  (the library's way)
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "rms_norm_eps": "norm_eps",
        "initializer_range": "init_std",
    }

    def __init__(self, **kwargs: Any) -> None:
        model = ModelConfig(**{name: kwargs.pop(name) for name in FIELDS if name in kwargs})
        values = dataclasses.asdict(model) | {"intermediate_size": model.mlp_size, "parameters": None}
        for name, value in values.items():
            setattr(self, name, value)
        super().__init__(**{**kwargs, "tie_word_embeddings": model.tie_embeddings})

    def model_config(self) -> ModelConfig:
        """The same as the model itself has it."""
        return ModelConfig(**{name: getattr(self, name) for name in FIELDS})
