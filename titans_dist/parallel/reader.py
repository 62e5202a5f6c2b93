"""A model that reads documents of any length piece by piece, with a state of constant size, and answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region, vocab_parallel_cross_entropy
from torch import Tensor

from titans_dist.config import Config, ConfigError
from titans_dist.model import ModelState
from titans_dist.parallel import cpu
from titans_dist.parallel.stage import build_stages, load_model, sharded_model

PIECE = 2048
"""Tokens that go through the model at once."""
TRIMMED = 8192
"""Tokens after which freed memory goes back to the system, so that a long document peaks where a short one does."""
HEAD_PIECE = 256
"""Positions whose logits exist at once: those of a whole piece may be larger than everything else together."""


class Reader:
    """The whole model, or with tensor parallelism this rank's part of it, in which case every method is collective.

    Any split of a document into pieces gives what one call gives, so the piece size decides about speed alone.
    """

    def __init__(self, config: Config, device: torch.device, piece: int = PIECE) -> None:
        """Raises ConfigError for a layout that splits layers or sequences, which one reader does not."""
        parallel = config.parallel
        if parallel.pipeline * parallel.virtual * parallel.context > 1 or (parallel.sequence and parallel.tensor > 1):
            raise ConfigError("a reader splits a model over parallel.tensor alone; set the others to 1 and false")
        self.device, self.piece, self._read = device, piece, 0
        self._stages = build_stages(config, device)
        self.model = self._stages[0].model.eval()
        self._vocab_size = config.model.vocab_size
        if config.training.precision == "bfloat16":
            self.model.bfloat16()

    def sharded_state(self) -> dict[str, Any]:
        """The model as this rank's part of a sharded checkpoint."""
        return {"model": sharded_model(self._stages)}

    def load(self, loaded: dict[str, Any]) -> None:
        """Take over a loaded `sharded_state`."""
        load_model(self._stages, loaded["model"])

    def start(self) -> ModelState:
        """The state before the first token of one document."""
        with torch.inference_mode():
            return self.model.initial_state(1)

    @torch.inference_mode()
    def read(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """tokens (T,) int64, T >= 1 -> logits (vocab,) float32 of the next token, and the state after them."""
        for part in self._pieces(tokens):
            x, state = self._mixed(part, state)
        return self._logits(x[:, -1:])[0, 0], state

    @torch.inference_mode()
    def losses(self, tokens: Tensor, state: ModelState) -> Iterator[tuple[Tensor, ModelState]]:
        """tokens (T + 1,) int64: piece by piece, the loss in nats of each token but the first, and the state.

        The losses (t,) float32 on the CPU; the state before the token that the next piece begins with.
        """
        for start in range(0, len(tokens) - 1, self.piece):
            part = tokens[start : start + self.piece + 1]
            x, state = self._mixed(part[:-1], state)
            yield self._losses(x, part[1:]), state

    @torch.inference_mode()
    def likelihood(self, tokens: Tensor, logits: Tensor, state: ModelState) -> tuple[float, bool]:
        """tokens (T,) int64, T >= 1, after what `read` has returned: their log-likelihood in nats, summed in float64,
        and whether each of them is the likeliest."""
        total, is_likeliest = 0.0, True
        for part, targets in self._predictions(tokens, logits, state):
            own = targets.to(self.device)
            chosen = part.log_softmax(-1).gather(-1, own[:, None])
            total += chosen.double().sum().item()
            is_likeliest = is_likeliest and bool((part.argmax(-1) == own).all())
        return total, is_likeliest

    def answer(
        self, prompt: Tensor, new_tokens: int, ends: Iterable[int] = (), vocabulary: int | None = None
    ) -> list[int]:
        """The likeliest `new_tokens` tokens after the prompt (T,); fewer where one of `ends`, left out, comes.

        `vocabulary`: tokens that the tokenizer has, where the model, as is common, has more rows than those.
        """
        return self.go_on(*self.read(prompt, self.start()), new_tokens, ends, vocabulary)

    def go_on(
        self,
        logits: Tensor,
        state: ModelState,
        new_tokens: int,
        ends: Iterable[int] = (),
        vocabulary: int | None = None,
    ) -> list[int]:
        """The same after what `read` has returned."""
        stops = set(ends)
        found: list[int] = []
        while len(found) < new_tokens:
            token = int(logits[:vocabulary].argmax())
            if token in stops:
                break
            found.append(token)
            if len(found) < new_tokens:
                logits, state = self.read(torch.tensor([token]), state)
        return found

    def _predictions(self, tokens: Tensor, logits: Tensor, state: ModelState) -> Iterator[tuple[Tensor, Tensor]]:
        """The logits (t, vocab) of each of the tokens, and those (t,): the first by what came before them."""
        yield logits[None], tokens[:1]
        for start in range(0, len(tokens) - 1, self.piece):
            part = tokens[start : start + self.piece + 1]
            x, state = self._mixed(part[:-1], state)
            for first in range(0, x.shape[1], HEAD_PIECE):
                some = slice(first, first + HEAD_PIECE)
                yield self._logits(x[:, some])[0], part[1:][some]

    def _pieces(self, tokens: Tensor) -> Iterator[Tensor]:
        if len(tokens) == 0:
            raise ConfigError("there is nothing to read; a document has one token or more")
        for start in range(0, len(tokens), self.piece):
            yield tokens[start : start + self.piece]

    def _mixed(self, tokens: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """The residual stream (1, t, hidden) after the last block."""
        x, after = self.model.mix(self.model.embedding(tokens[None].to(self.device)), state)
        assert after is not None
        self._read += len(tokens)
        if self._read >= TRIMMED:
            self._read = 0
            cpu.trim()
        return x, after

    def _logits(self, x: Tensor) -> Tensor:
        logits = self.model.head(self.model.norm(x))
        if parallel_state.get_tensor_model_parallel_world_size() > 1:
            logits = gather_from_tensor_model_parallel_region(logits)
        return logits[..., : self._vocab_size].float()

    def _losses(self, x: Tensor, targets: Tensor) -> Tensor:
        targets, found = targets[None].to(self.device), []
        for start in range(0, x.shape[1], HEAD_PIECE):
            part = slice(start, start + HEAD_PIECE)
            logits = self.model.head(self.model.norm(x[:, part]))
            found.append(vocab_parallel_cross_entropy(logits.float(), targets[:, part])[0])
        return torch.cat(found).cpu()
