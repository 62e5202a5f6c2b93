"""A part of the model as megatron-core's schedules want it."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint
from torch import Tensor, nn

from titans_dist.config import Config
from titans_dist.model import LanguageModel, ModelState
from titans_dist.parallel.context import split_along_context, split_model_along_context
from titans_dist.parallel.pipeline import Part, keep, own_parts, whole_name
from titans_dist.parallel.tensor import build_parallel


class Stage(MegatronModule):
    """Blocks of the model; the first part takes tokens, the last one gives losses.

    Called with tokens and targets (B, T / cp) and the whole rows' starts (B, T): the loss of every token (B, T / cp),
    float32, in nats; of a part that is not the last, the residual stream in megatron-core's layout, time first.
    With a state, what the model needs to go on after these tokens is returned too: (losses, state).
    """

    def __init__(self, config: TransformerConfig, model: LanguageModel, part: Part) -> None:
        super().__init__(config)
        self.model_type = ModelType.encoder_or_decoder
        self.model = model
        self.pre_process, self.post_process, self.vp_stage = part.is_first, part.is_last, part.virtual
        # Inside one part a tied weight is one parameter; in two parts megatron-core sums the two gradients.
        is_whole = part.is_first and part.is_last
        self.share_embeddings_and_output_weights = model.config.tie_embeddings and not is_whole
        if self.share_embeddings_and_output_weights and (part.is_first or part.is_last):
            weight = self.shared_embedding_or_output_weight()
            weight.shared_embedding = True  # type: ignore[attr-defined]
            weight.shared = not part.is_first  # type: ignore[attr-defined]  # counted once in the norm
        self._received: Tensor | None = None

    def shared_embedding_or_output_weight(self) -> nn.Parameter:
        """The tied weight, where megatron-core looks for it."""
        weight = (self.model.embedding if self.pre_process else self.model.head).weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def set_input_tensor(self, tensor: Tensor | list[Tensor] | None) -> None:
        """Take the residual stream of the part before; called by the schedules."""
        self._received = tensor[0] if isinstance(tensor, list) else tensor

    def forward(
        self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None, state: ModelState | None = None
    ) -> Tensor | tuple[Tensor, ModelState]:
        x = self.model.embedding(tokens) if self.pre_process else self._time_first(self._received)
        x, after = self.model.mix(x, state, starts)
        if self.post_process:
            logits = self.model.head(self.model.norm(x))
            y = vocab_parallel_cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
        else:
            y = self._time_first(x).contiguous()
        return y if after is None else (y, after)

    def _time_first(self, x: Tensor | None) -> Tensor:
        """(B, T, hidden) of the model <-> (T, B, hidden) between parts; with sequence parallelism it is that."""
        assert x is not None
        return x if self.config.sequence_parallel else x.transpose(0, 1)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Every parameter under the name it has in the model, with the dimension along which ranks split it."""
        sharded = {}
        for name, value in self.model.named_parameters():
            key = prefix + whole_name(name, self.model.config)
            # Of a weight that two parts hold, the first one's is written.
            copy = {"replica_id": (1, 0, _data_rank())} if getattr(value, "shared", False) else {}
            sharded[name] = sharded_parameter(value, value, key, **copy)
        return sharded


def sharded_parameter(parameter: nn.Parameter, data: Tensor, key: str, **copy: Any) -> ShardedTensor:
    """`data`, which has the shape of this rank's part of a parameter, as part of the whole under `key`."""
    if parameter.tensor_model_parallel:  # type: ignore[attr-defined]
        return make_tp_sharded_tensor_for_checkpoint(data, key, parameter.partition_dim, **copy)  # type: ignore[attr-defined]
    return make_sharded_tensor_for_checkpoint(data, key, **copy)


def sharded_model(stages: list[Stage]) -> dict[str, Any]:
    """All parameters of this rank as its part of a sharded checkpoint; their names are those of the whole model."""
    return {name: value for stage in stages for name, value in stage.sharded_state_dict().items()}


def load_model(stages: list[Stage], loaded: dict[str, Tensor]) -> None:
    """Take over the tensors of a loaded `sharded_model`."""
    with torch.no_grad():
        for stage in stages:
            for name, value in stage.model.named_parameters():
                value.copy_(loaded[name])


MicroBatch = dict[str, Tensor]


def stage_inputs(batch: MicroBatch, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None]:
    """`tokens` (b, T + 1) -> this process's share of inputs and targets, (b, T / cp); the whole `starts` (b, T)."""
    tokens, starts = batch["tokens"].to(device, non_blocking=True), batch.get("starts")
    starts = None if starts is None else starts.to(device, non_blocking=True)
    inputs, targets = (split_along_context(x).contiguous() for x in (tokens[:, :-1], tokens[:, 1:]))
    return inputs, targets, starts


def build_stages(config: Config, device: torch.device) -> list[Stage]:
    """This rank's parts of the model on `device`, in the order of the model."""
    transformer = _transformer_config(config)
    group = parallel_state.get_tensor_model_parallel_group()
    stages = []
    for part in own_parts(config.parallel, config.model.num_layers):
        with torch.device("meta"):
            model = LanguageModel(config.model)
        keep(model, part)
        build_parallel(model, transformer, group, config.training.seed)
        split_model_along_context(model, config)
        model.set_recompute(config.training.recompute)
        stages.append(Stage(transformer, model, part).to(device))
    return stages


def in_precision(stage: Stage) -> nn.Module:
    """The stage as it is called: in bfloat16 where that is the precision."""
    return Float16Module(stage.config, stage) if stage.config.bf16 else stage


def _data_rank() -> int:
    return parallel_state.get_data_parallel_rank(with_context_parallel=True)


def _transformer_config(config: Config) -> TransformerConfig:
    model, parallel = config.model, config.parallel
    bf16 = config.training.precision == "bfloat16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    is_interleaved = parallel.virtual > 1
    return TransformerConfig(
        num_layers=parallel.pipeline * parallel.virtual,  # what megatron-core divides; the blocks are divided here
        hidden_size=model.hidden_size,
        num_attention_heads=max(model.num_heads, parallel.tensor),  # not used here, but checked there
        ffn_hidden_size=model.mlp_size,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        context_parallel_size=parallel.context,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if is_interleaved else None,
        # Batched p2p gives wrong gradients for two interleaved stages; freed outputs are corrupted by overlapped p2p
        # on gloo, and save one residual stream per micro-batch at most.
        batch_p2p_comm=not is_interleaved,
        overlap_p2p_comm=is_interleaved,
        deallocate_pipeline_outputs=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=bf16,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )
