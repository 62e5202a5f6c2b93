"""Layouts on paper, from 170M to 70B parameters on 8 to 16,384 GPUs: the tables of docs/scaling.md.

    python benchmarks/scaling.py                       print them: about two minutes
    python benchmarks/scaling.py --write               put them into docs/scaling.md
    python benchmarks/scaling.py --sizes 1.3B          of one size only

Nothing is measured: `titans-dist plan --search` works out every row, with its assumptions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from math import sqrt
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf
from pages import filled, table

import titans_dist
from titans_dist.config import Config
from titans_dist.config.layout import describe_layout
from titans_dist.config.sizes import parameter_count
from titans_dist.plan.estimate import Estimate
from titans_dist.plan.fit import Plan, layouts, search
from titans_dist.plan.hardware import gpu

GUIDE = Path(__file__).parents[1] / "docs" / "scaling.md"
BEGIN = "<!-- begin: python benchmarks/scaling.py --write -->"
GPU, TOKENS = "h100", 1 << 22
"""Of one step, 4M: as many as runs of these sizes usually have at most."""
SIZES = {
    "170M": ["model=170m"],
    "760M": ["model=760m"],
    "1.3B": ["model=1b3", "model.num_heads=16"],
    "7B": ["model=1b3", "model.num_layers=32", "model.hidden_size=4096", "model.num_heads=32"],
    "30B": ["model=1b3", "model.num_layers=48", "model.hidden_size=7168", "model.num_heads=56"],
    "70B": ["model=1b3", "model.num_layers=80", "model.hidden_size=8192", "model.num_heads=64"],
}
PARAMETERS = {"7B": 7_000_000_000, "30B": 30_000_000_000, "70B": 70_000_000_000}
GPUS = (8, 64, 512, 4096, 16384)
LENGTHS = (4096, 16384, 65536, 262144, 1 << 20, 1 << 21)
LONG = {"1.3B": 128, "7B": 512}
"""Size -> GPUs of the table by length."""
MODES = {"1.3B": 64, "7B": 512, "70B": 4096}
"""Size -> GPUs of the table by mode."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"put the tables into {GUIDE.name}")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models of the tables")
    arguments = parser.parse_args()
    text = "\n\n".join(sections(arguments.sizes))
    if not arguments.write:
        print(text)
        return
    GUIDE.write_text(filled(GUIDE.read_text(), BEGIN, text))


def sections(sizes: list[str]) -> Iterator[str]:
    """Every table with its heading."""
    yield "## The fastest layout of so many GPUs"
    columns = ["model", "GPUs", "layout", "micro-batch", "recompute", "GB", "step s", "MFU", "days"]
    yield table(columns, [by_gpus(size, gpus) for size in sizes for gpus in GPUS])
    for size, gpus in MODES.items():
        if size in sizes:
            yield f"## One way to split at a time: {size} on {gpus:,} GPUs"
            columns = ["processes", "tensor", "context", "pipeline"]
            yield table(columns, by_mode(size, gpus))
    yield "## By length"
    columns = ["model", "GPUs", "tokens", "layout", "recompute", "GB", "step s", "MFU", "tokens/s of 4,096"]
    yield table(columns, [row for size, gpus in LONG.items() if size in sizes for row in by_length(size, gpus)])


def composed(size: str, length: int = 4096) -> Config:
    """The model with sequences of `length` tokens, TOKENS a step."""
    ConfigStore.instance().store("schema", Config)
    batch = TOKENS // length
    overrides = ["name=scaling", "run_dir=scaling", "training=pretrain", "data=synthetic", *SIZES[size]]
    overrides += ["data.vocab_size=32000", f"data.sequence_length={length}", f"training.global_batch_size={batch}"]
    overrides += [f"training.micro_batch_size={min(8, batch)}"]
    overrides += [f"model.parameters={PARAMETERS[size]}"] if size in PARAMETERS else []
    with initialize_config_dir(str(Path(titans_dist.__file__).parent / "configs"), version_base="1.3"):
        found = OmegaConf.to_object(compose("config", overrides))
    assert isinstance(found, Config)
    model = replace(found.model, intermediate_size=found.model.mlp_size, parameters=None)  # worked out once
    return replace(found, model=model)


def by_gpus(size: str, gpus: int) -> list[str]:
    """The best layout."""
    config = composed(size)
    found = search(config, gpus, gpu(GPU), most=1)
    if not found:
        return [size, f"{gpus:,}", "none fits", *["-"] * 6]
    best, time = found[0]
    tokens = 20 * parameter_count(config.model)
    days = (tokens / time.tokens_per_day.slow, tokens / time.tokens_per_day.fast)
    return [size, f"{gpus:,}", *layout(best), memory(best), *speed(time), span(*days)]


def by_mode(size: str, gpus: int) -> list[list[str]]:
    """Tokens/s of so many processes for one way to split, all others for data, as a share of the best of the table."""
    card = gpu(GPU)
    found: dict[tuple[int, int, int], float] = {}
    legal = set()
    for one in layouts(composed(size), gpus, card):
        split = one.config.parallel
        key = (split.tensor, split.context, split.pipeline)
        if sum(n > 1 for n in key) > 1:
            continue
        legal.add(key)
        if one.fits:
            found[key] = max(found.get(key, 0.0), rate(one.estimate()))
    best = max(found.values(), default=1.0)
    rows = []
    for n in (1, 2, 4, 8, 16, 32):
        keys = [(n, 1, 1), (1, n, 1), (1, 1, n)]
        cells = [f"{found[k] / best:.2f}" if k in found else "too large" if k in legal else "-" for k in keys]
        rows.append([str(n), *cells])
    return rows


def by_length(size: str, gpus: int) -> Iterator[list[str]]:
    """The best layout for each length of a sequence, with as many tokens a step."""
    first = None
    for length in LENGTHS:
        found = search(composed(size, length), gpus, gpu(GPU), most=1)
        if not found:
            yield [size, f"{gpus:,}", f"{length:,}", "none fits", *["-"] * 5]
            continue
        best, time = found[0]
        first = first or rate(time)
        words, _, recompute = layout(best)
        share = f"{rate(time) / first:.2f}"
        yield [size, f"{gpus:,}", f"{length:,}", words, recompute, memory(best), *speed(time), share]


def rate(time: Estimate) -> float:
    """Tokens a day in the middle of the range."""
    return sqrt(time.tokens_per_day.slow * time.tokens_per_day.fast)


def layout(found: Plan) -> list[str]:
    """Layout, sequences of a micro-batch, what is recomputed."""
    training = found.config.training
    words = describe_layout(found.config.parallel, found.copies)
    return [words, str(training.micro_batch_size), training.recompute]


def memory(found: Plan) -> str:
    """GB of the fullest GPU."""
    return f"{found.worst.peak() / 1e9:.0f}"


def speed(time: Estimate) -> list[str]:
    """Seconds of a step, and MFU."""
    return [span(time.step_s.slow, time.step_s.fast), f"{time.mfu.slow:.0%} to {time.mfu.fast:.0%}"]


def span(slow: float, fast: float) -> str:
    """Two significant digits of both."""
    low, high = (number(x) for x in sorted((slow, fast)))
    return f"{low} to {high}"


def number(value: float) -> str:
    """Two significant digits.

    >>> number(0.0123), number(1.234), number(1234.0)
    ('0.012', '1.2', '1,234')
    """
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


if __name__ == "__main__":
    main()
