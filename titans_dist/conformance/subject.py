"""The target of the kit, called as its contract says, in float64 where it can be."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titans_dist.config import ConfigError

Target = Callable[..., Any]


class Subject:
    """A target with its contract held to. Raises ConfigError where the target breaks it."""

    def __init__(self, target: Target) -> None:
        if not callable(target):
            raise ConfigError(
                f"the target is of type {type(target).__name__}; it must be callable: tokens (B, T) -> outputs"
            )
        self.target = target

    @classmethod
    def in_double(cls, target: Target, tokens: Tensor) -> Subject:
        """A copy of the target in float64 if it is a module that can be; otherwise the target as it is."""
        if isinstance(target, nn.Module):
            try:
                double = cls(copy.deepcopy(target).double())
                with torch.no_grad():
                    double(tokens)
                return double
            except Exception:  # whatever a module says that was made for another type; as it is it may still work
                pass
        return cls(target)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Outputs (B, T, n) for tokens (B, T)."""
        return self._outputs(self._call(lambda: self.target(tokens)), tokens)

    @property
    def has_state(self) -> bool:
        """Whether the target can go on from a state."""
        return callable(getattr(self.target, "initial_state", None))

    def in_parts(self, tokens: Tensor, lengths: list[int]) -> Tensor:
        """Outputs of one call after the other on parts of the sequence, with the state carried."""
        state = self._call(lambda: self.target.initial_state(tokens.shape[0]))  # type: ignore[attr-defined]
        found = []
        for part in tokens.split(lengths, 1):
            now = state
            result = self._call(lambda part=part, now=now: self.target(part, state=now))  # type: ignore[misc]
            if not (isinstance(result, tuple) and len(result) == 2):
                raise ConfigError(
                    f"the target called with state= gives a value of type {type(result).__name__}; "
                    "it must give (outputs, state)"
                )
            output, state = result
            found.append(self._outputs(output, part))
        return torch.cat(found, 1)

    def _call(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as error:
            raise ConfigError(f"the target failed: {said(error)}") from error

    def _outputs(self, y: Any, tokens: Tensor) -> Tensor:
        shape = tuple(tokens.shape)
        if not isinstance(y, Tensor) or not y.is_floating_point():
            what = f"a tensor of {y.dtype}" if isinstance(y, Tensor) else f"a value of type {type(y).__name__}"
            raise ConfigError(f"the target gives {what}; it must give a tensor of floating point numbers")
        if tuple(y.shape[:2]) != shape or y.numel() == 0:
            raise ConfigError(
                f"the target gives outputs of shape {tuple(y.shape)} for tokens {shape}; they must begin with {shape}"
            )
        if not y.isfinite().all():
            raise ConfigError(
                f"the target gives outputs that are not finite for tokens of shape {shape}; mend that first"
            )
        return y.flatten(2) if y.dim() > 2 else y.unsqueeze(-1)


def said(error: BaseException) -> str:
    """An exception in one line, with the last place in the user's own code that it came through."""
    foreign = ("<", str(Path(__file__).parent))  # importlib's frames, and this kit's
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(foreign) and "site-packages" not in frame.filename
    ]
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
