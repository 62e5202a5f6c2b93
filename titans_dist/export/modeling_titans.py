"""The language model as `transformers` calls it: losses, logits and `generate`, with the model's own state as cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from titans_dist.config.architecture import validate_model
from titans_dist.export.configuration_titans import TitansConfig
from titans_dist.layers.gates import Gates, retnet_alpha
from titans_dist.layers.parameter import Parameter, initial_value
from titans_dist.layers.state import map_tensors
from titans_dist.model.language_model import LanguageModel
from titans_dist.model.state import ModelState


class TitansCache:
    """What a model needs to go on after some tokens: memories, convolutions and windows of attention."""

    def __init__(self, state: ModelState, seen: int) -> None:
        self.state, self.seen = state, seen

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """How many tokens have gone before."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let every sequence go on from another one; beam search calls this."""
        self.state = map_tensors(self.state, lambda x: x.index_select(0, beam_idx.to(x.device)))


class TitansForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]  # the library's own two differ
    """A Titans or MIRAS language model: tokens -> logits.

    Sequences of a batch are as long as each other, or filled up on the right: what stands on the left of a text would
    be written into the memory.
    """

    config_class = TitansConfig
    base_model_prefix = "model"
    _is_stateful = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (the library's way)
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # type: ignore[assignment]  # noqa: RUF012

    def __init__(self, config: TitansConfig) -> None:
        super().__init__(config)
        model = config.model_config()
        validate_model(model)
        self.model = LanguageModel(model)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Where tokens become vectors."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Take another embedding."""
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Where vectors become logits."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Take another head."""
        self.model.head = new_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids (B, T) -> logits (B, T, vocab), or of the last `logits_to_keep` tokens alone.

        With `use_cache` or `past_key_values` (what an earlier call returned under that name) a cache is returned, with
        which the next call goes on. labels (B, T): the tokens themselves, -100 where there is nothing to predict.
        attention_mask (B, T): 0 for what fills up a row on its right; of no use with a cache.
        """
        is_carried = use_cache or past_key_values is not None
        _check_mask(attention_mask, is_carried)
        state, seen = None, input_ids.shape[1]
        if past_key_values is not None:
            state, seen = past_key_values.state, seen + past_key_values.seen
        elif use_cache:
            state = self.model.initial_state(input_ids.shape[0])
        x, after = self.model.mix(self.model.embedding(input_ids), state)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(self.model.norm(x[:, kept]))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        cache = None if after is None else TitansCache(after, seen)
        if return_dict is False:
            return tuple(value for value in (loss, logits, cache) if value is not None)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def prepare_inputs_for_generation(  # type: ignore[override]  # its cache is another
        self,
        input_ids: Tensor,
        past_key_values: TitansCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = True,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The tokens that the cache has not seen, with the cache."""
        _check_mask(attention_mask, True)
        seen = 0 if past_key_values is None else past_key_values.seen
        return {
            "input_ids": input_ids[:, seen:],
            "past_key_values": past_key_values,
            "use_cache": bool(use_cache),
            "logits_to_keep": 1,
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Weights as before training, from torch's seed, for a model that is made without any; constants always."""
        if isinstance(module, Gates) and module.constant_alpha is not None:
            module.constant_alpha.copy_(retnet_alpha(len(module.constant_alpha)))
        if module is not self.model:
            return
        for name, value in self.model.named_parameters():
            if isinstance(value, Parameter) and not getattr(value, "_is_hf_initialized", False):
                value.copy_(initial_value(name, value, torch.initial_seed()))


def _check_mask(mask: Tensor | None, is_carried: bool) -> None:
    """Raise ValueError where a token that does not count stands before one that does, or is to be remembered."""
    if mask is None or bool(mask.all()):
        return
    if is_carried:
        raise ValueError(
            "attention_mask has zeros, but the memory would keep what stands there; give sequences of one length"
        )
    if bool((mask[:, 1:] > mask[:, :-1]).any()):
        raise ValueError("attention_mask has zeros before ones; fill sequences up on the right (padding_side='right')")
