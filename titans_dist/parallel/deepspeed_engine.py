"""The training engine on DeepSpeed: ZeRO stages 0 to 3, on megatron-core's tensor and context parallel model.

ZeRO splits over the data-parallel and the context-parallel processes together: both hold the same parameters, and the
mean over both is the mean over all tokens. What this file needs from inside DeepSpeed 0.19.8, beyond its public
functions, is in `_flat_masters` and `_make_moments`.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, redirect_stdout
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import is_main_replica
from torch import Tensor, nn

from titans_dist.config import Config, ConfigError
from titans_dist.layers.inner_memory import InnerMemory
from titans_dist.layers.telemetry import Records, collect
from titans_dist.model import ModelState
from titans_dist.parallel.carried import CarriedState, carried_sharded_state, load_carried
from titans_dist.parallel.culprit import find_culprit
from titans_dist.parallel.learning_rate import learning_rate_schedule, step_learning_rate
from titans_dist.parallel.results import Judge, Poll, StepResult, first_memories, is_finite
from titans_dist.parallel.rng import load_rng, rng_sharded_state
from titans_dist.parallel.schedule import is_first_pipeline, mean_loss
from titans_dist.parallel.stage import MicroBatch, build_stages, in_precision, sharded_parameter, stage_inputs

BUCKET = 50_000_000
"""Numbers that are reduced together, at most."""
KEPT_WHOLE = 100_000
"""ZeRO-3 splits parameters of more numbers than this; to fetch smaller ones costs more than they take."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeedEngine:
    """The parallel model with its optimizer. Every method is collective: all ranks call it."""

    copies: tuple[str, ...] = ("optimizer.state.",)
    """Of what `sharded_state` gives, the beginnings of the keys of tensors that are copies; the others are live."""

    def __init__(self, config: Config, device: torch.device) -> None:
        deepspeed = import_deepspeed(device)
        self.device, self._zero = device, config.training.zero_stage
        self._clip = config.optimizer.clip_grad
        self.stages = build_stages(config, device)  # one: there is no pipeline
        self._model = self.stages[0].model
        # Made while the parameters that it looks at are whole.
        self.carried = [CarriedState(config, self._model)] if config.training.carry_state else None
        for value in self._model.parameters():
            if getattr(value, "sequence_parallel", False):
                value.register_hook(_sum_over_tensor_group)
        self._adam = _adam(config, self._model)
        with redirect_stdout(io.StringIO()):  # one of its optimizers prints how much memory it takes
            self.engine, *_ = deepspeed.initialize(
                model=in_precision(self.stages[0]),
                optimizer=self._adam,
                config=_settings(config, device, sum(value.numel() for value in self._model.parameters())),
                mpu=Mpu(),
                dist_init_required=False,
            )
        self._values = _Values(deepspeed, self.engine, self._adam, self._zero)
        self.scheduler = learning_rate_schedule(config, self._adam)
        self.observes = False
        """Whether the next step looks into the memories, as far as they are those of rank 0's pipeline."""
        self.lr_scale = 1.0
        """What the schedule's learning rate is multiplied by."""
        self._records: Records | None = None

    @property
    def data_rank(self) -> int:
        """Which share of the batch this rank reads."""
        return parallel_state.get_data_parallel_rank()

    @property
    def data_size(self) -> int:
        """Into how many shares the batch is split."""
        return parallel_state.get_data_parallel_world_size()

    def step(self, batches: list[MicroBatch], judge: Judge = is_finite, poll: Poll | None = None) -> StepResult:
        """One optimizer step on this rank's micro-batches, each `tokens` (b, T + 1) and, if packed, `starts` (b, T).

        `judge` decides whether the update is made; from ZeRO-1 on DeepSpeed makes every update that is finite, and
        `judge` is only told. `poll` is not called: DeepSpeed has no way back from a step that is half done.
        """
        carried = [state.kept() for state in self.carried or []]
        losses = self._backward(batches)
        step_learning_rate(self.scheduler, self.lr_scale)
        loss = mean_loss(losses, self.device)
        grad_norm, is_applied = self._update(lambda norm: judge(loss, norm))
        if not is_applied:
            self._restore(carried)
        lr = next(group["lr"] for group in self._adam.param_groups)
        records, self._records = self._records, None
        memories = first_memories(self.stages, [records]) if self.observes else None
        return StepResult(loss, grad_norm, float(lr), is_applied, memories)

    def culprit(self, batches: list[MicroBatch]) -> str:
        """What was the first thing not finite in the last step, which was on `batches` and so changed nothing."""
        carried = [state.kept() for state in self.carried or []]
        largest = self._largest_gradients(batches)
        self._restore(carried)

        def forward() -> None:
            for number, batch in enumerate(batches):
                self._forward(number, batch)

        found = find_culprit([self._model], forward, lambda value: largest[value])
        self._restore(carried)
        return found

    def _restore(self, carried: list[list[ModelState]]) -> None:
        for state, kept in zip(self.carried or [], carried, strict=True):
            state.restore(kept)

    def _backward(self, batches: list[MicroBatch]) -> list[Tensor]:
        """Every micro-batch's mean loss; the sum of their gradients is on its way to the optimizer."""
        losses = []
        for number, batch in enumerate(batches):
            self.engine.set_gradient_accumulation_boundary(number == len(batches) - 1)
            loss = self._forward(number, batch).mean()
            losses.append(loss.detach())
            # A loss that is not finite must not leave a gradient that is: the step would be made.
            guard = torch.where(losses[-1].isfinite(), 1.0, math.nan)
            self.engine.backward(guard * loss / len(batches), scale_wrt_gas=False)
        return losses

    def _forward(self, number: int, batch: MicroBatch) -> Tensor:
        """The losses of all tokens of a micro-batch."""
        inputs = stage_inputs(batch, self.device)
        with ExitStack() as stack:
            looks = self.observes and number == 0 and torch.is_grad_enabled()
            if looks and is_first_pipeline():
                self._records = stack.enter_context(collect())
            if self.carried is None:
                losses = self.engine(*inputs)
            else:
                losses, self.carried[0][number] = self.engine(*inputs, self.carried[0][number])
                if torch.is_grad_enabled():
                    losses = _WithZeros.apply(losses, *self._model.parameters())
            if looks:
                # What has been seen is worked out when the stack ends, with the memories' own parameters.
                memories = [module for module in self._model.modules() if isinstance(module, InnerMemory)]
                with self._values.gathered([value for memory in memories for value in memory.parameters()]):
                    stack.close()
        return losses

    def _update(self, judge: Callable[[float], bool]) -> tuple[float, bool]:
        """The optimizer's step, as far as `judge` has a say; the gradient norm, and whether the step was made."""
        if self._zero > 0:
            self.engine.step()
            is_applied = bool(self.engine.was_step_applied())
            norm = float(self.engine.get_global_grad_norm()) if is_applied else math.inf
            judge(norm)
            return norm, is_applied
        gradients = [value.grad for value in self._model.parameters() if value.grad is not None]
        norm = self._norm()
        is_applied = judge(norm)
        if is_applied:
            if self._clip > 0 and norm > self._clip:
                torch._foreach_mul_(gradients, self._clip / (norm + 1e-6))
            self.engine.step()
        self.engine.zero_grad()
        return norm, is_applied

    def _norm(self) -> float:
        """The norm of a gradient that is whole on every data-parallel rank: without ZeRO, DeepSpeed gives none."""
        counted = [
            value.grad
            for value in self._model.parameters()
            if value.grad is not None
            and (value.tensor_model_parallel or parallel_state.get_tensor_model_parallel_rank() == 0)  # type: ignore[attr-defined]
        ]
        square = torch.zeros((), device=self.device)
        if counted:
            square = torch.stack(torch._foreach_norm(counted)).square().sum()
        dist.all_reduce(square, group=parallel_state.get_tensor_model_parallel_group())
        return math.sqrt(value) if math.isfinite(value := square.item()) else value

    def _largest_gradients(self, batches: list[MicroBatch]) -> dict[nn.Parameter, Tensor]:
        """The largest size in each parameter's gradient on this rank. The step is not made."""
        largest = {value: torch.zeros((), device=self.device) for value in self._model.parameters()}

        def look(value: nn.Parameter, gradient: Tensor) -> Tensor:
            largest[value] = torch.maximum(largest[value], gradient.detach().abs().max().float())
            return torch.full_like(gradient, math.nan)  # DeepSpeed drops it, with all that it has collected

        handles = [value.register_hook(lambda g, value=value: look(value, g)) for value in largest]
        try:
            self._backward(batches)
        finally:
            for handle in handles:
                handle.remove()
        self._update(math.isfinite)
        return largest

    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        """Model, optimizer and carried state as this rank's part of a sharded checkpoint.

        Keys and layout are those of the engine on megatron-core: either goes on from a checkpoint of the other.
        """
        model, moments = {}, {}
        for name, value in self._model.named_parameters():
            model[name] = self._part(value, None, name, is_loading)
            moments[name] = {
                what: self._part(value, what, f"optimizer.state.{what}.{name}", is_loading)
                for what in ("param", *MOMENTS)
            }
        groups = [{key: group[key] for key in group if key != "params"} for group in self._adam.param_groups]
        optimizer: dict[str, Any] = {
            "optimizer": {"param_groups": [{**group, "step": self._values.adam_step} for group in groups]},
            "param_state": moments,
            "param_state_sharding_type": "fully_reshardable",
        }
        state: dict[str, Any] = {"model": model, "optimizer": optimizer, "rng": rng_sharded_state()}
        if self.carried is not None:
            state["carried"] = carried_sharded_state(self.carried)
        return state

    def _part(self, value: nn.Parameter, what: str | None, key: str, is_loading: bool) -> Any:
        """A parameter or its state under `key`; of what another rank writes, or a load fills, no copy is made."""
        shape, dtype = self._values.shape(value), value.dtype if what is None else torch.float32
        part = sharded_parameter(value, torch.empty((), dtype=dtype).expand(shape), key)
        if is_loading:
            part.data = torch.empty(shape, dtype=dtype)
        else:
            whole = self._values.get(value, what)
            if is_main_replica(part.replica_id):
                part.data = whole.to("cpu", copy=True)
        return part

    def load(self, loaded: dict[str, Any], step: int) -> None:
        """Continue after `step` from a loaded `sharded_state`."""
        load_rng(loaded["rng"])
        if self.carried is not None:
            load_carried(self.carried, loaded["carried"])
        for name, value in self._model.named_parameters():
            self._values.set(value, None, loaded["model"][name])
            for what, whole in loaded["optimizer"]["param_state"][name].items():
                self._values.set(value, what, whole)
        # Settings of the groups that the checkpoint has are those of another start: this one's count.
        self._values.adam_step = float(loaded["optimizer"]["optimizer"]["param_groups"][0]["step"])
        self.scheduler.num_steps = step


