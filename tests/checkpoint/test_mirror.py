"""A copy of every checkpoint in a bucket or folder, from which a run goes on whose own folder is gone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoint.test_sharded import state
from tests.data.remotes import S3, Fault, faulty_proxy, moto_server, use_endpoint
from tests.distributed import run_distributed
from titans_dist.checkpoint import mirror
from titans_dist.checkpoint.mirror import restore, upload
from titans_dist.checkpoint.saver import Saver, SaveResult
from titans_dist.checkpoint.sharded import load
from titans_dist.checkpoint.store import Store, sealed
from titans_dist.config.errors import CheckpointError
from titans_dist.config.run import CheckpointConfig


@pytest.fixture(scope="module")
def log_of_s3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("moto") / "log"


@pytest.fixture(scope="module")
def s3(log_of_s3: Path) -> Iterator[S3]:
    with moto_server(log_of_s3) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "FIRST_WAIT_S", 0.01)


@pytest.fixture(params=["s3", "folder", "file url"])
def address(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "s3":
        server: S3 = request.getfixturevalue("s3")
        use_endpoint(monkeypatch, server.endpoint)
        return f"s3://bucket/{tmp_path.name}/run"
    folder = tmp_path / "mirror of a run"
    return str(folder) if request.param == "folder" else folder.as_uri()


def committed(store: Store, step: int, permanent: bool = False) -> Path:
    folder = store.begin(step)
    (folder / "a.bin").write_bytes(bytes([step]) * 100_000)
    (folder / ".metadata").write_bytes(b"index")
    return store.commit(step, {"tokens": step}, permanent=permanent, digests={"step": str(step)})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "run" / "checkpoints")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_newest_checkpoint_comes_back_byte_by_byte(store: Store, address: str, tmp_path: Path) -> None:
    for step in (1, 2):
        committed(store, step, permanent=step == 2)
        upload(store, step, address)
    elsewhere, said = Store(tmp_path / "elsewhere"), []
    assert restore(elsewhere, address, said.append) == 2
    assert elsewhere.committed() == [2] and elsewhere.leftovers() == []
    elsewhere.verify(2)
    ours, theirs = contents(store.folder(2)), contents(elsewhere.folder(2))
    assert json.loads(ours.pop("manifest.json")) == json.loads(theirs.pop("manifest.json"))
    assert ours == theirs
    assert said == [f"step 2 is fetched from {address}"]


def test_an_address_without_checkpoints_is_no_error(address: str, tmp_path: Path) -> None:
    assert restore(Store(tmp_path / "elsewhere"), address, pytest.fail) is None


def test_the_manifest_goes_after_the_files_and_latest_last(
    store: Store, s3: S3, log_of_s3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(store, 1)
    use_endpoint(monkeypatch, s3.endpoint)
    upload(store, 1, "s3://bucket/order")
    sent = re.findall(r'"PUT (/bucket/order/\S+) HTTP', log_of_s3.read_text())
    folder = "/bucket/order/step_00000001"
    assert sent == [f"{folder}/.metadata", f"{folder}/a.bin", f"{folder}/manifest.json", "/bucket/order/latest"]


def cut(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"short")


def remove(folder: Path) -> None:
    (folder / "a.bin").unlink()


def remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def lead_outside(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text().replace('"a.bin"', '"../a.bin"'))
    del manifest["sha256"]
    path.write_text(sealed(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"a\.bin is damaged: it is not the file that its manifest\.json describes"),
        (remove, r"a\.bin is missing: write the name of another checkpoint"),
        (remove_manifest, r"has no manifest\.json: write the name of a checkpoint"),
        (lead_outside, r"names a file outside of the checkpoint: \.\./a\.bin"),
        (lambda folder: (folder.parent / "latest").write_text("../other"), r"names no checkpoint \('\.\./other'\)"),
    ],
)
def test_a_damaged_mirror_is_refused_and_commits_nothing(
    store: Store, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    committed(store, 1)
    folder = tmp_path / "mirror"
    upload(store, 1, str(folder))
    damage(folder / "step_00000001")
    elsewhere = Store(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=message):
        restore(elsewhere, str(folder), lambda sentence: None)
    assert elsewhere.committed() == [] and elsewhere.leftovers() == []


def test_a_damaged_object_is_fetched_again(
    store: Store, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    committed(store, 1)
    use_endpoint(monkeypatch, s3.endpoint)
    upload(store, 1, "s3://bucket/again")
    with faulty_proxy(s3.port) as proxy:
        proxy.faults = [Fault("a.bin", "flip", times=1), Fault("manifest.json", "error", times=1)]
        use_endpoint(monkeypatch, proxy.url)
        elsewhere = Store(tmp_path / "elsewhere")
        assert restore(elsewhere, "s3://bucket/again", lambda sentence: None) == 1
        assert proxy.count("a.bin") == 2
    elsewhere.verify(1)


def test_a_remote_that_does_not_answer_is_not_taken_for_an_empty_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"s3://bucket/run/latest could not be downloaded in 4 attempts"):
        restore(Store(tmp_path / "elsewhere"), "s3://bucket/run", pytest.fail)


def test_an_unknown_kind_of_address_is_named(store: Store) -> None:
    committed(store, 1)
    with pytest.raises(CheckpointError, match=r"ftp://host/run/step_00000001/\.metadata could not be written"):
        upload(store, 1, "ftp://host/run")


def save_with_mirror(rank: int, world: int, root: Path, address: str, spoil: Path | None) -> list[SaveResult | None]:
    mirror.FIRST_WAIT_S = 0.01
    saver = Saver(Store(root), CheckpointConfig(keep=2, mirror=address))
    results = []
    for step in (1, 2):
        saver.start(step, state(rank, world, step), {"tokens": step})
        results.append(saver.wait())
        if rank == 0 and step == 1 and spoil is not None:
            spoil.unlink()
    saver.close()
    return results


def load_restored(rank: int, world: int, root: Path, address: str) -> torch.Tensor:
    if rank == 0:
        restore(Store(root), address, lambda sentence: None)
    torch.distributed.barrier()
    split: torch.Tensor = load(Store(root), 2, state(rank, world, -1))["split"]
    return split


def test_a_run_goes_on_from_its_mirror(tmp_path: Path) -> None:
    address = str(tmp_path / "mirror")
    for results in run_distributed(save_with_mirror, 2, tmp_path / "run", address, None):
        assert [(result.error, result.mirror_error) for result in results] == [(None, None)] * 2
    parts = run_distributed(load_restored, 2, tmp_path / "elsewhere", address)
    for rank, part in enumerate(parts):
        assert torch.equal(part, state(rank, 2, 2)["split"].data)


def test_a_mirror_that_fails_is_told_on_all_ranks_and_stops_nothing(tmp_path: Path) -> None:
    """A file lies where the folder should be; it is gone for the second save."""
    address = tmp_path / "mirror"
    address.write_text("in the way")
    ranks = run_distributed(save_with_mirror, 2, tmp_path / "run", str(address), address)
    assert ranks[0] == ranks[1]
    first, second = ranks[0]
    assert first.error is None and first.attempts == 1
    assert f"{address}/step_00000001/.metadata could not be written in 4 attempts" in first.mirror_error
    assert second.error is None and second.mirror_error is None
    assert Store(tmp_path / "run").committed() == [1, 2]
    assert (address / "latest").read_text() == "step_00000002\n"
