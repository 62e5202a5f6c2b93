"""What differs between a checkpoint and the start that would go on from it, and what each difference means.

The rules are those of the start itself: `validate_batch`, `check_identity` and `open_training` decide here as they do
there. What none of them looks at is no reason to refuse.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from titans_dist.config import Config, UserError
from titans_dist.config.layout import model_size, validate_batch
from titans_dist.run.data import TrainingData, open_training
from titans_dist.run.identity import check_identity, flatten, identity

RESHARDS = "reshards: every process reads its part"
ROUNDING = "allowed: the same but for rounding"
OBSERVED = "allowed: training does not depend on it"
EQUIVALENT = "allowed: it means the same"
BY_FINGERPRINT = "allowed: a dataset is known by its fingerprint"
REFUSED = "refused: it would be another run"

SPLITS = ("tensor", "pipeline", "virtual", "layers", "context", "data")
"""Keys of parallel that say which process holds what."""
OTHERS = ("name", "run_dir", "inspect", "export", "drill", "conformance", "evaluation")
"""What training does not look at."""
VERDICTS = {
    **dict.fromkeys(("tracking", "cluster", "checkpoint"), OBSERVED),
    **dict.fromkeys(("data.workers", "data.fetch_ahead", "data.cache", "data.cache_gb"), OBSERVED),
    **dict.fromkeys(("training.log_interval", "training.max_minutes", "model.parameters"), OBSERVED),
    **dict.fromkeys(("training.micro_batch_size", "training.recompute", "training.offload"), ROUNDING),
    **dict.fromkeys(("training.device", "model.memory.backend"), ROUNDING),
    "data.stages": "",  # told of as the mixture
    "data": BY_FINGERPRINT,
}
"""Key or section -> what another value means. Of all others: that it counts from the next step on."""


@dataclasses.dataclass(frozen=True)
class Difference:
    """One thing that is not as it was when the checkpoint was saved."""

    what: str
    saved: str
    now: str
    verdict: str


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What would happen if the start were made."""

    differences: list[Difference]
    refusal: Exception | None
    """What the start would end with, if it would refuse: a UserError or DataError."""
    data: TrainingData | None
    """The rows and their order, if it would not."""


def explain(meta: dict[str, Any], config: Config, copies: int, versions: dict[str, str], step: int) -> Explanation:
    """Compare what the checkpoint of `step` says with a start of `copies` data-parallel copies of the model."""
    from titans_data import DataError

    found = _job(meta.get("job") or {}, config, copies, versions, step)
    found += _settings(meta, config, step)
    refusals: list[Exception] = []
    data: TrainingData | None = None
    try:
        validate_batch(config, copies)
    except UserError as error:
        refusals.append(error)
    try:
        check_identity(meta["identity"], identity(config), config.run_dir)
    except UserError as error:
        refusals.append(error)
    try:
        data = open_training(config, meta.get("data"))
        found += _data(meta.get("data"), data, step)
    except (UserError, DataError) as error:
        found.append(Difference("data", "", "", f"refused: {error}"))
        refusals.append(error)
    return Explanation(found, refusals[0] if refusals else None, None if refusals else data)


def _job(job: dict[str, Any], config: Config, copies: int, versions: dict[str, str], step: int) -> list[Difference]:
    """Processes, layout, engine and code; nothing where the checkpoint does not say."""
    training = config.training
    layout = dataclasses.asdict(config.parallel) | {"data": copies}
    now = {
        "processes": (model_size(config.parallel) * copies, RESHARDS),
        **{f"parallel.{key}": (value, RESHARDS if key in SPLITS else ROUNDING) for key, value in layout.items()},
        "training.engine": (training.engine, RESHARDS),
        "training.zero_stage": (training.zero_stage if training.engine == "deepspeed" else None, RESHARDS),
        "training.precision": (training.precision, _later(step)),
        **{f"version of {name}": (version, ROUNDING) for name, version in versions.items()},
    }
    saved = {
        "processes": job.get("world"),
        **{f"parallel.{key}": value for key, value in job.get("layout", {}).items()},
        **{f"training.{key}": job.get(key) for key in ("engine", "zero_stage", "precision")},
        **{f"version of {name}": version for name, version in job.get("versions", {}).items()},
    }
    if not job:
        return []
    return [
        Difference(key, _text(saved.get(key)), _text(value), verdict)
        for key, (value, verdict) in now.items()
        if saved.get(key) != value
    ]


def _settings(meta: dict[str, Any], config: Config, step: int) -> list[Difference]:
    """Keys of the configuration, those of the identity first."""
    before, after = meta["identity"], identity(config)
    found = [
        Difference(key, _text(before.get(key)), _text(after.get(key)), REFUSED)
        for key in {**before, **after}
        if before.get(key) != after.get(key)
    ]
    # As JSON, which is how the checkpoint keeps it.
    now = flatten(json.loads(json.dumps(dataclasses.asdict(config))))
    saved = flatten(meta.get("config") or {})
    told = {each.what for each in found}
    told |= {"training.engine", "training.zero_stage", "training.precision"}  # by the job
    for key in {**saved, **now} if saved else {}:
        if key in told or key.startswith("parallel.") or _below(key, OTHERS) or saved.get(key) == now.get(key):
            continue
        verdict = (
            EQUIVALENT if key in after else next((VERDICTS[k] for k in VERDICTS if _below(key, (k,))), _later(step))
        )
        if verdict:
            found.append(Difference(key, _text(saved.get(key)), _text(now.get(key)), verdict))
    return found


def _data(saved: dict[str, Any] | None, data: TrainingData, step: int) -> list[Difference]:
    """Datasets with another name, and another mixture."""
    if saved is None:
        return []
    names = {source.fingerprint: source.name for source in data.sources}
    found = [
        Difference("name of a dataset", source["name"], names[source["fingerprint"]], BY_FINGERPRINT)
        for source in saved["sources"]
        if names[source["fingerprint"]] != source["name"]
    ]
    if data.is_edited:
        ahead = saved["step"] - step  # what was left out by going back
        old = [(stage["step"] - ahead, stage["shares"]) for stage in saved["stages"]]
        new = [(stage.step - ahead, stage.shares) for stage in data.schedule.mixture.stages]
        before = _mixture([source["name"] for source in saved["sources"]], old, step)
        found.append(Difference("mixture", before, _mixture(data.schedule.mixture.names, new, step), _later(step)))
    return found


def _mixture(names: Sequence[str], stages: list[tuple[int, Any]], step: int) -> str:
    """The shares after `step` and of every stage that begins later."""
    current = max(i for i, (begin, _) in enumerate(stages) if begin <= step)
    words = []
    for begin, shares in stages[current:]:
        parts = [f"{name} {share / sum(shares):.2%}" for name, share in zip(names, shares, strict=True) if share]
        words.append((f"from step {begin + 1:,} " if begin > step else "") + ", ".join(parts))
    return "; ".join(words)


def _later(step: int) -> str:
    return f"from step {step + 1:,} on"


def _below(key: str, sections: tuple[str, ...]) -> bool:
    return any(key == section or key.startswith(section + ".") for section in sections)


def _text(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else json.dumps(value)
