"""What mixes tokens over time in a block, by the name of the model's variant."""

from __future__ import annotations

from torch import nn

from titans_dist.config import ModelConfig
from titans_dist.layers.attention_only import AttentionOnly
from titans_dist.layers.lmm import MemoryAlone
from titans_dist.layers.mac import MemoryAsContext
from titans_dist.layers.mag import MemoryAsGate
from titans_dist.layers.mal import MemoryAsLayer

MIXERS: dict[str, type[nn.Module]] = {
    "lmm": MemoryAlone,
    "mac": MemoryAsContext,
    "mag": MemoryAsGate,
    "mal": MemoryAsLayer,
    "transformer": AttentionOnly,
    "swa": AttentionOnly,
    # The linear recurrences are the memory alone, of the preset of their name.
    "mamba2": MemoryAlone,
    "deltanet": MemoryAlone,
    "gated_deltanet": MemoryAlone,
}
"""Each is called as mixer(x, state, starts) -> (y, state after): x, y (B, T, hidden); starts (B, T) bool or None, the
tokens that begin a document. The state is what `initial_state(batch)` or an earlier call returned; or None where the
sequence begins here and nobody asks for the state after it, which then is None too."""


def build_mixer(config: ModelConfig) -> nn.Module:
    """The mixer of `config.variant`."""
    return MIXERS[config.variant](config)
