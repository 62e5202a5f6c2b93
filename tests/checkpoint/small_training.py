"""A model small enough for many processes, trained by megatron-core: what the checkpoint tests save and load."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

from titans_dist.parallel import cpu
from titans_dist.parallel.optimizer_state import load_optimizer_state, optimizer_sharded_state


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a training is spread over ranks."""

    tensor_parallel: int = 1
    distributed_optimizer: bool = True
    bf16: bool = False
    width: int = 8
    bucket_size: int | None = None
    """Parameters that are reduced together; None: all."""


class SmallTraining:
    """A norm and a column/row-parallel pair under DDP and Adam; every step sees the same two batches on any layout."""

    BATCHES_PER_STEP = 2

    def __init__(self, layout: Layout, seed: int = 0) -> None:
        cpu.install()
        from megatron.core import parallel_state as ps
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.transformer.module import Float16Module, MegatronModule
        from megatron.core.transformer.transformer_config import TransformerConfig

        if not ps.model_parallel_is_initialized():
            ps.initialize_model_parallel(tensor_model_parallel_size=layout.tensor_parallel)
        self.layout = layout
        self.data_rank, self.data_ranks = ps.get_data_parallel_rank(), ps.get_data_parallel_world_size()
        self.dtype = torch.bfloat16 if layout.bf16 else torch.float32
        config = TransformerConfig(
            num_layers=1,
            hidden_size=layout.width,
            num_attention_heads=4,
            tensor_model_parallel_size=layout.tensor_parallel,
            use_cpu_initialization=True,
            params_dtype=self.dtype,
            bf16=layout.bf16,
        )
        module: MegatronModule = _pair_class()(config, layout.width, seed)
        if layout.bf16:
            module = Float16Module(config, module)
        ddp_config = DistributedDataParallelConfig(
            use_distributed_optimizer=layout.distributed_optimizer,
            grad_reduce_in_fp32=True,
            # Buckets are made only where they are reduced while the backward pass goes on.
            overlap_grad_reduce=layout.bucket_size is not None,
            bucket_size=layout.bucket_size,
        )
        self.model = DistributedDataParallel(config, ddp_config, module)
        settings = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            clip_grad=0.5,
            bf16=layout.bf16,
            params_dtype=self.dtype,
            use_distributed_optimizer=layout.distributed_optimizer,
        )
        with cpu.cpu_device_mode():
            self.optimizer = get_megatron_optimizer(settings, [self.model])

    def train(self, first: int, last: int) -> None:
        """Steps ``first`` to ``last``, both included."""
        from megatron.core.distributed import finalize_model_grads

        for step in range(first, last + 1):
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            mine = range(self.data_rank, max(self.BATCHES_PER_STEP, self.data_ranks), self.data_ranks)
            for index in mine:
                generator = torch.Generator().manual_seed(1000 * step + index)
                x = torch.randn(4, 2, self.layout.width, generator=generator).to(self.dtype)
                (self.model(x).float().pow(2).mean() / len(mine)).backward()
            finalize_model_grads([self.model], None)
            with cpu.cpu_device_mode():
                self.optimizer.step()

    def state(self, is_loading: bool = False) -> dict[str, Any]:
        # Not DDP's own: its keys begin with "module.", which DDP.load_state_dict does not take back.
        model = self.model.module.sharded_state_dict()
        return {"model": model, "optimizer": optimizer_sharded_state(self.optimizer, model, is_loading)}

    def take(self, loaded: dict[str, Any]) -> None:
        self.model.load_state_dict(loaded["model"])
        load_optimizer_state(self.optimizer, loaded["optimizer"])

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.model.module.named_parameters()}

    def adam_steps(self) -> list[torch.Tensor]:
        """The ``step`` tensor of every parameter of this rank's shard."""
        parts = getattr(self.optimizer, "chained_optimizers", [self.optimizer])
        return [state["step"] for part in parts for state in part.optimizer.state.values()]


def _pair_class() -> type:
    """The module's class; a function, so that importing this file does not import megatron-core."""
    from megatron.core import parallel_state as ps
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.module import MegatronModule

    class Norm(MegatronModule):
        def __init__(self, config: Any, width: int) -> None:
            super().__init__(config)
            self.weight = torch.nn.Parameter(torch.ones(width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.rms_norm(x, self.weight.shape, self.weight)

    class Pair(MegatronModule):
        def __init__(self, config: Any, width: int, seed: int) -> None:
            super().__init__(config)
            options: dict[str, Any] = {"config": config, "init_method": torch.nn.init.zeros_, "bias": False}
            self.norm = Norm(config, width)
            self.up = ColumnParallelLinear(width, width, **options)
            self.down = RowParallelLinear(width, width, input_is_parallel=True, skip_bias_add=False, **options)
            rank, world = ps.get_tensor_model_parallel_rank(), ps.get_tensor_model_parallel_world_size()
            generator = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                full = torch.randn(width, width, generator=generator) * 0.3
                self.up.weight.copy_(full.chunk(world, 0)[rank])
                full = torch.randn(width, width, generator=generator) * 0.3
                self.down.weight.copy_(full.chunk(world, 1)[rank])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.up(self.norm(x))[0]))[0]

    return Pair
