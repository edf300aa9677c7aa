# SPDX-License-Identifier: Apache-2.0
"""A save publishes a complete checkpoint, or raises on every rank and publishes none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast.errors import CheckpointError, CheckpointMismatchError, CheckpointWriteError
from ckpt_fast.format.types import ObjectShard, TensorRequest, TensorShard
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.save.seal import last_report
from ckpt_fast.storage import commit
from tests.manifests import manifest_lies
from tests.pipeline.layouts import PLAIN_DTYPES, random_tensor, same, save_tensors, whole
from tests.saves import new_save, save
from tests.storage.test_commit import file_size_limit

pytestmark = pytest.mark.usefixtures("native_impl")

FILES = {"common_files": {"common.pt": b"common"}, "seal_files": {"metadata.json": b"{}"}}


def loaded(directory: Path | str, fqn: str, like: torch.Tensor) -> torch.Tensor:
    into = torch.empty_like(like, memory_format=torch.contiguous_format)
    request = TensorRequest(fqn, into, (0,) * like.dim())
    load_tensors(CheckpointIndex(os.fspath(directory)), [request], verify=True)
    return into


def names(directory: Path) -> set[str]:
    return set(os.listdir(directory))


def test_files_of_a_checkpoint(tmp_path: Path) -> None:
    tensors = {f"w{n}": random_tensor((50, n), torch.float32, n) for n in range(6)}
    report = save_tensors(tmp_path / "new", tensors, writers=2, **FILES)
    data = {"__0_0.distcp", "__0_1.distcp"}
    assert names(tmp_path / "new") == {*data, "common.pt", ".metadata", "metadata.json"}
    assert all(same(loaded(tmp_path / "new", name, tensor), tensor) for name, tensor in tensors.items())
    sizes = [(tmp_path / "new" / name).stat().st_size for name in (*data, "common.pt")]
    assert (report.files, report.nbytes) == (3, sum(sizes))
    assert report.directory == str(tmp_path / "new")
    assert 0 < report.stall_s == report.seconds
    assert {"prepare", "plan", "stage", "encode", "write", "commit"} <= set(report.steps)


def test_training_does_not_wait_until_a_new_directory_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync may wait for all else that a busy drive is to write; the seal must not appear before it."""
    calls: list[str] = []
    sync, seal = commit.fsync_directory, commit.write_in_order
    monkeypatch.setattr(commit, "fsync_directory", lambda path: (calls.append(path), sync(path)))
    monkeypatch.setattr(
        commit, "write_in_order", lambda *args, **named: (calls.append("seal"), seal(*args, **named))
    )
    job = new_save([whole("w", torch.ones(3))], str(tmp_path / "run" / "iter_0000001"), snapshot=True)
    job.stage()
    assert calls == []
    job.write()
    calls.clear()
    job.commit()
    first = calls.index("seal")
    assert calls[:first] == [str(tmp_path / "run"), str(tmp_path), *calls[2:first]]


def test_manifest_describes_the_files(tmp_path: Path) -> None:
    tensors = {f"w{n}": random_tensor((n, 77), torch.bfloat16, n) for n in range(9)}
    tensors["large"] = random_tensor((700, 1000), torch.float32)
    save_tensors(tmp_path, tensors, writers=3, **FILES)
    assert manifest_lies(tmp_path) == []


@pytest.mark.usefixtures("no_fsync")
def test_last_report_is_of_the_last_durable_save(tmp_path: Path) -> None:
    report = save_tensors(tmp_path / "a", {"w": torch.zeros(3)})
    assert last_report() is report
    with pytest.raises(CheckpointError):
        save([TensorShard("w", torch.zeros(3), (0,), (4,))], str(tmp_path / "b"))
    assert last_report() is report