class Mpu:
    """What DeepSpeed asks about the layout. Its data-parallel group are all processes with the same parameters."""

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_world_size(self) -> int:
        return self.get_data_parallel_group().size()

    def get_data_parallel_rank(self) -> int:
        return self.get_data_parallel_group().rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return parallel_state.get_tensor_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        return self.get_model_parallel_group().size()

    def get_model_parallel_rank(self) -> int:
        return self.get_model_parallel_group().rank()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


class _Values:
    """The whole parameters of this rank with their masters and moments, wherever DeepSpeed keeps the parts of them."""

    def __init__(self, deepspeed: Any, engine: Any, adam: torch.optim.AdamW, zero: int) -> None:
        self._deepspeed, self._adam, self._zero = deepspeed, adam, zero
        self._masters = _flat_masters(engine, adam)
        _make_moments(engine, adam, self._masters)

    @property
    def adam_step(self) -> float:
        """Steps that Adam has made."""
        return float(self._adam.state[self._masters[0]]["step"])

    @adam_step.setter
    def adam_step(self, step: float) -> None:
        for master in self._masters:
            self._adam.state[master]["step"] = torch.tensor(step)

    def shape(self, value: nn.Parameter) -> torch.Size:
        """Of the whole parameter, whether it is there or not."""
        return torch.Size(getattr(value, "ds_shape", value.shape))

    def gathered(self, values: list[nn.Parameter], by: int | None = None) -> AbstractContextManager[Any]:
        """The values are whole in the block; what rank `by` of the group makes of them stays."""
        if self._zero < 3 or not values:
            return nullcontext()
        context: AbstractContextManager[Any] = self._deepspeed.zero.GatheredParameters(values, modifier_rank=by)
        return context

    def get(self, value: nn.Parameter, what: str | None) -> Tensor:
        """The parameter itself (None), its float32 master ("param") or a moment. Collective."""
        whole: Tensor
        if what is None:
            with self.gathered([value]):
                return value.detach().clone()
        if self._zero == 0:
            whole = value.detach() if what == "param" else self._adam.state[value][what]
        elif what == "param":
            whole = self._deepspeed.utils.safe_get_full_fp32_param(value)
        else:
            whole = self._deepspeed.utils.safe_get_full_optimizer_state(value, what)
        return whole

    def set(self, value: nn.Parameter, what: str | None, whole: Tensor) -> None:
        """The counterpart of `get`. Collective."""
        if what is None:
            with torch.no_grad(), self.gathered([value], by=0):
                value.copy_(whole)
        elif self._zero == 0:
            (value.detach() if what == "param" else self._adam.state[value][what]).copy_(whole)
        elif self._zero == 3:
            self._set_share(value, what, whole)
        elif what == "param":
            self._deepspeed.utils.safe_set_full_fp32_param(value, whole)
        else:
            self._deepspeed.utils.safe_set_full_optimizer_state(value, whole, what)

    def _set_share(self, value: nn.Parameter, what: str, whole: Tensor) -> None:
        """With ZeRO-3. DeepSpeed's setter of the whole fails where the last share is padded."""
        size = value.ds_tensor.ds_numel  # type: ignore[attr-defined]
        padded = nn.functional.pad(whole.flatten(), (0, size * Mpu().get_data_parallel_world_size() - whole.numel()))
        share = padded.narrow(0, size * Mpu().get_data_parallel_rank(), size)
        if what == "param":
            self._deepspeed.utils.safe_set_local_fp32_param(value, share)
        else:
            self._deepspeed.utils.safe_set_local_optimizer_state(value, share, what)


