"""A corpus in parts: the same bytes with any number of workers, and whatever is killed, however often."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from titans_data import DataError, MdsSource, PrepareOptions, load_card, load_tokenizer, prepare, verify
from titans_data._imports import import_streaming

Start = Callable[..., "subprocess.Popen[str]"]

PREPARE = """
import json, sys
from titans_data import DataError, PrepareOptions, prepare
def report(stage, done, total):
    print(stage, done, total, flush=True)
if __name__ == "__main__":
    try:
        prepare(PrepareOptions(**json.loads(sys.argv[1])), sys.argv[2], report, int(sys.argv[3]))
    except DataError as error:
        sys.exit(f"refused: {error}")
"""
# Forks, so that the libraries are loaded once and a kill falls on the work instead of on their loading; small parts, so
# that there are many to be in the middle of. The first attempt is left alone, up to 25 more are killed, the last not.
KILLS = """
import json, os, random, sys, time
from pathlib import Path
os.environ["TOKENIZERS_PARALLELISM"] = "false"
from titans_data import PrepareOptions, parts, prepare
from titans_data._imports import import_extra, import_streaming
import_streaming(), import_extra("tokenizers")
parts.SMALLEST_PART = 1 << 18
options, out = PrepareOptions(**json.loads(sys.argv[1])), Path(sys.argv[2])
work = out.with_name(out.name + ".tmp")
def fork(folder):
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        prepare(options, folder)
        os._exit(0)
    return child
def finished():
    stages = ("scan", "tokenizer", "duplicates", "tokens")
    return {str(path): path.stat().st_mtime_ns for stage in stages for path in (work / stage).glob("*")}
began = time.monotonic()
os.waitpid(fork(out.with_name("whole")), 0)
whole = time.monotonic() - began
source = random.Random(9)
for _ in range(25):
    child = fork(out)
    time.sleep(source.uniform(0.0, 0.12 * whole))
    os.kill(child, 9)
    os.waitpid(child, 0)
    if out.exists():
        break
    print(json.dumps(finished()), flush=True)
os.waitpid(fork(out), 0)
"""
WORDS = ["memory", "surprise", "gate", "naïve", "测试", "λ", "x = 1\n", "\n\n", "decay", "{}[]", "forget"]


def text_of(source: random.Random, words: int) -> str:
    return " ".join(source.choices(WORDS, k=words))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 7 MB in two large JSONL files and many small ones: 7 parts or so."""
    folder = tmp_path_factory.mktemp("corpus")
    source = random.Random(1)
    for name, documents, words in (("big.jsonl", 3000, 150), ("large.jsonl", 50, 9000)):
        with (folder / name).open("w") as file:
            for number in range(documents):
                file.write(json.dumps({"text": text_of(source, words), "n": number}, ensure_ascii=False) + "\n")
    (folder / "small").mkdir()
    for number in range(120):
        lines = [json.dumps({"text": text_of(source, 150)}) for _ in range(10)]
        (folder / "small" / f"{number:03}.jsonl").write_text("\n".join(lines))
    return folder


def options_of(corpus: Path, **changes: Any) -> PrepareOptions:
    plain = PrepareOptions(
        "jsonl", str(corpus), vocab_size=300, tokenizer_sample_bytes=1 << 19, validation_fraction=0.1, deduplicate=True
    )
    return dataclasses.replace(plain, **changes)


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(options_of(corpus), out)
    return out


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(PREPARE)
    return tmp_path / "script.py"


@pytest.fixture
def run(start: Start, script: Path) -> Callable[[PrepareOptions, Path, int], subprocess.Popen[str]]:
    def launch(options: PrepareOptions, out: Path, workers: int) -> subprocess.Popen[str]:
        return start(script, json.dumps(dataclasses.asdict(options)), out, workers)

    return launch


def finished_parts(out: Path, stage: str) -> dict[str, int]:
    """Key and modification time of every finished result of a stage."""
    folder = out.with_name(out.name + ".tmp") / stage
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} if folder.exists() else {}


