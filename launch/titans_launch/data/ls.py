"""`titans-dist data ls`: a table for each dataset of the configuration and below data/."""

from __future__ import annotations

from pathlib import Path

from titans_dist.config import Config, UserError
from titans_dist.run.data import dataset_paths
from titans_launch import tables
from titans_launch.data import opened

DATA = Path("data")


def run(config: Config) -> None:
    """List the configured datasets, then the others."""
    from titans_data import DataError

    listed = dataset_paths(config)
    shares = mixture_shares(config)
    for name, path in listed.items():
        title = path if name == "main" else f"{name}: {path}"
        try:
            rows = described(path, config)
        except DataError as error:
            rows = [("problem", str(error))]
        tables.show(title, [*rows, *([("share", shares[name])] if name in shares else [])])
    if not listed:
        tables.show(config.data.path or config.data.format, tokens(config))
    known = {Path(path).resolve() for path in listed.values()}
    for card in sorted([*DATA.glob("*/dataset.json"), *DATA.glob("*/*/dataset.json")]):
        if card.parent.resolve() not in known:
            try:
                tables.show(str(card.parent), described(str(card.parent), config))
            except DataError as error:
                tables.show(str(card.parent), [("problem", str(error))])


def described(path: str, config: Config) -> list[tuple[str, str]]:
    """What the card of a dataset, here or on a remote, says."""
    from titans_data import load_card

    card = load_card(opened.described(config, path))
    rows = [
        (
            name,
            f"{split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text in "
            f"{len(split.shards):,} shard{'s' * (len(split.shards) != 1)}",
        )
        for name, split in card.splits.items()
    ]
    counts, options = card.counts, card.options
    dropped = {"empty": counts.empty, "garbled lines": counts.garbled_lines, **counts.filtered}
    if options.deduplicate:
        dropped["duplicates"] = counts.duplicates
    said = ", ".join(f"{number:,} {reason}" for reason, number in dropped.items() if number)
    corpus = options.format if options.source is None else f"{options.format}, {options.source}"
    return [
        *rows,
        ("dropped", said or "nothing"),
        ("tokenizer", f"{options.tokenizer}, {card.tokenizer_fingerprint[:12]}"),
        ("vocabulary", f"{card.vocab_size:,} ids, stored as {card.dtype}"),
        ("corpus", corpus),
        ("fingerprint", card.fingerprint[:12]),
    ]


def tokens(config: Config) -> list[tuple[str, str]]:
    """What is known of a token file or of synthetic tokens."""
    from titans_dist.run.data import open_sources

    sources = {split: open_sources(config, split)["main"] for split in ("train", "validation")}
    rows = [(split, f"{source.num_tokens:,} tokens") for split, source in sources.items()]
    stored = f", stored as {config.data.dtype}" if config.data.format == "tokens" else ""
    train = sources["train"]
    return [
        *rows,
        ("vocabulary", f"{train.vocab_size:,} ids{stored}"),
        ("fingerprint", train.fingerprint[:12]),
    ]


def mixture_shares(config: Config) -> dict[str, str]:
    """The share of each source of a mixture, stage after stage; nothing where a source cannot be read."""
    from titans_data import DataError
    from titans_dist.run.data import configured_mixture, open_datasets

    if config.data.format != "mixture":
        return {}
    try:
        mixture = configured_mixture(config, open_datasets(config, "train"))
    except (UserError, DataError):
        return {}
    return {
        name: ", ".join(
            f"{stage.shares[place] / sum(stage.shares):.2%}" + (f" from step {stage.step + 1:,}" if stage.step else "")
            for stage in mixture.stages
        )
        for place, name in enumerate(mixture.names)
    }
