"""Datasets below a URL: tokens as from the folder, patience with what passes, one clear sentence for what does not."""

from __future__ import annotations

import json
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data.remotes import S3, Fault, FaultyProxy
from titans_data import DataError, MdsSource, open_source
from titans_data.files import local_folder
from titans_data.remote import Remote, Retries
from titans_data.tokenize import load_tokenizer

URL = "s3://bucket/corpus"
QUICK = Retries(attempts=4, first_wait_s=0.01, timeout_s=5.0)

Open = Callable[..., MdsSource]


def smallest_cache(card: Any) -> int:
    return 2 * max(file.size_bytes for split in card.splits.values() for file in (split.index, *split.shards))


@pytest.fixture
def open_url(prepared: Any, tmp_path: Path) -> Open:
    """Open a URL with an own cache that is as small as may be."""

    def run(url: str, split: str = "train", retries: Retries = QUICK) -> MdsSource:
        return MdsSource(url, split, tmp_path / "cache", smallest_cache(prepared.card), retries)

    return run


@pytest.fixture
def shard(prepared: Any) -> str:
    """The name of a shard of the train split."""
    return str(prepared.card.splits["train"].shards[1].name)


def read_all(source: MdsSource) -> list[int]:
    tokens: list[int] = source.read(0, source.num_tokens)[0].tolist()
    return tokens


