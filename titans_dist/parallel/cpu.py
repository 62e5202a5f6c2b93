"""The CPU adapter for megatron-core 0.16.1: the whole parallel stack on CPU processes with gloo.

megatron-core asks for CUDA in three ways.

1. It calls functions of ``torch.cuda``. ``install()`` replaces them once; that costs nothing afterwards.
2. The pipeline schedules make one tensor per step with a literal ``device="cuda"``. ``install()`` gives that module a
   ``torch`` whose ``zeros`` knows no CUDA. The model's own calls inside a schedule stay untouched.
3. The optimizers compare type names (``param.type() == "torch.cuda.FloatTensor"``), call ``Tensor.cuda()`` and make
   tensors with ``device="cuda"``. Only a ``TorchFunctionMode`` reaches these: ``cpu_device_mode()``. It adds 1.4
   microseconds to every torch call under it (1.2 -> 2.6 for an addition of 8 x 8) and would hide device mistakes in
   our own code, so it is a context manager for the calls in the last row of this table and no global mode.

=================================================================================  ===================================
megatron-core call                                                                 needs
=================================================================================  ===================================
``initialize_model_parallel``, ``OptimizerParamScheduler``, ``zero_grad``          nothing
column/row-parallel linears with sequence parallelism, DDP construction and        ``install()``
hooks, ``finalize_model_grads``, the RNG tracker, ``tensor_parallel.checkpoint``,
timers, all forward-backward schedules, ``dist_checkpointing`` save and load
``get_megatron_optimizer`` (type names), ``optimizer.step`` and its parts          ``install()`` and
``get_grad_norm``, ``clip_grad_norm``, ``count_zeros`` (literals, type names),     ``cpu_device_mode()``
``DistributedOptimizer.sharded_state_dict`` (``Tensor.cuda()``), grad scalers,
``tensor_parallel.broadcast_data``, ``RerunStateMachine`` (literals)
=================================================================================  ===================================

A backward needs no mode: on CPU, autograd runs it in the calling thread, so the DDP hooks see what the caller sees.

Two things more are the CPU's own. Numbers below 1e-38 count as zero: over hundreds of thousands of tokens a memory
forgets what nothing is written to down to such numbers, and CPUs take several times as long for them. And `trim()`
gives back what was freed inside the heap of glibc, which otherwise grows for a while.

Nothing here does anything where CUDA is available, but for `trim()`.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_installed = False


def install() -> None:
    """Replace the ``torch.cuda`` functions that megatron-core calls by their CPU meaning; idempotent."""
    global _installed
    if _installed or torch.cuda.is_available():
        return
    torch.set_flush_denormal(True)
    import megatron.core.pipeline_parallel.schedules as schedules
    import megatron.core.tensor_parallel.random as tracker

    # device=torch.cuda.current_device(): mappings and layers under sequence parallelism, p2p shapes, DDP buffers,
    # timers, the agreement at the end of dist_checkpointing.save.
    _replace(torch.cuda, "current_device", lambda: _CPU)
    # Timers, batched p2p, dist_checkpointing's staging of tensors.
    _replace(torch.cuda, "synchronize", lambda device=None: None)
    # CudaRNGStatesTracker.add and fork, tensor_parallel.checkpoint, RerunStateMachine: the "CUDA" generator of a
    # CPU process is the default CPU generator.
    for module in (torch.cuda, torch.cuda.random):
        _replace(module, "get_rng_state", lambda device="cuda": torch.get_rng_state())
        _replace(module, "set_rng_state", lambda new_state, device="cuda": torch.set_rng_state(new_state))
        _replace(module, "manual_seed", _seed_cpu)
    # megatron-core's own copy of set_rng_state goes to the CUDA generators directly.
    _replace(tracker, "_set_cuda_rng_state", _set_tracker_state)
    # fork() warns when the CPU generator moved inside a "GPU" context; here that is exactly what must happen.
    logging.getLogger(tracker.__name__).addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())
    # forward_backward_*: total_num_tokens = torch.zeros([], dtype=torch.int, device="cuda").
    _replace(schedules, "torch", _TorchWithCpuZeros("torch"))
    _installed = True


def trim() -> None:
    """Give freed memory back to the system; nothing where the C library has no malloc_trim."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def cpu_device_mode() -> AbstractContextManager[object]:
    """Context for the megatron-core calls of the module's table; does nothing where CUDA is available."""
    return contextlib.nullcontext() if torch.cuda.is_available() else _CpuDeviceMode()


class _CpuDeviceMode(TorchFunctionMode):
    """Maps ``device="cuda"``, ``Tensor.cuda()`` and ``Tensor.to("cuda")`` to the CPU, and type names to CUDA ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if kwargs and _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": _CPU}
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # DistributedOptimizer, Float16OptimizerWithFloat16Params and clip_grads compare 'torch.cuda.*Tensor'.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **(kwargs or {}))


class _TorchWithCpuZeros(types.ModuleType):
    """``torch`` as one megatron-core module sees it: ``zeros`` on ``"cuda"`` are made on the CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*size, device=_CPU if _is_cuda(device) else device, **kwargs)


def _replace(owner: Any, name: str, new: Any) -> None:
    """``setattr`` after a check that the name is still there: a newer megatron-core must fail here, and loudly."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner.__name__}.{name} is gone; titans_dist.parallel.cpu is for megatron-core 0.16.1")
    setattr(owner, name, new)


def _seed_cpu(seed: int) -> None:
    torch.manual_seed(seed)


def _set_tracker_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
    torch.set_rng_state(new_state)


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"