def _flat_masters(engine: Any, adam: torch.optim.AdamW) -> list[Tensor]:
    """What Adam really steps: this rank's share of the float32 parameters, or without ZeRO the parameters."""
    for name in (
        "single_partition_of_fp32_groups",  # ZeRO 1 and 2
        "fp32_groups_flat_partition",  # ZeRO 1 of bfloat16 parameters
        "fp32_partitioned_groups_flat",  # ZeRO 3
    ):
        if hasattr(engine.optimizer, name):
            return list(getattr(engine.optimizer, name))
    return [value for group in adam.param_groups for value in group["params"]]


def _make_moments(engine: Any, adam: torch.optim.AdamW, masters: list[Tensor]) -> None:
    """What Adam's first step would make: a checkpoint may be loaded, or saved, before it."""
    for master in masters:
        adam.state[master] = {"step": torch.tensor(0.0)}
        for moment in MOMENTS:
            adam.state[master][moment] = torch.zeros_like(master, memory_format=torch.preserve_format)
    if hasattr(engine.optimizer, "_lazy_init_hp_params_optimizer_state"):
        engine.optimizer._lazy_init_hp_params_optimizer_state()


class _WithZeros(torch.autograd.Function):
    """Losses, with a gradient of 0 for every parameter.

    Where no document begins, what it begins with has no gradient at all; DeepSpeed reduces what has one, and other
    ranks would reduce something else with it.
    """

    @staticmethod
    def forward(ctx: Any, losses: Tensor, *values: Tensor) -> Tensor:
        ctx.zeros = [torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape) for x in values]
        return losses.view_as(losses)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0], *ctx.zeros


