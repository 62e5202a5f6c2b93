"""A stream of a million tokens: constant memory, finite numbers, a state that has not grown."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import psutil
import pytest
import torch

from tests.model.models import config
from titans_dist.model import build_model, flatten

CALL, CALLS = 16_384, 62


@torch.inference_mode()
def resident_memory(variant: str) -> list[int]:
    """Bytes after each call. float32: nothing may depend on positions that it cannot tell apart."""
    torch.set_num_threads(1)
    settings = config(variant, {"chunk_size": 128, "depth": 1}, num_layers=1, hidden_size=8, window=64)
    settings.segment_length = 256
    model = build_model(settings, seed=0)
    state = model.initial_state(1)
    sizes = {name: x.shape for name, x in flatten(state).items()}
    process, resident = psutil.Process(), []
    for call in range(CALLS):
        tokens = torch.randint(0, 32, (1, CALL), generator=torch.Generator().manual_seed(call))
        logits, state = model(tokens, state=state)
        resident.append(process.memory_info().rss)
    assert logits.isfinite().all()
    assert {name: x.shape for name, x in flatten(state).items()} == sizes
    return resident


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mag", "mac"])
def test_a_million_tokens_in_constant_memory(variant: str) -> None:
    """In a process of its own, whose memory is that of the stream alone."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        resident = pool.submit(resident_memory, variant).result()
    assert CALL * len(resident) > 1_000_000
    # Calls differ by what the allocator keeps, more so on a busy machine. Kept keys and values would be 48 MB more.
    assert median(resident[-CALLS // 4 :]) < median(resident[: CALLS // 4]) + 35e6
