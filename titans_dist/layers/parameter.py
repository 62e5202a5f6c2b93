"""Parameters that know how they start, so that one rank can make just its slice, equal on every layout."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Init = Callable[[Tensor, torch.Generator], object]


def normal(std: float) -> Init:
    """Gaussian with standard deviation `std`."""
    return lambda x, g: x.normal_(0, std, generator=g)


def uniform(bound: float) -> Init:
    """Uniform in [-bound, bound]."""
    return lambda x, g: x.uniform_(-bound, bound, generator=g)


def constant(value: float) -> Init:
    """`value` everywhere."""
    return lambda x, g: x.fill_(value)


def logit(share: float) -> float:
    """The number whose sigmoid is `share`."""
    return math.log(share / (1 - share))


class Parameter(nn.Parameter):
    """An unset parameter that carries its initial rule, and whether weight decay acts on it (matrices only).

    twin: the parameter of a sibling module, such as "q.weight", whose initial value this one has too.
    """

    init: Init
    decay: bool
    twin: str | None

    def __new__(cls, data: Tensor | None = None, requires_grad: bool = True, **rule: Any) -> Parameter:
        """`rule`: what the parameter carries, all of it or nothing; some libraries make a copy of its class from it."""
        made: Parameter = super().__new__(cls, None if data is None else data.detach(), requires_grad)
        vars(made).update(rule)
        return made


def parameter(*shape: int, init: Init, decay: bool = False, twin: str | None = None) -> Parameter:
    """An unset float32 Parameter of `shape`; see `initial_value` for how it is filled."""
    return Parameter(torch.empty(*shape), init=init, decay=decay, twin=twin)


def linear(d_in: int, d_out: int, std: float, bias: float | None = None, twin: str | None = None) -> nn.Linear:
    """A linear layer with Gaussian weights; with a constant bias where `bias` is given. `twin`: see Parameter."""
    layer = nn.Linear(d_in, d_out, bias=bias is not None)
    layer.weight = parameter(d_out, d_in, init=normal(std), decay=True, twin=twin)
    if bias is not None:
        layer.bias = parameter(d_out, init=constant(bias))
    return layer


@torch.no_grad()
def initial_value(name: str, parameter: Parameter, seed: int) -> Tensor:
    """The whole float32 parameter as it starts: a pure function of its name, its shape and the seed."""
    if parameter.twin is not None:
        path = name.split(".")
        name = ".".join([*path[: -1 - parameter.twin.count(".")], parameter.twin])
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    value = torch.empty(parameter.shape, device="cpu")
    parameter.init(value, generator)
    return value
