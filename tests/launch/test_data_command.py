"""`titans-dist data`: what it prints is what the run reads."""

from __future__ import annotations

import csv
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.config.test_composition import composed
from tests.launch import command_line
from titans_data import PrepareOptions, batches, load_card, load_tokenizer, prepare, usage
from titans_dist.checkpoint.store import Store
from titans_dist.config import Config
from titans_dist.run.data import TrainingData, open_training
from titans_dist.run.identity import identity
from titans_launch.cli import main

BATCH, LENGTH = 8, 32
SMALL = [f"training.global_batch_size={BATCH}", "training.micro_batch_size=2", f"data.sequence_length={LENGTH}"]
SMALL += ["parallel=single", "training.steps=12", "name=demo"]
STAGES = "data.stages=[{weights:{web:3,code:1}},{from_tokens:1024,weights:{code:1}}]"
MIXTURE = [*SMALL, "data=mixture", "+data.sources.web=data/web", "+data.sources.code=data/code"]
WEB = [*SMALL, "data=mds", "data.path=data/web"]

Output = pytest.CaptureFixture[str]


def documents(word: str) -> list[str]:
    """150 texts of 8 to 120 bytes."""
    return [f"{word} λ{number}\n" * (1 + number**2 % 11) for number in range(150)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/ with two datasets of bytes and many shards, all of it in the training split."""
    folder = tmp_path_factory.mktemp("inspect")
    for name in ("web", "code"):
        corpus = folder / f"{name}.jsonl"
        corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(name)))
        options = PrepareOptions(
            format="jsonl",
            source=str(corpus),
            tokenizer="bytes",
            validation_fraction=0.0,
            page_tokens=50,
            shard_bytes=8 * 50 + 4096,
        )
        prepare(options, folder / "data" / name)
    return folder / "data"


@pytest.fixture
def folder(datasets: Path, here: Path) -> Path:
    """The current folder, with the datasets below data/."""
    shutil.copytree(datasets, here / "data")
    return here


def cells(printed: str) -> dict[str, str]:
    """The rows of the tables of two columns."""
    return dict(re.findall(r"│ (.+?) +│ (.+?) +│", printed))


def plan(*overrides: str) -> list[tuple[str, ...]]:
    """The samples that the command writes, without the names of the columns."""
    assert main(["data", "plan", *overrides, "inspect.output=plan.csv"]) == 0
    head, *rows = csv.reader(Path("plan.csv").read_text().splitlines())
    assert head == ["step", "slot", "rank", "source", "epoch", "row", "first_token"]
    return [tuple(row) for row in rows]


def save(config: Config, data: TrainingData, step: int) -> None:
    """A checkpoint as the training loop would leave it, but for the tensors."""
    store = Store(Path(config.run_dir) / "checkpoints")
    store.begin(step)
    store.commit(step, {"identity": identity(config), "data": data.state(step)})


@pytest.mark.parametrize(
    "more", [[], ["data.documents=packed", "training.carry_state=true"]], ids=["joined", "carried"]
)
def test_show_prints_what_the_rank_gets(more: list[str], folder: Path, capsys: Output) -> None:
    overrides = [*MIXTURE, STAGES, *more, "model.memory.chunk_size=8"]
    inspected = ["inspect.step=4", "inspect.ranks=2", "inspect.rank=1", "inspect.sequences=4"]
    assert main(["data", "show", *overrides, *inspected]) == 0
    printed = capsys.readouterr().out
    data = open_training(composed(*overrides))
    _, micro_batches = next(batches(data.rows, data.schedule, 3, rank=1, world=2, micro_batch=2))
    rows = [row for batch in micro_batches for row in batch["tokens"].tolist()]
    tokenizer = load_tokenizer(folder / "data" / "web" / "tokenizer")
    texts = [tokenizer.decode(row) for row in rows]
    shown = [block.split("┘\n", 1)[1] for block in printed.split("step 4, rank 1, sequence ")[1:]]
    assert [re.sub(r"\n--- document from token \d+ on ---\n", "", block)[:-2] for block in shown] == texts
    begins = [re.findall(r"at (\d+)", line) for line in re.findall(r"│ documents begin │ (.*?) +│", printed)]
    assert begins == [[str(i + 1) for i, token in enumerate(row[:-1]) if token == 256] for row in rows]
    assert sum(map(len, begins)) > 0


def test_ls_shows_a_source_of_a_mixture_that_is_missing_beside_the_others(folder: Path, capsys: Output) -> None:
    assert main(["data", "ls", *MIXTURE, "+data.sources.lost=data/lost"]) == 0
    printed = capsys.readouterr().out
    assert "data/lost is not a folder" in " ".join(printed.split())
    assert printed.count("tokenizer") >= 2


def test_the_row_that_show_names_is_where_its_tokens_are(folder: Path, capsys: Output) -> None:
    assert main(["data", "show", *WEB]) == 0
    printed = capsys.readouterr().out
    first, last = map(int, re.findall(r"│ tokens +│ ([\d,]+) to ([\d,]+) of", printed.replace(",", ""))[0])
    stream = "".join(f"{text}<|endofdocument|>" for text in documents("web")).encode()
    tokens = [*re.findall(rb"<\|endofdocument\|>|[\x00-\xff]", stream)]
    text = b"".join(tokens[first : last + 1]).decode("utf-8", "replace")
    assert text in re.sub(r"\n--- document from token \d+ on ---\n", "", printed)
    assert cells(printed)["row"] == f"{first // LENGTH} of {(len(tokens) - 1) // LENGTH}"


def test_tokens_without_a_text_are_numbers(here: Path, capsys: Output) -> None:
    tokens = np.random.default_rng(0).integers(0, 500, 4000).astype(np.uint16)
    tokens.tofile("train.bin")
    overrides = [*SMALL, "data=tokens", "data.path=train.bin", "data.vocab_size=500", "data.end_of_document=0"]
    assert main(["data", "show", *overrides]) == 0
    printed = capsys.readouterr().out
    first = int(re.findall(r"│ tokens +│ ([\d,]+) to", printed)[0].replace(",", ""))
    numbers = re.sub(r"--- document from token \d+ on ---", "", printed.split("┘\n")[1])
    assert numbers.split() == [str(token) for token in tokens[first : first + LENGTH + 1]]
    for command in ("ls", "stats"):
        assert main(["data", command, *overrides]) == 0
    assert main(["data", "verify", *overrides]) == 2
    assert "data=tokens has no checksums to verify" in capsys.readouterr().err


def test_what_would_move_the_cursor_is_spelled_out() -> None:
    from titans_data.tokenize import BytesTokenizer
    from titans_launch.data.show import text

    assert text(np.frombuffer(b"a\x1b[2J\tb\r\n\x07", np.uint8), BytesTokenizer()) == "a\\x1b[2J\tb\\r\n\\x07"


@pytest.mark.parametrize(
    "more", [[], ["data.documents=packed", "training.carry_state=true"]], ids=["joined", "carried"]
)
def test_plan_lists_the_rows_of_the_order(more: list[str], folder: Path, capsys: Output) -> None:
    overrides = [*MIXTURE, STAGES, *more, "model.memory.chunk_size=8"]
    rows = plan(*overrides, "inspect.step=2", "inspect.to_step=400", "inspect.ranks=4")
    assert len(rows) == 399 * BATCH
    data = open_training(composed(*overrides))
    begins = {source.name: sum(other.rows for other in data.sources[:i]) for i, source in enumerate(data.sources)}
    for i, (step, slot, rank, source, _, row, token) in enumerate(rows):
        assert (int(step), int(slot)) == (2 + i // BATCH, i % BATCH)
        assert int(rank) == int(slot) // 2
        assert int(token) == LENGTH * int(row)
        assert begins[source] + int(row) == data.schedule.rows(int(step) - 1)[int(slot)]
    if not more:
        # An epoch is every row once.
        code = [(int(epoch), int(row)) for _, _, _, source, epoch, row, _ in rows if source == "code"]
        size = data.sources[1].rows
        drawn = data.schedule.drawn(1)[1]
        second = [row for epoch, row in code if epoch == 2]
        assert len(code) + drawn > 2 * size
        assert sorted(second) == list(range(size))
    assert "3,192 samples of steps 2 to 400 are in plan.csv" in capsys.readouterr().out


def test_plan_prints_the_first_samples_the_stages_and_the_use(folder: Path, capsys: Output) -> None:
    assert main(["data", "plan", *MIXTURE, STAGES, "inspect.to_step=8"]) == 0
    printed = capsys.readouterr().out
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line[:1] == "│"]
    samples, stages, drawn = lines[:50], lines[50:52], lines[52:]
    whole = plan(*MIXTURE, STAGES, "inspect.to_step=8")
    assert [[cell.replace(",", "") for cell in line] for line in samples] == [list(row) for row in whole[:50]]
    assert "and 14 more: inspect.output=FILE.csv writes all" in printed
    assert stages == [["1", "0", "75.00%", "25.00%"], ["5", "1,024", "0.00%", "100.00%"]]
    data = open_training(composed(*MIXTURE, STAGES))
    expected = []
    for step in (8, 12):
        for each in usage(data.schedule, data.sources, step):
            tokens = [each.rows, each.drawn, each.repeated, each.unread]
            size, *rest = (f"{LENGTH * count:,}" for count in tokens)
            expected.append([each.name, size, rest[0], f"{each.drawn / each.rows:.2f}", *rest[1:]])
    assert drawn == expected
    assert Counter(row[3] for row in whole) == {"web": 24, "code": 40}


def test_a_mixture_that_was_edited_is_shown_as_it_went(folder: Path, capsys: Output) -> None:
    old = composed(*MIXTURE)
    went = plan(*MIXTURE, "inspect.to_step=5")
    save(old, open_training(old), 5)
    capsys.readouterr()
    now = plan(*MIXTURE, STAGES, "inspect.to_step=9")
    assert "as demo has read up to step 5; the mixture is another one from step 6 on" in capsys.readouterr().out
    assert now[: 5 * BATCH] == went
    assert {row[3] for row in now[5 * BATCH :]} == {"code"}

    alone = [*WEB[:-2], "data=mixture", "+data.sources.web=data/web"]
    went_on = plan(*alone, "inspect.to_step=9")
    assert went_on[: 5 * BATCH] == went
    assert {row[3] for row in went_on[5 * BATCH :]} == {"web"}
    steps_of_code = [row for row in went if row[3] == "code"]
    step, slot = int(steps_of_code[0][0]), int(steps_of_code[0][1])
    assert main(["data", "show", *alone, f"inspect.step={step}", f"inspect.sequences={slot + 1}"]) == 2
    assert f"step {step} reads code, which is no longer configured; add" in capsys.readouterr().err

    assert main(["data", "plan", *MIXTURE, "data.seed=7"]) == 4
    assert "holds another run: data.seed=7 (it was 1234)" in capsys.readouterr().err


def test_verify_names_every_bad_file(folder: Path) -> None:
    good = command_line.run("data", "verify", *MIXTURE, cwd=folder)
    assert good.returncode == 0, good.stderr
    cards = [load_card(folder / "data" / name) for name in ("web", "code")]
    files = [1 + len(split.shards) for card in cards for split in card.splits.values()]
    assert re.findall(r"(\d+) checked, (\d+) bad", good.stdout) == [
        (str(2 + sum(files[:2])), "0"),
        (str(2 + sum(files[2:])), "0"),
    ]
    assert len(re.findall(r"[\d,]+ in \d+\.\d s, [\d,.]+ MB/s", good.stdout)) == 2

    shards = [folder / "data" / "web" / cards[0].splits["train"].shards[i].name for i in (0, 2)]
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(content)
    missing = folder / "data" / "code" / cards[1].splits["train"].shards[-1].name
    missing.unlink()
    bad = command_line.run("data", "verify", *MIXTURE, cwd=folder)
    assert bad.returncode == 4
    named = [str(path.relative_to(folder)) for path in (*shards, missing)]
    assert bad.stderr.startswith(f"titans-dist: 3 files are not what the card says: {', '.join(named)}; restore them")
    assert bad.stderr.count("\n") == 1
    for path in named:
        assert path in bad.stdout
    assert bad.stdout.count("does not have the sha256 on its card") == 2
    assert bad.stdout.count("is missing") == 1


def test_verify_reads_a_remote_through_the_cache(folder: Path, capsys: Output) -> None:
    overrides = [*SMALL, "data=mds", f"data.path=file://{folder}/data/web", "data.cache=cache"]
    assert main(["data", "verify", *overrides]) == 0
    card = load_card(folder / "data" / "web")
    kept = {path.stem for path in Path("cache", "objects").iterdir()}
    assert {shard.sha256 for shard in card.splits["train"].shards} <= kept
    # A copy that was damaged in the cache is brought again; what is damaged on the remote is not.
    damaged = next(path for path in Path("cache", "objects").iterdir() if path.suffix == ".mds")
    damaged.write_bytes(b"x" * damaged.stat().st_size)
    assert main(["data", "verify", *overrides]) == 0
    capsys.readouterr()
    for command in ("ls", "show"):
        assert main(["data", command, *overrides]) == 0
    assert card.fingerprint[:12] in capsys.readouterr().out


def test_the_card_and_the_tokenizer_are_checked_too(folder: Path, capsys: Output) -> None:
    card = folder / "data" / "web" / "dataset.json"
    card.write_text(card.read_text().replace('"fingerprint": "', '"fingerprint": "0', 1))
    (folder / "data" / "web" / "tokenizer" / "titans_tokenizer.json").write_text('{"kind": "none"}')
    assert main(["data", "verify", *WEB]) == 4
    error = capsys.readouterr().err
    assert "2 files are not what the card says: data/web/dataset.json, data/web/tokenizer; restore" in error


def test_a_dataset_without_a_card_does_not_keep_the_others_from_being_checked(folder: Path, capsys: Output) -> None:
    (folder / "data" / "web" / "dataset.json").write_text("{")
    (folder / "data" / "code" / "train" / "index.json").write_text("{}")
    assert main(["data", "verify", *MIXTURE]) == 4
    printed = capsys.readouterr()
    assert "2 files are not what the card says: data/web/dataset.json, data/code/train/index.json" in printed.err
    assert "cannot be read" in cells(printed.out)["problem"]


def test_stats_are_what_a_plain_count_gives(folder: Path, capsys: Output) -> None:
    before = {path: path.read_bytes() for path in (folder / "data").rglob("*") if path.is_file()}
    assert main(["data", "stats", *WEB]) == 0
    found = json.loads(Path("runs/demo/reports/data-main.json").read_text())
    texts = [text.encode() for text in documents("web")]
    lengths = [len(text) + 1 for text in texts]
    counts = Counter([*b"".join(texts), *[256] * len(texts)])
    total = sum(lengths)
    assert (found["tokens"], found["tokens_read"]) == (total, total)
    assert (found["documents_read"], found["documents_unended"]) == (len(texts), 0)
    assert found["ids_seen"] == len(counts)
    assert found["bytes_per_token"] == pytest.approx((total - len(texts)) / total)
    assert found["documents_longer_than_a_sequence"] == pytest.approx(
        sum(length > LENGTH for length in lengths) / len(lengths)
    )
    assert found["entropy_bits"] == pytest.approx(-sum(n / total * math.log2(n / total) for n in counts.values()))
    size = found["document_tokens"]
    assert (size["min"], size["max"]) == (min(lengths), max(lengths))
    assert (size["median"], size["mean"]) == (statistics.median(lengths), pytest.approx(statistics.mean(lengths)))
    assert size["p90"] == pytest.approx(statistics.quantiles(lengths, n=10, method="inclusive")[-1])
    assert size["p99"] == pytest.approx(statistics.quantiles(lengths, n=100, method="inclusive")[-1])
    frequent = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:20]
    assert [(row["id"], row["share"]) for row in found["most_frequent"]] == [
        (token, pytest.approx(count / total)) for token, count in frequent
    ]
    assert found["most_frequent"][0]["text"] == bytes([frequent[0][0]]).decode()
    printed = capsys.readouterr().out
    drawn = {int(low.replace(",", "")): int(count) for low, count in re.findall(r"from +([\d,]+)  #* +(\d+)", printed)}
    assert {low: count for low, count in drawn.items() if count} == Counter(
        2 ** int(math.log2(length)) for length in lengths
    )
    assert Path("runs/demo/reports/data-main.png").read_bytes().startswith(b"\x89PNG")
    assert {path: path.read_bytes() for path in (folder / "data").rglob("*") if path.is_file()} == before


def test_stats_of_a_mixture_are_a_report_for_each_source(
    folder: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["data", "stats", *MIXTURE, "inspect.max_tokens=1000"]) == 0
    reports = sorted(path.name for path in Path("runs/demo/reports").iterdir())
    assert reports == ["data-code.json", "data-web.json"]
    assert capsys.readouterr().out.count("no plot without matplotlib") == 2
    found = json.loads(Path("runs/demo/reports/data-code.json").read_text())
    assert (found["dataset"], found["tokens_read"]) == ("code: data/code", 1000)


def test_ls_shows_cards_shares_and_what_else_there_is(folder: Path, capsys: Output) -> None:
    shutil.copytree(folder / "data" / "code", folder / "data" / "more" / "other")
    (folder / "data" / "broken").mkdir()
    (folder / "data" / "broken" / "dataset.json").write_text("{}")
    assert main(["data", "ls", *MIXTURE, STAGES]) == 0
    printed = capsys.readouterr().out
    tables = re.split(r"\n(?=\S)(?![┌│└├])", "\n" + printed)[1:]
    assert [table.split("\n")[0].strip() for table in tables] == [
        "web: data/web",
        "code: data/code",
        "data/broken",
        "data/more/other",
    ]
    web = cells(tables[0])
    split = load_card(folder / "data" / "web").splits["train"]
    assert web["train"] == (
        f"150 documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text in {len(split.shards)} shards"
    )
    assert web["dropped"] == "nothing"
    assert web["vocabulary"] == "257 ids, stored as uint16"
    assert web["tokenizer"].startswith("bytes, ")
    assert web["fingerprint"] == load_card(folder / "data" / "web").fingerprint[:12]
    assert web["share"] == "75.00%, 0.00% from step 5"
    assert cells(tables[1])["share"] == "25.00%, 100.00% from step 5"
    assert "format version None" in cells(tables[2])["problem"]
    assert "share" not in cells(tables[3])


def test_ls_of_nothing_says_what_to_do(here: Path, capsys: Output) -> None:
    assert main(["data", "ls"]) == 0
    assert "run `titans-dist prepare` first" in capsys.readouterr().out
    assert not list(here.iterdir())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("show inspect.rank=2 inspect.ranks=2", "inspect.rank=2 is not one of 2 ranks; use 0 to 1"),
        ("show inspect.step=0", "inspect.step=0 is too small; use 1 or more"),
        ("plan inspect.step=3 inspect.to_step=2", "inspect.to_step=2 is too small; use 3 or more"),
        ("plan data=synthetic inspect.output=no/x.csv", "inspect.output=no/x.csv cannot be written (No such file or"),
        ("show inspect.ranks=3", "inspect.ranks=3 does not divide training.global_batch_size=8; use 2"),
        (
            "show inspect.ranks=4 inspect.sequences=3",
            "inspect.sequences=3 is more than the 2 that one of 4 ranks gets of training.global_batch_size=8; use 2",
        ),
    ],
)
def test_what_cannot_be_looked_at_is_refused(words: str, sentence: str, here: Path, capsys: Output) -> None:
    command, *overrides = words.split()
    assert main(["data", command, *SMALL, *overrides]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"titans-dist: {sentence}")
    assert error.count("\n") == 1


def test_a_reader_may_leave_early(here: Path) -> None:
    program = command_line.command("data", "plan", "data=synthetic", *SMALL)
    environment = command_line.environment()
    with subprocess.Popen(program, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert run.stderr.read() == b""
    assert run.returncode == 1


def test_what_is_looked_at_does_not_name_the_run(here: Path, capsys: Output) -> None:
    names = []
    for words in (["train"], ["data", "plan", "inspect.step=5", "inspect.ranks=2", "inspect.output=x.csv"]):
        assert main([*words, "training.steps=9", "--cfg", "job", "--resolve"]) == 0
        names.append(re.findall(r"^name: (.*)", capsys.readouterr().out, re.MULTILINE))
    assert names == [["quickstart,training.steps=9"]] * 2
