"""Every kernel, compiled for an H100, keeps what it works with in registers and fits into shared memory."""

from __future__ import annotations

import pytest
import triton

from titans_kernels.ahead_of_time import Configuration, Usage, compile_ahead, configurations
from titans_kernels.tune import SHARED_BYTES

CONFIGURATIONS = list(configurations())


@pytest.mark.aot
@pytest.mark.timeout(1800)  # of all: the first has to wait until they are compiled
@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda c: c.name)
def test_a_kernel_fits(configuration: Configuration, usages: dict[str, Usage]) -> None:
    """Nothing is spilled, but for what the table of the large tiles says."""
    usage = usages[configuration.name]
    assert usage.spill_stores <= configuration.most_spilled, usage
    assert usage.shared <= SHARED_BYTES, usage
    assert not usage.serialized or configuration.most_spilled, usage


def compiled(c: Configuration, without: str = "") -> Usage:
    signature = {name: kind for name, kind in c.signature.items() if name != without}
    return compile_ahead(c.kernel, signature, c.constants, c.num_warps)


def test_an_argument_without_type_is_named() -> None:
    with pytest.raises(ValueError, match=r"\['length'\] must be arguments and have a type or a constant"):
        compiled(CONFIGURATIONS[0], without="length")


@pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="kernels are compiled")
def test_interpreted_kernels_are_refused() -> None:
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        compiled(CONFIGURATIONS[0])
