"""The named memories: what each is in terms of MIRAS's four choices (structure, bias, retention, algorithm).

Plain data, so that configuration needs no torch. `MemorySpec.preset(name)` makes the specification of each.
"""

from __future__ import annotations

from typing import Any

_MLP = {"depth": 2, "expansion": 4, "residual": True}
_MATRIX = {"depth": 1, "residual": False, "momentum": False}

PRESETS: dict[str, dict[str, Any]] = {
    # Titans (2501.00663), with the residual and norm of its later version
    "titans": {**_MLP, "bias": "l2", "retention": "l2", "momentum": True},
    # MIRAS (2504.13173)
    "moneta": {**_MLP, "bias": "lp", "p": 3.0, "retention": "lq_paper", "q": 4.0, "momentum": False},
    "yaad": {**_MLP, "bias": "huber", "retention": "l2", "momentum": False},
    "memora": {**_MLP, "bias": "l2", "retention": "kl", "momentum": False},
    # TTT (2407.04620)
    "ttt_linear": {"depth": 1, "residual": True, "bias": "l2", "retention": "none", "momentum": False},
    "ttt_mlp": {**_MLP, "bias": "l2", "retention": "none", "momentum": False},
    # Linear recurrences, written as memories
    "linear_attention": {**_MATRIX, "bias": "dot", "retention": "none"},
    "retnet": {**_MATRIX, "bias": "dot", "retention": "l2"},
    "mamba2": {**_MATRIX, "bias": "dot", "retention": "l2"},
    "deltanet": {**_MATRIX, "bias": "l2", "retention": "none", "anchor": "token"},
    "gated_deltanet": {**_MATRIX, "bias": "l2", "retention": "l2", "anchor": "token", "decay": "before"},
    "longhorn": {**_MATRIX, "bias": "l2", "retention": "none", "anchor": "token", "implicit": True},
}
