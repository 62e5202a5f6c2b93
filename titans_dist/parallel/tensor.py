"""Tensor parallelism: a model's declarative plan, carried out with megatron-core's layers.

Between two regions the residual stream is whole (B, T, hidden), or with sequence parallelism split along time in
megatron-core's layout (T / tp, B, hidden). Nothing in a block looks at that shape but the modules swapped here:
the norm at a region's entrance gives (B, T, hidden), the row-parallel layer at its end goes back. So each region
costs two collectives forward and two backward, whatever is inside.
"""

from __future__ import annotations

from dataclasses import replace

from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from titans_dist.layers.parameter import Parameter, initial_value
from titans_dist.model import LanguageModel, planned
from titans_dist.parallel.full_width import InputLinear, share_out_hidden_units
from titans_dist.parallel.pipeline import whole_name
from titans_dist.parallel.regions import enter

# The dimension of a parameter that is split, by what its plan calls it.
AXES = {"column": 0, "row": 1, "heads": 0, "vocabulary": 0}
# Of "input" the weight alone is split, of "hidden" the first layer's outputs and the second one's inputs.
AXES_BY_NAME = {"input": {"weight": 1}, "hidden": {"0": 2, "1": 1}}


class ColumnLinear(ColumnParallelLinear):
    """(B, T, d_in) whole -> (B, T, d_out / tp). The region's entrance sums the gradient of its input."""

    def __init__(self, layer: nn.Linear, config: ModelParallelConfig) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            config=replace(config, sequence_parallel=False),
            init_method=None,
            bias=layer.bias is not None,
            disable_grad_reduce=True,
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[0]


class RowLinear(RowParallelLinear):
    """(B, T, d_in / tp) -> the residual stream: summed over processes, and split along time where that is on."""

    def __init__(self, layer: nn.Linear, config: ModelParallelConfig) -> None:
        super().__init__(
            layer.in_features,
            layer.out_features,
            config=config,
            init_method=None,
            bias=False,
            input_is_parallel=True,
            skip_bias_add=False,
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1) if self.sequence_parallel else x)[0]


def build_parallel(model: LanguageModel, config: ModelParallelConfig, group: ProcessGroup, seed: int) -> None:
    """Turn `model`, made on the meta device, into this rank's part of it, on the CPU and initialized.

    Every parameter is a slice of the whole one that `build_model(config, seed)` makes, so every layout starts from
    the same weights, and no process ever holds more than one whole parameter.
    """
    size, rank = group.size(), group.rank()
    wholes = {name: value for name, value in model.named_parameters() if isinstance(value, Parameter)}
    axes = split_axes(model, size)
    partial = {"shared": "", "norm": ".weight"}  # with sequence parallelism, each rank has a part of their gradient
    summed = {f"{path}.{c}".lstrip(".") + partial[kind] for path, _, c, kind in planned(model, size) if kind in partial}
    if size > 1:
        for _, module, child, kind in list(planned(model, size)):
            _swap(module, child, kind, config)
    if size > model.config.num_heads:
        share_out_hidden_units(model)
    for name, whole in wholes.items():
        axis = axes.get(name)
        value = initial_value(whole_name(name, model.config), whole, seed)
        if axis is not None:
            value = value.chunk(size, axis)[rank].clone()
        made = nn.Parameter(value)
        made.no_decay = not whole.decay  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(made, axis is not None and size > 1, -1 if axis is None else axis, 1)
        if config.sequence_parallel and name in summed:
            made.sequence_parallel = True  # type: ignore[attr-defined]
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, made)
    for name, constant in list(model.named_buffers()):
        if name in axes:
            path, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(path), leaf, constant.chunk(size, axes[name])[rank].clone())
    if model.embedding is not None and model.head is not None:
        model.tie_embeddings()


def split_axes(model: LanguageModel, size: int) -> dict[str, int]:
    """The split dimension of every parameter and buffer that has one, by its name."""
    axes = {}
    for path, module, child, kind in planned(model, size):
        prefix, target = f"{path}.{child}".lstrip("."), getattr(module, child)
        if kind in AXES:
            names = [n for n, _ in target.named_parameters()] if isinstance(target, nn.Module) else [""]
            axes.update({f"{prefix}.{n}".rstrip("."): AXES[kind] for n in names})
        for name, axis in AXES_BY_NAME.get(kind, {}).items():
            axes[f"{prefix}.{name}"] = axis
    return axes


def _swap(module: nn.Module, child: str, kind: str, config: ModelParallelConfig) -> None:
    target = getattr(module, child)
    if kind == "column":
        setattr(module, child, ColumnLinear(target, config))
    elif kind == "row":
        setattr(module, child, RowLinear(target, config))
    elif kind == "input":
        setattr(module, child, InputLinear(target))
    elif kind == "vocabulary":
        embedding = VocabParallelEmbedding(
            target.num_embeddings,
            target.embedding_dim,
            init_method=None,
            config=config,
            reduce_scatter_embeddings=config.sequence_parallel,
        )
        setattr(module, child, embedding)
    elif kind == "norm":
        target.register_forward_hook(_enter_sequence_parallel if config.sequence_parallel else _enter)
    elif kind == "shared" and not config.sequence_parallel:
        module.register_forward_hook(_enter)


def _enter(module: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """The same tensor on every rank, whose gradient is the sum over them."""
    return enter(x)


def _enter_sequence_parallel(module: nn.Module, args: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """(T / tp, B, hidden) of each rank -> the whole (B, T, hidden)."""
    return gather_from_sequence_parallel_region(x).transpose(0, 1)