def group_members(group: int) -> list[int]:
    """Living processes of a process group."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, _, members_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            except OSError:
                continue
            if int(members_group) == group and state != "Z":
                members.append(int(entry.name))
    return members


def assert_group_ends(group: int) -> None:
    deadline = time.monotonic() + 10
    while (members := group_members(group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert members == []


def wait_for_line(child: subprocess.Popen[str], stage: str) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        name, done, _ = line.split()
        if name == stage and int(done):
            return
    raise AssertionError(f"ended before {stage}")


def read_all(folder: Path, split: str = "train") -> list[int]:
    source = MdsSource(folder, split)
    return source.read(0, source.num_tokens)[0].tolist()


# ---- the result


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_no_byte(
    run: Any, corpus: Path, undisturbed: Path, tmp_path: Path, workers: int, file_tree: Any
) -> None:
    child = run(options_of(corpus), tmp_path / "out", workers)
    output = child.communicate(timeout=120)[0]
    assert child.returncode == 0, output
    assert file_tree(tmp_path / "out") == file_tree(undisturbed)
    assert not (tmp_path / "out.tmp").exists()
    totals = {line.split()[0]: line.split()[1:] for line in output.splitlines()}
    assert list(totals) == ["scan", "tokenizer", "duplicates", "tokenize", "assemble"]
    assert all(done == total for done, total in totals.values())


def test_the_documents_of_all_parts_follow_one_another(corpus: Path, undisturbed: Path) -> None:
    card = verify(undisturbed)
    folders = {shard.name.split("/")[1] for shard in card.splits["train"].shards}
    assert len(folders) >= 6
    expected: list[str] = []
    for path in sorted(corpus.rglob("*.jsonl"), key=lambda path: path.relative_to(corpus).as_posix()):
        expected += [json.loads(line)["text"] for line in path.read_text().splitlines()]
    tokenizer = load_tokenizer(undisturbed / "tokenizer")
    found = {split: tokenizer.decode(read_all(undisturbed, split)).split("<|endofdocument|>") for split in card.splits}
    assert found["validation"][-1] == found["train"][-1] == ""
    held_out = set(found["validation"])
    unique = list(dict.fromkeys(expected))
    assert found["train"][:-1] == [text for text in unique if text not in held_out]
    assert found["validation"][:-1] == [text for text in unique if text in held_out]
    assert card.counts.documents == len(unique)
    assert card.counts.duplicates == len(expected) - len(unique)


def test_the_shards_on_the_card_hold_the_tokens_it_says(undisturbed: Path) -> None:
    card = load_card(undisturbed)
    pages = import_streaming().LocalDataset(str(undisturbed), "train")
    lengths = [len(page["tokens"]) for page in (pages[number] for number in range(len(pages)))]
    assert sum(lengths) == card.splits["train"].tokens
    index = json.loads((undisturbed / "train" / "index.json").read_text())["shards"]
    assert [f"train/{entry['raw_data']['basename']}" for entry in index] == [
        shard.name for shard in card.splits["train"].shards
    ]
    position = 0
    for entry, shard in zip(index, card.splits["train"].shards, strict=True):
        held = lengths[position : position + entry["samples"]]
        position += entry["samples"]
        assert sum(held) == shard.tokens
        assert all(length == card.page_tokens for length in held[:-1])


def test_a_part_without_held_out_documents_has_no_folder_for_them(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    for number in range(3):
        (tmp_path / "corpus" / f"{number}.txt").write_text(f"{number}" * (1 << 20))
    card = prepare(PrepareOptions("text", str(tmp_path / "corpus"), tokenizer="bytes"), tmp_path / "out")
    assert [card.splits[split].documents for split in card.splits] == [3, 0]
    assert sorted(path.name for path in (tmp_path / "out" / "validation").iterdir()) == ["index.json"]
    assert sorted(path.name for path in (tmp_path / "out" / "train").iterdir()) == [
        *("00000", "00001", "00002"),
        "index.json",
    ]


# ---- kills


def test_what_was_finished_before_a_kill_is_not_done_again(
    run: Any, corpus: Path, undisturbed: Path, tmp_path: Path, file_tree: Any
) -> None:
    out = tmp_path / "out"
    child = run(options_of(corpus), out, 1)
    wait_for_line(child, "tokenize")
    while len(finished_parts(out, "tokens")) < 2:
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    finished = finished_parts(out, "tokens")
    inodes = {path.stat().st_ino for path in (tmp_path / "out.tmp" / "tokens").rglob("*.mds")}
    scans = finished_parts(out, "scan")
    assert 2 <= len(finished) < len(scans)

    again = run(options_of(corpus), out, 1)
    assert again.stdout is not None
    line = again.stdout.readline().split()
    assert line[0] == "scan" and line[1] == line[2], "the scan was finished"
    again.communicate(timeout=60)
    assert again.returncode == 0
    assert file_tree(out) == file_tree(undisturbed)
    assert inodes <= {path.stat().st_ino for path in out.rglob("*.mds")}


@pytest.mark.slow
def test_kills_at_random_moments_change_no_byte(start: Start, corpus: Path, tmp_path: Path, file_tree: Any) -> None:
    out = tmp_path / "out"
    (tmp_path / "kills.py").write_text(KILLS)
    child = start(tmp_path / "kills.py", json.dumps(dataclasses.asdict(options_of(corpus))), out)
    output = child.communicate(timeout=200)[0]
    assert child.returncode == 0, output
    finished = [json.loads(line) for line in output.splitlines()]
    for before, after in pairwise(finished):
        assert before.items() <= after.items(), "what was finished is not written again"
    assert len({len(results) for results in finished}) > 5, "the kills were spread over the work"
    assert file_tree(out) == file_tree(tmp_path / "whole")
    assert not (tmp_path / "out.tmp").exists()


@pytest.mark.slow
def test_kills_of_all_workers_at_random_moments_change_no_byte(
    run: Any, corpus: Path, undisturbed: Path, tmp_path: Path, file_tree: Any
) -> None:
    source = random.Random(5)
    out = tmp_path / "out"
    kept: dict[str, int] = {}
    for kill in range(4):
        child = run(options_of(corpus), out, 2)
        wait_for_line(child, "tokenize" if kill else "scan")
        time.sleep(source.uniform(0.0, 0.7))
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        now = finished_parts(out, "tokens") | finished_parts(out, "scan")
        if out.exists():
            break
        assert kept.items() <= now.items(), "what was finished is not written again"
        kept = now
    last = run(options_of(corpus), out, 2)
    output = last.communicate(timeout=120)[0]
    assert last.returncode == 0, output
    assert file_tree(out) == file_tree(undisturbed)
    assert not (tmp_path / "out.tmp").exists()


def test_a_killed_parent_leaves_no_worker_behind(run: Any, corpus: Path, tmp_path: Path) -> None:
    child = run(options_of(corpus, tokenizer="bytes", deduplicate=False), tmp_path / "out", 2)
    wait_for_line(child, "tokenize")
    assert len(group_members(child.pid)) >= 3
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert_group_ends(child.pid)


def test_a_killed_worker_is_said_and_the_next_prepare_goes_on(
    run: Any, corpus: Path, undisturbed: Path, tmp_path: Path, file_tree: Any
) -> None:
    child = run(options_of(corpus), tmp_path / "out", 2)
    wait_for_line(child, "scan")
    workers = [pid for pid in group_members(child.pid) if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    output = child.communicate(timeout=60)[0]
    assert "a worker process of prepare was killed" in output
    assert "run the same command again" in output
    assert_group_ends(child.pid)
    prepare(options_of(corpus), tmp_path / "out")
    assert file_tree(tmp_path / "out") == file_tree(undisturbed)


def test_an_interrupt_ends_at_once_and_keeps_what_is_finished(run: Any, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    child = run(options_of(corpus, tokenizer="bytes", deduplicate=False), out, 2)
    wait_for_line(child, "tokenize")
    while not finished_parts(out, "tokens"):
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=10)
    assert child.returncode not in (0, None)
    assert_group_ends(child.pid)
    assert finished_parts(out, "tokens")


@pytest.mark.parametrize("moment", ["before the name", "after the name"])
def test_a_kill_around_the_last_rename_is_mended(
    moment: str, corpus: Path, undisturbed: Path, tmp_path: Path, file_tree: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    rename = Path.rename

    class Kill(BaseException):
        pass

    def stop(path: Path, target: Path) -> Path:
        if Path(target) == out:
            if moment == "after the name":
                rename(path, target)
            raise Kill
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(Kill):
        patch.setattr(Path, "rename", stop)
        prepare(options_of(corpus), out)
    assert (tmp_path / "out.tmp").exists()
    assert out.exists() == (moment == "after the name")
    prepare(options_of(corpus), out)
    assert file_tree(out) == file_tree(undisturbed)
    assert not (tmp_path / "out.tmp").exists()


# ---- a corpus that changes between two attempts


def interrupted(options: PrepareOptions, out: Path) -> None:
    """A prepare that stops when everything is tokenized."""

    def stop(stage: str, done: int, total: int | None) -> None:
        if stage == "assemble":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(options, out, stop)


@pytest.mark.parametrize("change", ["changed", "removed", "added"])
def test_a_file_that_changes_costs_its_own_part(change: str, corpus: Path, tmp_path: Path, file_tree: Any) -> None:
    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    options = options_of(folder, tokenizer="bytes", deduplicate=False)
    out = tmp_path / "out"
    interrupted(options, out)
    before = finished_parts(out, "tokens")
    file = folder / "small" / "017.jsonl"
    if change == "removed":
        file.unlink()
    else:
        name = "0171.jsonl" if change == "added" else "017.jsonl"
        (folder / "small" / name).write_text('{"text": "short"}\n')
    interrupted(options, out)
    after = finished_parts(out, "tokens")
    assert before.items() <= after.items(), "nothing that is right was written again"
    assert 1 <= len(after) - len(before) <= 2
    prepare(options, out)
    prepare(options, tmp_path / "fresh")
    assert file_tree(out) == file_tree(tmp_path / "fresh")


def test_a_damaged_result_in_the_work_folder_is_made_again(corpus: Path, undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    interrupted(options_of(corpus), out)
    shard = next((tmp_path / "out.tmp" / "tokens").rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert prepare(options_of(corpus), out) == load_card(undisturbed)
    verify(out)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_broken_file_stops_and_when_it_is_mended_the_rest_is_kept(
    workers: int, run: Any, corpus: Path, tmp_path: Path
) -> None:
    import gzip

    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    whole = gzip.compress((folder / "large.jsonl").read_bytes())
    broken = folder / "later.jsonl.gz"
    broken.write_bytes(whole[: len(whole) // 2])
    options = options_of(folder, tokenizer="bytes", deduplicate=False)
    output = run(options, tmp_path / "out", workers).communicate(timeout=60)[0]
    assert f"refused: {broken} cannot be read after line" in output
    assert "repair or remove it" in output
    kept = finished_parts(tmp_path / "out", "tokens")
    assert kept
    broken.write_bytes(whole)
    interrupted(options, tmp_path / "out")
    assert kept.items() <= finished_parts(tmp_path / "out", "tokens").items()
    assert prepare(options, tmp_path / "out").counts.documents == 3000 + 50 + 1200 + 50


def test_a_file_that_is_written_meanwhile_is_named(corpus: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(corpus, tmp_path / "corpus"))

    def append(stage: str, done: int, total: int | None) -> None:
        with (folder / "big.jsonl").open("a") as file:
            file.write("\n")

    with pytest.raises(DataError, match=r"big\.jsonl changed while it was read"):
        prepare(options_of(folder, tokenizer="bytes", deduplicate=False), tmp_path / "out", append)