# ---- equal to the folder


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("kind", ["s3", "file"])
def test_any_span_of_a_url_is_that_span_of_the_folder(
    kind: str, data: st.DataObject, prepared: Any, s3: S3, open_url: Open
) -> None:
    """With room for two shards only, so that most reads download."""
    split = data.draw(st.sampled_from(["train", "validation"]))
    source = open_url(URL if kind == "s3" else prepared.folder.as_uri(), split)
    local = MdsSource(prepared.folder, split)
    start = data.draw(st.integers(0, source.num_tokens - 1))
    length = data.draw(st.integers(1, min(300, source.num_tokens - start)))
    source.fetch(start, length)
    for ours, theirs in zip(source.read(start, length), local.read(start, length), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tolist() == theirs.tolist()


def test_a_url_says_of_itself_what_the_folder_does(prepared: Any, s3: S3, open_url: Open) -> None:
    source, local = open_url(f"{URL}/", "validation"), MdsSource(prepared.folder, "validation")
    for name in ("num_tokens", "vocab_size", "end_of_document", "bytes_per_token", "fingerprint"):
        assert getattr(source, name) == getattr(local, name)
    assert source.shards.tolist() == local.shards.tolist()
    assert (source.is_remote, local.is_remote) == (True, False)


def test_a_second_reader_of_the_node_asks_for_the_card_alone(prepared: Any, proxy: FaultyProxy, tmp_path: Path) -> None:
    first = MdsSource(URL, cache=tmp_path, retries=QUICK)
    assert read_all(first) == prepared.train.tokens
    proxy.requests.clear()
    assert read_all(MdsSource(URL, cache=tmp_path, retries=QUICK)) == prepared.train.tokens
    assert {request.split("/")[-1] for request in proxy.requests} == {"dataset.json"}


def test_fetching_brings_what_reading_needs(prepared: Any, proxy: FaultyProxy, tmp_path: Path) -> None:
    source = MdsSource(URL, cache=tmp_path, retries=QUICK)
    source.fetch(0, source.num_tokens)
    proxy.faults.append(Fault("", "error"))
    assert read_all(source) == prepared.train.tokens


def test_a_pickled_source_asks_no_remote_when_it_is_loaded(prepared: Any, proxy: FaultyProxy, open_url: Open) -> None:
    packed = pickle.dumps(open_url(URL))
    proxy.requests.clear()
    source = pickle.loads(packed)
    assert not proxy.requests
    assert read_all(source) == prepared.train.tokens


def test_open_source_opens_a_url(prepared: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert open_source(prepared.folder.as_uri()).read(3, 100)[0].tolist() == prepared.train.tokens[3:103]
    assert list((tmp_path / f"titans_data-{Path.home().stat().st_uid}" / "objects").iterdir())


def test_a_url_has_its_card_and_tokenizer_here_on_demand(
    prepared: Any, proxy: FaultyProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = local_folder(URL, tmp_path)
    assert (folder / "dataset.json").read_bytes() == (prepared.folder / "dataset.json").read_bytes()
    assert load_tokenizer(folder / "tokenizer").fingerprint == prepared.card.tokenizer_fingerprint
    proxy.requests.clear()
    assert local_folder(URL, tmp_path) == folder
    assert {request.split("/")[-1] for request in proxy.requests} == {"dataset.json"}
    shutil.rmtree(folder / "tokenizer")  # as programs that tidy /tmp do
    assert local_folder(URL, tmp_path) == folder
    assert load_tokenizer(folder / "tokenizer").fingerprint == prepared.card.tokenizer_fingerprint
    assert local_folder(prepared.folder) == prepared.folder
    assert not list((tmp_path / "incoming").iterdir())


# ---- what passes


@pytest.mark.parametrize(
    "fault",
    [
        Fault("shard", "error", 3),
        Fault("dataset.json", "error", 3),
        Fault("shard", "truncate", 7),
        Fault("shard", "flip", 3),
        Fault("index.json", "flip", 3),
        Fault("shard", "missing", 1),
        Fault("shard", "hang", 1),
    ],
    ids=lambda fault: f"{fault.kind}-{fault.path}",
)
def test_a_fault_that_passes_costs_time_alone(
    fault: Fault, prepared: Any, proxy: FaultyProxy, open_url: Open, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.faults.append(fault)
    source = open_url(URL, retries=Retries(attempts=4, first_wait_s=0.01, timeout_s=0.5))
    assert read_all(source) == prepared.train.tokens
    assert fault.times == 0
    if fault.kind != "hang":  # which boto3 mends by itself
        assert "attempt 1 of 4 failed" in caplog.text


# ---- what does not


@pytest.mark.parametrize(
    ("kind", "asked", "words"),
    [
        ("flip", 3, "could not be downloaded in 3 attempts .at last it does not have the sha256 on its card.: check"),
        ("truncate", 3, "could not be downloaded in 3 attempts .at last RetriesExceededError: .*: check"),
        ("error", 3, "could not be downloaded in 3 attempts .at last ClientError: .*500.*: check"),
        ("missing", 2, "does not exist: correct the URL or upload the file again"),
        ("denied", 1, "may not be read or does not exist .ClientError: .*: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACC"),
    ],
)
def test_a_fault_that_stays_is_one_sentence_with_the_url(
    kind: str, asked: int, words: str, shard: str, proxy: FaultyProxy, open_url: Open
) -> None:
    source = open_url(URL, retries=Retries(3, 0.01, 5.0))
    proxy.faults.append(Fault(shard, kind))
    with pytest.raises(DataError, match=rf"^{URL}/{shard} {words}") as caught:
        read_all(source)
    assert "\n" not in str(caught.value)
    assert proxy.count(shard, "HEAD") == asked


def test_a_shard_with_another_bit_on_the_remote_is_refused(
    prepared: Any, shard: str, s3: S3, tmp_path: Path, open_url: Open
) -> None:
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    content = bytearray((folder / shard).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / shard).write_bytes(content)
    for url in (s3.upload(folder, "damaged"), folder.as_uri()):
        with pytest.raises(DataError, match=rf"^{url}/{shard} could not be downloaded in 4 attempts .*sha256 on its"):
            read_all(open_url(url))


def test_a_remote_that_hangs_for_good_is_given_up(shard: str, proxy: FaultyProxy, open_url: Open) -> None:
    source = open_url(URL, retries=Retries(2, 0.01, 0.2))
    proxy.faults.append(Fault(shard, "hang"))
    with pytest.raises(DataError, match=rf"^{URL}/{shard} could not be downloaded in 2 attempts .*[tT]imeout"):
        read_all(source)


def test_absent_credentials_are_asked_for(s3: S3, open_url: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(DataError, match=rf"^{URL}/dataset.json may not be read .*: set AWS_ACCESS_KEY_ID and"):
        open_url(URL)


def test_a_package_that_a_remote_needs_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "databricks", None)
    with pytest.raises(DataError, match=r"^dbfs:/a/dataset.json cannot be downloaded .*: install the package"):
        Remote("dbfs:/a", QUICK).download("dataset.json", Path("unused"), lambda path: None)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("s3://bucket/absent", "s3://bucket/absent/dataset.json does not exist: correct the URL"),
        ("s3://absent/corpus", "s3://absent/corpus/dataset.json does not exist: correct the URL"),
        ("file:///absent/corpus", "file:///absent/corpus/dataset.json does not exist: correct the URL"),
        ("file://corpus", "file://corpus is not a file URL: give file:// and an absolute path"),
        ("ftp://host/corpus", "ftp://host/corpus is of an unknown kind: choose a local folder or one of .*azure.*s3"),
    ],
)
def test_a_url_that_cannot_be_is_named(url: str, words: str, s3: S3, open_url: Open) -> None:
    with pytest.raises(DataError, match=f"^{words}"):
        open_url(url)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<html>", "dataset.json could not be downloaded in 4 attempts .at last it is not JSON"),
        (b'{"format_version": 1}', "dataset.json has format version 1, this program reads"),
        (b'{"format_version": 2}', "dataset.json is not a dataset card"),
    ],
)
def test_an_unreadable_card_is_named_by_its_url(
    content: bytes, words: str, prepared: Any, tmp_path: Path, open_url: Open
) -> None:
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=rf"^{folder.as_uri()}/{words}"):
        open_url(folder.as_uri())


def test_an_index_that_is_not_the_one_on_the_card_is_refused(prepared: Any, tmp_path: Path, open_url: Open) -> None:
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    index = folder / "train" / "index.json"
    index.write_bytes(index.read_bytes().replace(b'"bytes", ', b'"pkl",   ', 1))
    with pytest.raises(DataError, match=rf"^{index.as_uri()} could not be downloaded .*sha256"):
        open_url(folder.as_uri())


def test_a_tokenizer_of_another_dataset_is_refused(prepared: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(prepared.folder, tmp_path / "copy"))
    card = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(card | {"tokenizer_fingerprint": "other"}))
    with pytest.raises(DataError, match=rf"^{folder.as_uri()}/tokenizer is not the tokenizer on the card"):
        local_folder(folder.as_uri(), tmp_path / "cache")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"attempts": 0}, "attempts of a download is 0: give at least 1"),
        ({"first_wait_s": -1.0}, "first_wait_s of a download is -1.0: give 0 or more"),
        ({"timeout_s": 0.0}, "timeout_s of a download is 0.0: give more than 0"),
    ],
)
def test_impossible_retries_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        Retries(**values)
