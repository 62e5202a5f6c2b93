"""SwiGLU, as in Llama."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from titans_dist.config import ModelConfig
from titans_dist.layers.parameter import linear


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), (B, T, hidden) -> the same shape."""

    plan: ClassVar = {"gate": "column", "up": "column", "down": "row"}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = linear(config.hidden_size, config.mlp_size, config.init_std)
        self.up = linear(config.hidden_size, config.mlp_size, config.init_std)
        self.down = linear(config.mlp_size, config.hidden_size, config.residual_std)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))
