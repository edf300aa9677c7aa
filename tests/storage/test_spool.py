# SPDX-License-Identifier: Apache-2.0
"""What passes through a spool, in which order, and what is left. The remote storage is a directory."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
import torch

from ckpt_fast.errors import CheckpointError, CheckpointNotFoundError, CheckpointWriteError
from ckpt_fast.format.types import TensorRequest, TensorShard
from ckpt_fast.pipeline.load.complete import require_complete
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.save import waves
from ckpt_fast.storage.files import Directory
from ckpt_fast.storage.spool import Claim, Spool
from tests.manifests import find_damage
from tests.saves import new_save, save

NAME = "store://checkpoint"
SEALS = {"seal_files": {"metadata.json": b"{}"}, "common_files": {"common.pt": b"common"}}


class Shelf:
    """``Remote`` storage in a directory, which records the requests to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls: list[str] = []
        self.most_spooled = 0
        directory.mkdir(exist_ok=True)

    def put(self, name: str, path: str) -> None:
        spooled = sum(entry.stat().st_size for entry in os.scandir(os.path.dirname(path)))
        self.most_spooled = max(self.most_spooled, spooled)
        self.calls.append(f"put {name}")
        shutil.copy(path, self.directory / name)

    def write(self, name: str, content: bytes) -> None:
        self.calls.append(f"write {name}")
        (self.directory / name).write_bytes(content)

    def get(self, name: str, path: str) -> None:
        self.calls.append(f"get {name}")
        shutil.copy(self.directory / name, path)

    def delete(self, name: str) -> None:
        self.calls.append(f"delete {name}")
        (self.directory / name).unlink(missing_ok=True)

    def sizes(self) -> dict[str, int]:
        return {path.name: path.stat().st_size for path in self.directory.iterdir()}


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    (tmp_path / "spool").mkdir()
    monkeypatch.setenv("CKPT_FAST_SPOOL", str(tmp_path / "spool"))
    return Shelf(tmp_path / "shelf")


def spooled(shelf: Shelf) -> list[str]:
    return os.listdir(shelf.directory.parent / "spool")


def shards(*names: str, rows: int = 256) -> list[TensorShard]:
    whole = torch.arange(rows * 1024, dtype=torch.float32).view(rows, 1024)
    return [TensorShard(name, whole + number, (0, 0), (rows, 1024)) for number, name in enumerate(names)]


def test_order_of_a_save(shelf: Shelf) -> None:
    save(shards("a", "b"), NAME, files=Spool(NAME, shelf), writers=1, **SEALS)
    written = ["put __0_0.distcp", "write common.pt"]
    written += [f"write {name}" for name in (".metadata", "metadata.json")]
    assert shelf.calls == written
    shelf.calls.clear()
    save(shards("a", "b"), NAME, files=Spool(NAME, shelf), writers=1, **SEALS)
    deleted = shelf.calls[: -len(written)]
    assert deleted[:2] == [f"delete {name}" for name in ("metadata.json", ".metadata")]
    assert sorted(deleted[2:]) == ["delete __0_0.distcp", "delete common.pt"]
    assert shelf.calls[-len(written) :] == written
    assert find_damage(str(shelf.directory)) == []
    assert spooled(shelf) == []


def test_only_what_is_wanted_is_fetched(shelf: Shelf) -> None:
    save(shards("a", "b.x", "b.y"), NAME, files=Spool(NAME, shelf), writers=1, separate="b.")
    shelf.calls.clear()
    target = torch.zeros(256, 1024)
    with Spool(NAME, shelf) as files:
        index = CheckpointIndex(files.directory, files=files)
        assert shelf.calls == ["get .metadata", "get ckpt_fast.json"]
        load_tensors(index, [TensorRequest("b.y", target, (0, 0))])
        (wanted,) = {piece.item.path for piece in index.tensor("b.y").pieces}
        assert shelf.calls[2:] == [f"get {wanted}"]
    assert torch.equal(target, shards("a", "b.x", "b.y")[2].tensor)
    assert spooled(shelf) == []