def _sum_over_tensor_group(gradient: Tensor) -> Tensor:
    """Of what works on shares of the sequence, each rank has the gradient of its share."""
    total = gradient.float()
    total = total.clone() if total is gradient else total
    dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
    return total.to(gradient.dtype)


def import_deepspeed(device: torch.device) -> Any:
    """The package, told where it runs. Raises ConfigError where it is not installed."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError:
        raise ConfigError(
            "training.engine=deepspeed needs the package deepspeed; pip install titans-dist[deepspeed], "
            "or use training.engine=megatron"
        ) from None
    deepspeed.utils.logger.setLevel("ERROR")
    # No extension is used; to look which could be compiled, and to compile one for gloo, takes a minute, and prints.
    deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


def _adam(config: Config, model: nn.Module) -> torch.optim.AdamW:
    """AdamW with two groups, whose settings are called as megatron-core calls those of its groups."""
    settings = config.optimizer
    shared = {
        "lr": settings.lr,
        "max_lr": settings.lr,
        "min_lr": settings.lr * settings.min_lr_ratio,
        "lr_mult": 1.0,
        "is_decoupled_lr": False,
        "is_expert_parallel": False,
        "default_config": True,
    }
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for value in model.parameters():
        (others if value.no_decay else decayed).append(value)  # type: ignore[attr-defined]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "wd_mult": 1.0, **shared},
        {"params": others, "wd_mult": 0.0, **shared},
    ]
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def _settings(config: Config, device: torch.device, count: int) -> dict[str, Any]:
    """DeepSpeed's configuration, for a model of which this rank has `count` numbers."""
    training = config.training
    zero: dict[str, Any] = {
        "stage": training.zero_stage,
        "reduce_bucket_size": min(BUCKET, count),
        "allgather_bucket_size": BUCKET,
        "stage3_param_persistence_threshold": KEPT_WHOLE,
    }
    if training.offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    copies = parallel_state.get_data_parallel_world_size()
    return {
        "train_micro_batch_size_per_gpu": training.micro_batch_size,
        "gradient_accumulation_steps": max(1, training.global_batch_size // training.micro_batch_size // copies),
        "zero_optimization": zero,
        # torch's AdamW steps offloaded parameters too; DeepSpeed's own has to be compiled first.
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": config.optimizer.clip_grad if training.zero_stage > 0 else 0.0,
        "bf16": {"enabled": training.precision == "bfloat16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "steps_per_print": None,
    }
