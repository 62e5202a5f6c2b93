"""The data pipeline beside its peers: preparing, reading, waiting, memory.

    python benchmarks/data.py                      all four tables: about five minutes on two cores
    python benchmarks/data.py prepare loader       some of: prepare loader wait memory
    python benchmarks/data.py --quick              small inputs, to see that everything runs

prepare: tokens/s of one process, beside `datasets` and `tokenizers` put together by hand. loader: tokens/s of one
loader process, beside StreamingDataset on rows that were written at their length. wait: the share of a training step of
the quickstart that waits for data. memory: resident bytes of a process while it reads 10^8 tokens.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import torch
from timing import show, spread, taking_turns
from torch.utils.data import DataLoader

from titans_data import (
    BatchSchedule,
    MdsSource,
    Mixture,
    PrepareOptions,
    RowOrder,
    TokenDataset,
    batches,
    load_card,
    load_tokenizer,
    prepare,
)
from titans_data._imports import import_streaming
from titans_dist.tracking import read_metrics

SECTIONS = ("prepare", "loader", "wait", "memory")
LENGTHS = (256, 2048, 8192)
VOCABULARY = 4096
MICRO_BATCH = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], help="which tables; all unless given")
    parser.add_argument("--quick", action="store_true", help="small inputs")
    parser.add_argument("--runs", type=int, default=5, help="runs of each rival, in turns")
    arguments = parser.parse_args()
    wanted = arguments.sections or SECTIONS
    torch.set_num_threads(1)
    # One process each means one thread each.
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    size, runs = (2_000_000, 1) if arguments.quick else (40_000_000, arguments.runs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if {"prepare", "loader", "memory"} & {*wanted}:
            corpus = write_corpus(folder / "corpus.jsonl", size)
            tokenizer = train_tokenizer(folder, corpus)
        if "prepare" in wanted:
            prepare_table(folder, corpus, tokenizer, min(runs, 3))
        if {"loader", "memory"} & {*wanted}:
            prepare(options(corpus, tokenizer), folder / "dataset", workers=os.cpu_count() or 1)
        if "loader" in wanted:
            loader_table(folder, folder / "dataset", runs, arguments.quick)
        if "wait" in wanted:
            wait_table(folder, 12 if arguments.quick else 60)
        if "memory" in wanted:
            memory_table(folder / "dataset", 2_000_000 if arguments.quick else 100_000_000)


def write_corpus(path: Path, size: int) -> Path:
    """About `size` bytes of the standard library as JSONL, no two documents alike."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    written = 0
    with path.open("w", encoding="utf-8") as out:
        for turn in itertools.count():
            for number, text in enumerate(texts):
                if written >= size:
                    return path
                distinct = f"# {turn}.{number}\n{text.replace('self', f'self{turn}')}"
                written += out.write(json.dumps({"text": distinct}) + "\n")
    raise AssertionError


def options(corpus: Path, tokenizer: Path) -> PrepareOptions:
    return PrepareOptions("jsonl", str(corpus), tokenizer=str(tokenizer), validation_fraction=0.0)


def train_tokenizer(folder: Path, corpus: Path) -> Path:
    """The folder of a BPE of VOCABULARY ids, so that none of the rivals has to train one."""
    small = folder / "small.jsonl"
    with corpus.open() as lines:
        small.write_text("".join(itertools.islice(lines, 200)))
    prepare(PrepareOptions("jsonl", str(small), vocab_size=VOCABULARY, validation_fraction=0.0), folder / "small")
    return folder / "small" / "tokenizer"


def prepare_table(folder: Path, corpus: Path, tokenizer: Path, runs: int) -> None:
    """Both read the same JSONL and write the same tokens, in one process and one thread."""
    import datasets

    datasets.disable_progress_bars()
    inner = load_tokenizer(tokenizer)._inner  # type: ignore[attr-defined]

    def ours() -> None:
        shutil.rmtree(folder / "ours", ignore_errors=True)
        prepare(options(corpus, tokenizer), folder / "ours", workers=1)

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.ids for encoding in inner.encode_batch_fast(batch["text"], add_special_tokens=False)]}

    def by_hand() -> None:
        for name in ("by_hand", "cache"):
            shutil.rmtree(folder / name, ignore_errors=True)
        loaded = datasets.load_dataset("json", data_files=str(corpus), split="train", cache_dir=str(folder / "cache"))
        encoded = loaded.map(encode, batched=True, remove_columns=["text"])
        encoded.save_to_disk(str(folder / "by_hand"))

    times = taking_turns([ours, by_hand], runs, warmup=0)
    tokens = load_card(folder / "ours").splits["train"].tokens
    by_hand_tokens = sum(map(len, datasets.load_from_disk(str(folder / "by_hand"))["ids"]))
    documents = load_card(folder / "ours").splits["train"].documents
    if by_hand_tokens + documents != tokens:
        sys.exit(f"the two disagree: {tokens} tokens, of which {documents} end a document, and {by_hand_tokens}")
    base = statistics.median(times[1])
    show(
        f"prepare: {corpus.stat().st_size / 1e6:.0f} MB of JSONL, {tokens:,} tokens, one core",
        ["", f"s, median of {runs} (min .. max)", "tokens/s", "speed", "writes"],
        [
            [
                name,
                spread(each),
                f"{tokens / statistics.median(each):,.0f}",
                f"{base / statistics.median(each):.2f}x",
                what,
            ]
            for name, each, what in (
                ("titans-dist prepare", times[0], "MDS, sha256 of every shard"),
                ("datasets + tokenizers by hand", times[1], "Arrow"),
            )
        ],
    )


def loader_table(folder: Path, dataset: Path, runs: int, quick: bool) -> None:
    """Both give micro-batches of shuffled rows from one loader process, over all rows that there are."""
    rows = []
    for length in LENGTHS:
        data = TokenDataset(MdsSource(dataset), length)
        written = write_rows(folder / f"rows-{length}", data)
        count = min(len(data) // MICRO_BATCH, 40 if quick else 8_000_000 // (length * MICRO_BATCH))
        tokens = count * MICRO_BATCH * length
        times = taking_turns([ours(data, count), streaming(written, count)], runs, warmup=1)
        speeds = [tokens / statistics.median(each) for each in times]
        rows += [
            [
                f"rows of {length:,}: titans_data",
                *(spread(times[0], 1e-3), f"{speeds[0]:,.0f}"),
                f"{speeds[0] / speeds[1]:.2f}x",
            ],
            ["    StreamingDataset", *(spread(times[1], 1e-3), f"{speeds[1]:,.0f}"), "1.00x"],
        ]
        shutil.rmtree(written)
    columns = ["", f"ms, median of {runs} (min .. max)", "tokens/s", "speed"]
    show("loader: one loader process, micro-batches of 16 shuffled rows, local shards", columns, rows)


def ours(data: TokenDataset, count: int) -> Callable[[], None]:
    schedule = BatchSchedule(Mixture.of_one(MICRO_BATCH), [RowOrder(len(data), 0, data.shards)])

    def read() -> None:
        for _ in itertools.islice(batches(data, schedule, 0, 0, 1, MICRO_BATCH, workers=1), count):
            pass

    return read


def write_rows(folder: Path, data: TokenDataset) -> Path:
    """The same rows as an MDS dataset with one sample per row, as StreamingDataset is meant to be used."""
    streaming = import_streaming()
    columns = {"tokens": f"ndarray:uint16:{data.sequence_length + 1}"}
    with streaming.MDSWriter(out=str(folder), columns=columns) as writer:
        for row in range(len(data)):
            writer.write({"tokens": data[row]["tokens"].numpy().astype(np.uint16)})
    return folder


def streaming(folder: Path, count: int) -> Callable[[], None]:
    module = import_streaming()
    module.base.util.clean_stale_shared_memory()
    dataset = module.StreamingDataset(local=str(folder), shuffle=True, batch_size=MICRO_BATCH, shuffle_seed=0)

    def read() -> None:
        loader = DataLoader(dataset, batch_size=MICRO_BATCH, num_workers=1, collate_fn=collate)
        for _ in itertools.islice(loader, count):
            pass

    return read


def collate(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    """int64 (b, T + 1), as a model takes them."""
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]).astype(np.int64))


def wait_table(folder: Path, steps: int) -> None:
    """Real training steps of the quickstart's model and data."""
    command = [sys.executable, "-m", "titans_launch", "train", f"training.steps={steps}", "name=wait",
               f"checkpoint.interval={steps}", f"data.path={folder / 'stdlib'}",
               f"hydra.run.dir={folder / 'wait'}"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}")
    counted = [row for row in read_metrics(folder / "wait" / "metrics.jsonl") if row["kind"] == "train"][3:]
    shares, times = ([row[key] for row in counted] for key in ("data_wait", "step_time_s"))
    show(
        f"wait: the quickstart, {len(counted)} steps, no loader process",
        ["", "ms a step (min .. max)", "share that waits for data", "largest share"],
        [["titans-dist train", spread(times, 1e-3), f"{statistics.median(shares):.3%}", f"{max(shares):.3%}"]],
    )


def memory_table(dataset: Path, total: int) -> None:
    """Reading in this process, so that all memory is counted here."""
    data, length = TokenDataset(MdsSource(dataset), 2048), 2048
    schedule = BatchSchedule(Mixture.of_one(MICRO_BATCH), [RowOrder(len(data), 0, data.shards)])
    steps = total // (length * MICRO_BATCH)
    reader, process = batches(data, schedule, 0, 0, 1, MICRO_BATCH), psutil.Process()
    marks = []
    for step in range(1, steps + 1):
        next(reader)
        if step % max(1, steps // 10) == 0:
            marks.append((step * length * MICRO_BATCH, process.memory_info().rss))
    show(
        f"memory: {marks[-1][0]:,} tokens, {marks[-1][0] / data.num_tokens:.1f} epochs",
        ["after", "resident MB", "grown since the first row"],
        [[f"{tokens:,} tokens", f"{rss / 1e6:,.1f}", f"{(rss - marks[0][1]) / 1e6:+.1f} MB"] for tokens, rss in marks],
    )


if __name__ == "__main__":
    main()
