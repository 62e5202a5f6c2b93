"""`titans-dist data stats`: what the tokens of each dataset are, as tables, JSON and a plot."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from titans_dist.config import Config
from titans_launch import tables
from titans_launch.data import opened

if TYPE_CHECKING:
    from titans_data import TokenSource
    from titans_data.census import Census

FREQUENT = 20
BAR = 50
"""Characters of the longest bar."""


def run(config: Config) -> None:
    """Count each dataset and leave the numbers and a plot in the run folder."""
    from titans_data.census import take_census
    from titans_dist.run.data import open_sources, open_tokenizer

    reports = Path(config.run_dir) / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    for name, source in open_sources(config, "train").items():
        census = take_census(source, config.inspect.max_tokens)
        numbers = measured(census, source, config.data.sequence_length)
        tokenizer = open_tokenizer(config, name)
        numbers["most_frequent"] = [
            {"id": token, "text": tokenizer.decode([token]) if tokenizer else None, "share": share}
            for token, share in census.most_frequent(FREQUENT)
        ]
        path = reports / f"data-{name.replace('/', '_')}.json"
        path.write_text(json.dumps({"dataset": opened.label(config, name), **numbers}, indent=1) + "\n")
        picture = path.with_suffix(".png")
        drawn = plot(census, opened.label(config, name), config.data.sequence_length, picture)
        written = f"{tables.place(path)}" + (f", {tables.place(picture)}" if drawn else "; no plot without matplotlib")
        show(opened.label(config, name), numbers, census, written)


def measured(census: Census, source: TokenSource, sequence_length: int) -> dict[str, Any]:
    """The numbers of a report."""
    lengths = census.lengths
    found: dict[str, Any] = {
        "tokens": census.num_tokens,
        "tokens_read": census.read,
        "documents_read": len(lengths),
        "documents_unended": census.unended,
    }
    if len(lengths):
        found["document_tokens"] = {
            "min": int(lengths[0]),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "p90": float(np.percentile(lengths, 90)),
            "p99": float(np.percentile(lengths, 99)),
            "max": int(lengths[-1]),
        }
    return {
        **found,
        "sequence_length": sequence_length,
        "documents_longer_than_a_sequence": census.longer_than(sequence_length),
        "bytes_per_token": source.bytes_per_token,
        "vocab_size": source.vocab_size,
        "ids_seen": int((census.counts > 0).sum()),
        "entropy_bits": census.entropy,
    }


def show(label: str, numbers: dict[str, Any], census: Census, written: str) -> None:
    """Print the tables of one dataset."""
    vocabulary, read = numbers["vocab_size"], numbers["tokens_read"]
    documents = f"{numbers['documents_read']:,} begin there"
    if numbers["documents_unended"]:
        documents += f", {numbers['documents_unended']:,} of them not followed to their end"
    ratio = numbers["bytes_per_token"]
    tables.show(
        label,
        [
            ("tokens", f"{read:,} of {numbers['tokens']:,} read"),
            ("documents", documents),
            *[(f"tokens per document, {name}", f"{value:,.6g}") for name, value in document_tokens(numbers)],
            ("longer than a sequence", f"{numbers['documents_longer_than_a_sequence']:.1%} of the documents"),
            ("bytes per token", "unknown" if ratio is None else f"{ratio:.3f}"),
            ("ids seen", f"{numbers['ids_seen']:,} of {vocabulary:,}, {numbers['ids_seen'] / vocabulary:.1%}"),
            ("entropy", f"{numbers['entropy_bits']:.3f} bits of {math.log2(vocabulary):.3f}, each token for itself"),
            ("written", written),
        ],
    )
    table = Table(title="most frequent tokens", title_justify="left")
    table.add_column("id", justify="right")
    table.add_column("text", overflow="fold")
    table.add_column("share", justify="right")
    for row in numbers["most_frequent"]:
        table.add_row(f"{row['id']:,}", "" if row["text"] is None else repr(row["text"]), f"{row['share']:.2%}")
    tables.console().print(table)
    print("\n".join(bars(census.lengths)))


def document_tokens(numbers: dict[str, Any]) -> list[tuple[str, float]]:
    return list(numbers.get("document_tokens", {}).items())


def bars(lengths: np.ndarray) -> list[str]:
    """Documents by their length in powers of two, as lines of a bar chart."""
    if not len(lengths):
        return []
    powers = np.bincount(np.floor(np.log2(lengths)).astype(int))
    first = int(np.flatnonzero(powers)[0])
    width = len(f"{2 ** (len(powers) - 1):,}")
    return [
        "documents by their number of tokens",
        *(
            f"from {2**power:>{width},}  {'#' * math.ceil(BAR * count / powers.max()):<{BAR}}  {count:,}"
            for power, count in enumerate(powers)
            if power >= first
        ),
    ]


def plot(census: Census, label: str, sequence_length: int, path: Path) -> bool:
    """Draw lengths of documents and frequencies of tokens; whether there is matplotlib to do it."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    figure.suptitle(label, fontsize="medium")
    if len(census.lengths):
        edges = np.geomspace(census.lengths[0], max(census.lengths[-1], census.lengths[0] + 1), 41)
        left.hist(census.lengths, bins=edges)
        left.axvline(sequence_length, color="gray", linestyle=":", label=f"sequence_length {sequence_length}")
        left.set_xscale("log")
        left.legend(fontsize="small")
    left.set(xlabel="tokens of a document", ylabel="documents")
    seen = np.sort(census.counts[census.counts > 0])[::-1]
    right.loglog(np.arange(1, len(seen) + 1), seen / census.read)
    right.set(xlabel="rank of a token", ylabel="share of the tokens")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
