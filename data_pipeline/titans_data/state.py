"""The state of the data in a checkpoint: what was drawn of which dataset, and how a changed mixture goes on from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from titans_data.errors import DataError
from titans_data.mixture import Mixture, Stage, shares_of
from titans_data.schedule import Schedule


@dataclass(frozen=True)
class SourceIdentity:
    """What makes a source of a mixture the same after a resume."""

    name: str
    fingerprint: str
    tokenizer: str | None
    """Fingerprint of the tokenizer; None where the tokens do not say."""
    tokens: int
    rows: int


@dataclass(frozen=True)
class Usage:
    """What a run has drawn of one source."""

    name: str
    rows: int
    """Rows of the source."""
    drawn: int
    unread: int
    """Rows that were never drawn."""

    @property
    def repeated(self) -> int:
        """Rows drawn that had been drawn before."""
        return self.drawn - (self.rows - self.unread)


def check_sources(sources: Sequence[SourceIdentity]) -> None:
    """Raise DataError where two sources of a mixture are the same dataset or were made with different tokenizers."""
    first, names = sources[0], {sources[0].fingerprint: sources[0].name}
    for other in sources[1:]:
        same = names.setdefault(other.fingerprint, other.name)
        if same != other.name:
            raise DataError(f"{same} and {other.name} are the same dataset: name it once, with a larger weight")
        if other.tokenizer != first.tokenizer:
            raise DataError(
                f"{first.name} and {other.name} were made with different tokenizers ({_short(first.tokenizer)} and "
                f"{_short(other.tokenizer)}): prepare both with the tokenizer of one of them"
            )


def data_state(schedule: Schedule, sources: Sequence[SourceIdentity], step: int) -> dict[str, Any]:
    """What a checkpoint after `step` steps keeps: plain integers and strings, the same on every rank."""
    return {
        "step": step,
        "sources": [
            asdict(source) | {"drawn": drawn} for source, drawn in zip(sources, schedule.drawn(step), strict=True)
        ],
        "stages": [asdict(stage) for stage in schedule.mixture.stages],
    }


def resume_mixture(
    saved: dict[str, Any], configured: Mixture, sources: Sequence[SourceIdentity]
) -> tuple[Mixture, list[SourceIdentity], bool]:
    """The mixture that goes on from a saved state, its sources, and whether it differs from the one that was saved.

    What was drawn stays: stages before the saved step are those of the state, later ones those `configured`. A dataset
    is known by its fingerprint, so it may get another name. One that is no longer configured stays in the list, since
    the order of the others depends on its share, and gives nothing more.

    Raises DataError where a source is not the dataset it was, or its tokenizer not the one of the state.
    """
    step, old = saved["step"], [_identity(source) for source in saved["sources"]]
    now = {source.fingerprint: source for source in sources}
    for source in sources:
        before = next((each for each in old if each.name == source.name), None)
        if before is not None and before.fingerprint != source.fingerprint:
            raise DataError(
                f"{source.name} is not the dataset this run has read: {_difference(before, source)}; give back the "
                "old dataset, give the new one another name, or start a new run"
            )
    known = {source.fingerprint for source in old}
    merged = [now.get(source.fingerprint, source) for source in old]
    merged += [source for source in sources if source.fingerprint not in known]
    check_sources(merged)
    place = {name: configured.names.index(name) for name in configured.names}
    added = (0,) * (len(merged) - len(old))

    def extended(shares: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(shares[place[source.name]] if source.fingerprint in now else 0 for source in merged)

    past = [Stage(stage["step"], (*stage["shares"], *added)) for stage in saved["stages"] if stage["step"] < step]
    current = next(stage for stage in reversed(configured.stages) if stage.step <= step)
    stages = [*past]
    if not past or shares_of(past[-1].shares) != shares_of(extended(current.shares)):
        stages.append(Stage(step, extended(current.shares)))
    stages += [Stage(stage.step, extended(stage.shares)) for stage in configured.stages if stage.step > step]
    planned = [Stage(stage["step"], (*stage["shares"], *added)) for stage in saved["stages"]]
    mixture = Mixture([source.name for source in merged], stages, configured.global_batch)
    return mixture, merged, mixture.stages != tuple(planned)


def usage(schedule: Schedule, sources: Sequence[SourceIdentity], step: int) -> list[Usage]:
    """What was drawn of each source before `step`."""
    return [
        Usage(source.name, source.rows, drawn, unread)
        for source, drawn, unread in zip(sources, schedule.drawn(step), schedule.unread(step), strict=True)
    ]


def _identity(saved: dict[str, Any]) -> SourceIdentity:
    return SourceIdentity(**{key: value for key, value in saved.items() if key != "drawn"})


def _difference(before: SourceIdentity, now: SourceIdentity) -> str:
    if before.tokenizer != now.tokenizer:
        return f"its tokenizer is {_short(now.tokenizer)} and was {_short(before.tokenizer)}"
    if before.tokens != now.tokens:
        return f"it has {now.tokens:,} tokens and had {before.tokens:,}"
    return f"its fingerprint is {_short(now.fingerprint)} and was {_short(before.fingerprint)}"


def _short(fingerprint: str | None) -> str:
    return "unknown" if fingerprint is None else fingerprint[:12]