def test_a_bound_on_host_memory(shelf: Shelf) -> None:
    names = [f"t{number}" for number in range(8)]
    job = new_save(
        shards(*names), NAME, files=Spool(NAME, shelf), writers=1, snapshot=True, host_buffer=4 << 20
    )
    job.stage()
    job.write()
    job.commit()
    assert job.report.waves > 1 and [call for call in shelf.calls if call.startswith("put")] == [
        "put __0_0.distcp"
    ]
    assert find_damage(str(shelf.directory)) == []


def test_a_cancelled_save_uploads_no_more(shelf: Shelf) -> None:
    job = new_save(shards("a"), NAME, files=Spool(NAME, shelf), snapshot=True, **SEALS)
    job.stage()
    job.cancel()
    job.write()
    with pytest.raises(CheckpointError, match="was cancelled"):
        job.commit()
    assert not {"write .metadata", "write metadata.json"} & set(shelf.calls)
    assert spooled(shelf) == []


def test_what_is_not_there_is_missed(shelf: Shelf) -> None:
    with (
        pytest.raises(CheckpointNotFoundError, match=f"^{NAME} is not a complete checkpoint"),
        Spool(NAME, shelf) as files,
    ):
        CheckpointIndex(files.directory, files=files)
    save(shards("a"), NAME, files=Spool(NAME, shelf), writers=1)
    (shelf.directory / "__0_0.distcp").unlink()
    with (
        pytest.raises(CheckpointError, match=rf"{NAME}/__0_0\.distcp is missing"),
        Spool(NAME, shelf) as files,
    ):
        require_complete(OpenCheckpoint(files))
    with pytest.raises(CheckpointNotFoundError, match=rf"{NAME}/__0_0\.distcp"), Spool(NAME, shelf) as files:
        index = CheckpointIndex(files.directory, files=files)
        load_tensors(index, [TensorRequest("a", torch.zeros(256, 1024), (0, 0))])
    assert spooled(shelf) == []


def test_an_upload_that_does_not_arrive(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shelf, "put", lambda name, path: shelf.write(name, b"half"))
    with pytest.raises(CheckpointWriteError, match=r"__0_0\.distcp .* has 4 bytes instead of"):
        save(shards("a"), NAME, files=Spool(NAME, shelf), writers=1, **SEALS)
    assert "write metadata.json" not in shelf.calls
    assert spooled(shelf) == []


def test_room_is_asked_for_where_the_spools_are(shelf: Shelf) -> None:
    here, there = Claim(60, "a 1", 100), Claim(60, "b 1", 100)
    Spool(NAME, shelf).prepare([here, there], replace=True)
    with pytest.raises(CheckpointWriteError, match=r"spool on a is about 0\.00 GB"):
        Spool(NAME, shelf).prepare([here, there, here], replace=True)


def test_a_spool_that_cannot_be_made(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_FAST_SPOOL", str(shelf.directory / "none"))
    with pytest.raises(CheckpointWriteError, match=f"rank 0: cannot create a spool for {NAME} in .*/none"):
        save(shards("a"), NAME, files=Spool(NAME, shelf))
    assert shelf.calls == []


def test_a_directory_is_its_own_place(tmp_path: Path) -> None:
    report = save(shards("a"), str(tmp_path), files=Directory(str(tmp_path)))
    assert find_damage(str(tmp_path)) == []
    assert report.directory == str(tmp_path)


def test_a_spool_goes_also_if_its_removal_is_interrupted(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = Spool(NAME, shelf)
    Path(files.directory, "f").write_bytes(b"x")

    def interrupted(*_: object, **__: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    spool = os.path.dirname(files.directory)
    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.close()
    del files
    assert os.listdir(spool) == []


def test_a_full_spool_is_named(shelf: Shelf) -> None:
    job = new_save(shards("a"), NAME, files=Spool(NAME, shelf), snapshot=True, **SEALS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(waves, "write", full)
        job.stage()
        job.write()
    with pytest.raises(
        CheckpointWriteError, match=f"cannot save to {NAME}: the spool in .*/spool, "
    ) as caught:
        job.commit()
    assert "No space left on device" in str(caught.value)
    assert "CKPT_FAST_SPOOL" in str(caught.value)
    assert "file system" not in str(caught.value)
    assert spooled(shelf) == []


def full(_: object, __: object, directory: str, *___: object) -> None:
    raise CheckpointWriteError("full", errno.ENOSPC, f"{directory}/__0_0.distcp")
