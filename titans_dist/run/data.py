"""From the data configuration to rows of tokens, and to their order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from titans_dist.config import Config, ConfigError
from titans_dist.config.mixture import rows_of, stage_steps

if TYPE_CHECKING:
    from titans_data import Mixture, Rows, Schedule, SourceIdentity, TokenDataset, TokenSource
    from titans_data.tokenize import Tokenizer


@dataclass
class TrainingData:
    """The rows a run is trained on, and which of them each step reads."""

    rows: Rows
    schedule: Schedule
    sources: list[SourceIdentity]
    is_edited: bool = False
    """Whether the mixture is not the one of the checkpoint that is resumed."""

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps keeps of the data."""
        from titans_data import data_state

        return data_state(self.schedule, self.sources, step)


def left_out(health: dict[str, Any] | None, step: int) -> int:
    """Steps whose data `step` has passed over, out of the state of `health` in a checkpoint, or the next ones will.

    >>> [left_out({"detours": [[50, 20], [40, 35]]}, step) for step in (40, 41, 60)]
    [0, 35, 35]
    """
    behind = [count for target, count in (health or {}).get("detours", []) if target < step]
    return behind[-1] if behind else 0


def open_training(config: Config, saved: dict[str, Any] | None = None) -> TrainingData:
    """The rows and their order, from the start or from the state that a checkpoint has kept.

    Raises DataError for data that is missing, damaged or not the data of the state, ConfigError for a vocabulary the
    model does not have.
    """
    from titans_data import (
        BatchSchedule,
        MixedDataset,
        RowOrder,
        StreamSchedule,
        check_sources,
        resume_mixture,
        source_seed,
    )

    data = config.data
    datasets = open_datasets(config, "train")
    sources = [identity(name, dataset) for name, dataset in datasets.items()]
    check_sources(sources)
    mixture, edited = configured_mixture(config, datasets), False
    if saved is not None:
        mixture, sources, edited = resume_mixture(saved, mixture, sources)
    rows = MixedDataset([datasets.get(source.name, source.rows) for source in sources])
    seeds = [source_seed(data.seed, source.fingerprint) for source in sources]
    if config.training.carry_state:
        schedule: Schedule = StreamSchedule(mixture, [source.rows for source in sources], seeds)
    else:
        orders = [
            RowOrder(source.rows, seed, datasets[source.name].shards, data.shuffle_shards)
            if source.name in datasets
            else RowOrder(source.rows, seed)
            for source, seed in zip(sources, seeds, strict=True)
        ]
        schedule = BatchSchedule(mixture, orders)
    return TrainingData(rows, schedule, sources, edited)


def open_rows(config: Config, split: str) -> Rows:
    """The `train` or `validation` rows of sequence_length + 1 tokens, those of one source after those of another.

    A prepared dataset has both splits; of a token file or synthetic tokens the end is held out.
    Raises DataError for data that is missing or damaged, ConfigError for a vocabulary the model does not have.
    """
    from titans_data import MixedDataset

    return MixedDataset(list(open_datasets(config, split).values()))


def open_datasets(config: Config, split: str) -> dict[str, TokenDataset]:
    """The rows of a split of each source, by its name; the only source of anything but a mixture is called main."""
    from titans_data import TokenDataset

    length, packed = config.data.sequence_length, config.data.documents == "packed"
    datasets = {}
    for name, source in open_sources(config, split).items():
        if source.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"the data has {source.vocab_size} token ids but model.vocab_size={config.model.vocab_size}; "
                f"use model.vocab_size={-(-source.vocab_size // 64) * 64} or data of a smaller vocabulary"
            )
        datasets[name] = TokenDataset(source, length, packed)
    return datasets


def identity(name: str, dataset: TokenDataset) -> SourceIdentity:
    """What makes a source the same after a resume."""
    from titans_data import SourceIdentity

    source = dataset.source
    return SourceIdentity(name, source.fingerprint, source.tokenizer, source.num_tokens, len(dataset))


def configured_mixture(config: Config, datasets: dict[str, TokenDataset]) -> Mixture:
    """The mixture of data.stages; without any, every source by its size."""
    from titans_data import Mixture, Stage, shares_of

    names = list(datasets)
    stages = [Stage(0, shares_of([len(dataset) for dataset in datasets.values()]))]
    if config.data.stages:
        stages = []
        for stage, step in zip(config.data.stages, stage_steps(config), strict=True):
            wanted = stage.weights or {name: rows_of(tokens, config) for name, tokens in stage.tokens.items()}
            stages.append(Stage(step, shares_of([wanted.get(name, 0) for name in names])))
    return Mixture(names, stages, config.training.global_batch_size)


def dataset_paths(config: Config) -> dict[str, str]:
    """The folder or address of each prepared dataset, by its name; none for a token file or synthetic tokens."""
    data = config.data
    if data.format in ("tokens", "synthetic"):
        return {}
    return dict(data.sources) if data.format == "mixture" else {"main": data.path}


def open_tokenizer(config: Config, source: str) -> Tokenizer | None:
    """The tokenizer that a source was made with, where it has one."""
    path, data = dataset_paths(config).get(source), config.data
    if path is None:
        return None
    from titans_data import load_tokenizer
    from titans_data.card import TOKENIZER_FOLDER
    from titans_data.files import local_folder

    return load_tokenizer(local_folder(path, data.cache, int(data.cache_gb * 1e9)) / TOKENIZER_FOLDER)


def open_sources(config: Config, split: str) -> dict[str, TokenSource]:
    """The token stream of a split of each source, by its name."""
    import titans_data

    data = config.data
    if data.format not in ("tokens", "synthetic"):
        return {
            name: titans_data.MdsSource(path, split, cache=data.cache, cache_bytes=int(data.cache_gb * 1e9))
            for name, path in dataset_paths(config).items()
        }
    whole: TokenSource
    if data.format == "tokens":
        whole = titans_data.TokenFileSource(data.path, data.dtype, data.vocab_size, data.end_of_document)
    else:
        whole = titans_data.SyntheticSource(data.vocab_size, data.synthetic_tokens, data.seed)
    held_out = int(whole.num_tokens * data.validation_fraction)
    cut = whole.num_tokens - held_out
    span = (0, cut) if split == "train" else (cut, held_out)
    return {"main": titans_data.SpanSource(whole, *span)}