def test_durability_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native_impl: str) -> None:
    synced = []
    original = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(descriptor), original(descriptor)))
    save_tensors(tmp_path / "durable", {"w": torch.zeros(3)})
    assert len(synced) >= (5 if native_impl == "fallback" else 4)
    synced.clear()
    monkeypatch.setenv("CKPT_FAST_FSYNC", "0")
    save_tensors(tmp_path / "scratch", {"w": torch.zeros(3)})
    assert synced == []
    assert same(loaded(tmp_path / "scratch", "w", torch.zeros(3)), torch.zeros(3))


@pytest.mark.usefixtures("no_fsync")
def test_seal_is_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    published = []
    original = os.replace

    def replace(source: str, target: str) -> None:
        published.append(os.path.basename(target))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    seals = {"first": b"1", "metadata.json": b"{}"}
    save_tensors(tmp_path, {"w": torch.zeros(3)}, common_files={"common.pt": b""}, seal_files=seals)
    others = [name for name in published if not name.endswith(".distcp")]
    assert others == ["common.pt", ".metadata", "first", "metadata.json"]
    assert published[-4:] == others


@pytest.mark.usefixtures("no_fsync")
def test_overwriting_a_checkpoint(tmp_path: Path) -> None:
    directory, old = tmp_path / "a", torch.arange(5)
    save_tensors(directory, {f"w{n}": old + n for n in range(4)}, writers=4, **FILES)
    (directory / "notes.txt").write_bytes(b"of the user")
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    new = random_tensor((7,), torch.int32)
    job = new_save([whole("w", new)], str(directory), **FILES)
    job.stage()
    job.write()
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    assert same(loaded(directory, "w3", torch.zeros_like(old)), old + 3)
    job.commit()
    assert names(directory) == {"metadata.json", ".metadata", "common.pt", "notes.txt", "__0_0.distcp"}
    assert same(loaded(directory, "w", new), new)
    assert names(tmp_path) == {"a"}


@pytest.mark.usefixtures("no_fsync")
def test_a_save_that_does_not_replace_ends_the_older_one_first(tmp_path: Path) -> None:
    save_tensors(tmp_path, {f"w{n}": torch.zeros(5) for n in range(4)}, writers=4, **FILES)
    new = random_tensor((7,), torch.int32)
    job = new_save([whole("w", new)], str(tmp_path), replace=False, **FILES)
    job.stage()
    gone = {"metadata.json", ".metadata"}
    assert not names(tmp_path) & gone, "an old seal vouches for new data"
    job.write()
    assert not names(tmp_path) & gone
    job.commit()
    assert names(tmp_path) == {*gone, "common.pt", "__0_0.distcp"}
    assert same(loaded(tmp_path, "w", new), new)


@pytest.mark.usefixtures("no_fsync")
def test_nothing_to_save_is_a_checkpoint(tmp_path: Path) -> None:
    save([], str(tmp_path))
    assert names(tmp_path) == {".metadata"}
    assert CheckpointIndex(str(tmp_path)).metadata.state_dict_metadata == {}


