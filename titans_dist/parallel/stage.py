"""The model as megatron-core's schedules want it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from titans_dist.config import Config
from titans_dist.model import LanguageModel, ModelState
from titans_dist.parallel.tensor import build_parallel


class Stage(MegatronModule):
    """The language model with its loss: tokens and targets (B, T) -> loss of every token (B, T), float32, in nats.

    With a state, what the model needs to go on after these tokens is returned too: (losses, state).
    """

    pre_process = post_process = True
    share_embeddings_and_output_weights = False  # tied inside the model: nothing to sum between pipeline stages
    vp_stage = None

    def __init__(self, config: TransformerConfig, model: LanguageModel) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.model = model

    def set_input_tensor(self, tensor: Tensor | None) -> None:
        """Activations of the stage before; there is only one stage."""

    def forward(
        self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None, state: ModelState | None = None
    ) -> Tensor | tuple[Tensor, ModelState]:
        if state is None:
            return vocab_parallel_cross_entropy(self.model(tokens, starts=starts).float(), targets)
        logits, after = self.model(tokens, state=state, starts=starts)
        return vocab_parallel_cross_entropy(logits.float(), targets), after

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every parameter under the name it has in the model, with the dimension along which ranks split it."""
        sharded = {}
        for name, value in self.model.named_parameters():
            if value.tensor_model_parallel:  # type: ignore[attr-defined]
                axis = value.partition_dim  # type: ignore[attr-defined]
                sharded[name] = make_tp_sharded_tensor_for_checkpoint(value, prefix + name, axis)
            else:
                sharded[name] = make_sharded_tensor_for_checkpoint(value, prefix + name)
        return sharded

    def load_parameters(self, loaded: dict[str, Tensor]) -> None:
        """Take over the tensors of a loaded `sharded_state_dict`."""
        with torch.no_grad():
            for name, value in self.model.named_parameters():
                value.copy_(loaded[name])


MicroBatch = dict[str, Tensor]


def stage_inputs(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """`tokens` (b, T + 1) -> inputs and targets, both (b, T), and `starts` (b, T) where there are, on `device`."""
    tokens, starts = batch["tokens"].to(device, non_blocking=True), batch.get("starts")
    starts = None if starts is None else starts.to(device, non_blocking=True)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), starts


def build_stage(config: Config, device: torch.device) -> tuple[Stage, nn.Module]:
    """This rank's part of the model on `device`, by itself and wrapped for its precision."""
    transformer = _transformer_config(config)
    with torch.device("meta"):
        model = LanguageModel(config.model)
    build_parallel(model, transformer, parallel_state.get_tensor_model_parallel_group(), config.training.seed)
    stage = Stage(transformer, model).to(device)
    return stage, Float16Module(transformer, stage) if transformer.bf16 else stage


def _transformer_config(config: Config) -> TransformerConfig:
    model, tensor = config.model, config.parallel.tensor
    bf16 = config.training.precision == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_heads,
        ffn_hidden_size=model.mlp_size,
        tensor_model_parallel_size=tensor,
        sequence_parallel=config.parallel.sequence and tensor > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
