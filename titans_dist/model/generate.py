"""Continue a text, one token at a time, with a state of constant size."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_dist.config import ConfigError
from titans_dist.model.language_model import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """prompt (B, T) int64 -> (B, T + max_new_tokens): the prompt and what the model adds to it.

    temperature 0 takes the likeliest token; otherwise tokens are drawn from the softmax of logits / temperature, of
    the `top_k` likeliest, and of those only the smallest set that has the probability `top_p` together.
    Raises ConfigError for values that are out of range.
    """
    _check(model, prompt, max_new_tokens, temperature, top_k, top_p)
    found, part, state = [prompt], prompt, model.initial_state(prompt.shape[0])
    for _ in range(max_new_tokens):
        logits, state = model(part, state=state)
        part = next_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
        found.append(part)
    return torch.cat(found, 1)


def next_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """One token for each row of `logits` (B, vocab): (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    return torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator)


def probabilities(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """What `next_token` draws from, (B, vocab); tokens outside top_k or top_p have probability 0."""
    ordered, index = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[:, top_k:] = -torch.inf
    share = ordered.softmax(-1)
    if top_p is not None:
        # A token stays while those before it do not have the whole share yet; so the first one always does.
        share = torch.where(share.cumsum(-1) - share < top_p, share, 0.0)
        share = share / share.sum(-1, keepdim=True)
    return torch.zeros_like(share).scatter(-1, index, share)


def _check(
    model: LanguageModel,
    prompt: Tensor,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> None:
    vocabulary = model.config.vocab_size
    if prompt.dim() != 2 or 0 in prompt.shape or prompt.dtype != torch.int64:
        raise ConfigError(
            f"prompt has shape {tuple(prompt.shape)} and dtype {prompt.dtype}; it must be (B, T) of int64, with T >= 1"
        )
    low, high = int(prompt.min()), int(prompt.max())
    if low < 0 or high >= vocabulary:
        raise ConfigError(f"prompt has token {low if low < 0 else high}; this model knows 0 to {vocabulary - 1}")
    if max_new_tokens < 0:
        raise ConfigError(f"max_new_tokens={max_new_tokens} is negative; use 0 or more")
    if not 0 <= temperature < float("inf"):
        raise ConfigError(f"temperature={temperature} is out of range; use 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k} leaves no token; use 1 or more, or none")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"top_p={top_p} is no share; use a number above 0, up to 1")