@pytest.mark.usefixtures("no_fsync")
@settings(max_examples=40)
@given(data=st.data())
def test_snapshot_keeps_the_values_of_the_call(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Any dtype, contiguous or not, with buffers for all of it or for a little at a time."""
    directory = tmp_path_factory.mktemp("snapshot")
    tensors, originals = {}, {}
    for number in range(data.draw(st.integers(1, 5))):
        shape = tuple(data.draw(st.lists(st.integers(0, 40), max_size=3)))
        tensor = random_tensor(shape, data.draw(st.sampled_from(PLAIN_DTYPES)), number)
        if data.draw(st.booleans()):
            tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
        tensors[f"w{number}"] = tensor
        originals[f"w{number}"] = tensor.clone()
    bound = data.draw(st.sampled_from([None, 100, 10_000]))
    shards = [whole(fqn, tensor) for fqn, tensor in tensors.items()]
    job = new_save(shards, str(directory), snapshot=True, writers=2, host_buffer=bound)
    job.stage()
    for tensor in tensors.values():
        tensor.untyped_storage().fill_(1)
    job.write()
    job.commit()
    for fqn, original in originals.items():
        assert same(loaded(directory, fqn, original), original)


@pytest.mark.usefixtures("no_fsync")
def test_conjugated_and_negated_views_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.tensor([1 + 2j, 3 - 4j], dtype=torch.complex64)
    views = {"conj": base.conj(), "imag": base.conj().imag}
    assert views["imag"].is_neg()
    for snapshot in (False, True):
        save_tensors(tmp_path, views, snapshot=snapshot)
        assert torch.equal(loaded(tmp_path, "conj", torch.zeros(2, dtype=torch.complex64)), base.conj())
        assert torch.equal(loaded(tmp_path, "imag", torch.zeros(2)), torch.tensor([-2.0, 4.0]))


# Failures.


def assert_not_published(directory: Path) -> None:
    assert not names(directory) & {".metadata", "metadata.json"}
    assert not [name for name in names(directory) if name.endswith(".partial")]


def test_full_disk(tmp_path: Path) -> None:
    old, new = random_tensor((5000,), torch.float32, 1), random_tensor((5000,), torch.float32, 2)
    save_tensors(tmp_path / "old", {"w": old}, **FILES)
    with file_size_limit(8192), pytest.raises(CheckpointWriteError) as caught:
        save_tensors(tmp_path / "new", {"w": new}, **FILES)
    path = str(tmp_path / "new" / "__0_0.distcp")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, path)
    assert str(caught.value).startswith("rank 0: write ") and f"to {path}: File too large" in str(
        caught.value
    )
    assert_not_published(tmp_path / "new")
    assert same(loaded(tmp_path / "old", "w", old), old)
    save_tensors(tmp_path / "new", {"w": new}, **FILES)
    assert same(loaded(tmp_path / "new", "w", new), new)


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize("obstacle", ["__0_0.distcp", "common.pt", ".metadata", "metadata.json"])
def test_a_directory_in_the_way_of_any_file(tmp_path: Path, obstacle: str) -> None:
    (tmp_path / obstacle / "inside").mkdir(parents=True)
    with pytest.raises(CheckpointWriteError, match=f"rank 0: .*{obstacle}") as caught:
        save_tensors(tmp_path, {"w": torch.zeros(9)}, **FILES)
    assert caught.value.errno in (errno.EISDIR, errno.EPERM)
    assert not (tmp_path / "metadata.json").is_file()


@pytest.mark.usefixtures("no_fsync")
def test_a_file_that_vanished_before_the_commit(tmp_path: Path) -> None:
    """As if a rank's disk were not the one that the coordinator sees."""
    for damage, text in (("unlink", "is missing"), ("truncate", r"has 5 bytes instead of \d+")):
        job = new_save([whole("w", torch.zeros(9))], str(tmp_path), **FILES)
        job.stage()
        job.write()
        if damage == "unlink":
            (tmp_path / "__0_0.distcp").unlink()
        else:
            os.truncate(tmp_path / "__0_0.distcp", 5)
        with pytest.raises(CheckpointWriteError, match=f"{text}.*file system that all ranks share"):
            job.commit()
        assert_not_published(tmp_path)


@pytest.mark.usefixtures("no_fsync")
@pytest.mark.parametrize(
    ("shards", "kind", "text"),
    [
        ([whole("w", torch.zeros(4, device="meta"))], CheckpointError, "rank 0: "),
        ([TensorShard("w", torch.zeros(3), (0,), (4,))], CheckpointMismatchError, "3 of the 4 elements of w"),
        (
            [whole("w", torch.zeros(4)), ObjectShard("w", b"x")],
            CheckpointMismatchError,
            "w is a tensor on one",
        ),
    ],
    ids=["meta", "incomplete", "one name twice"],
)
def test_shards_that_cannot_be_saved(tmp_path: Path, shards: list[Any], kind: type, text: str) -> None:
    with pytest.raises(kind, match=text):
        save(shards, str(tmp_path), **FILES)
    assert_not_published(tmp_path)
