# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint runs none of its code, and damage is reported as damage."""

from __future__ import annotations

import collections
import io
import os
import pathlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from ckpt_fast import errors
from ckpt_fast.errors import CheckpointCorruptError, CheckpointNotFoundError, UnsafeCheckpointError
from ckpt_fast.format.types import Extent, FileRecord, ItemRecord
from ckpt_fast.pipeline.load.decode import decode_object, read_dcp_metadata, read_sidecar
from ckpt_fast.pipeline.save.sealed import encode_metadata

MCORE_TORCH = "megatron.core.dist_checkpointing.strategies.torch"


class Calls:
    """Pickles as a call of ``function``."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> Any:
        return self._call


class GlobalNamed:
    """Pickles as the bare global ``module.name``, which need not exist here."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self) -> None:
        """Never called; pickle insists that what a pickle calls is callable."""


def dump(value: Any) -> bytes:
    """Return a pickle in which every ``GlobalNamed`` is a global."""

    class Pickler(pickle._Pickler):  # type: ignore[misc,name-defined]
        def save(self, obj: Any, save_persistent_id: bool = True) -> None:
            if isinstance(obj, GlobalNamed):
                self.write(f"c{obj.module}\n{obj.name}\n".encode())
            else:
                super().save(obj, save_persistent_id)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(value)
    return buffer.getvalue()


def write(directory: Path, content: bytes) -> str:
    (directory / ".metadata").write_bytes(content)
    return str(directory)


def archive_of(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


HOSTILE = [
    ("os", "system"),
    ("posix", "system"),
    ("builtins", "eval"),
    ("builtins", "getattr"),
    ("builtins", "exec"),
    ("subprocess", "Popen"),
    ("torch", "load"),
    ("torch", "ops"),
    ("torch.serialization", "load"),
    ("torch.serialization", "os.system"),
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.distributed.checkpoint.metadata", "os"),
    ("torch.distributed.checkpoint.filesystem", "FileSystemReader"),
    ("torch.distributed.checkpoint.planner", "SavePlanner"),
    ("collections", "_sys.modules"),
    ("pathlib", "os.system"),
    ("ckpt_fast.errors", "CheckpointError"),
    ("ckpt_fast.format.types", "Extent"),
    ("functools", "partial"),
    ("no_such_module", "thing"),
]


@pytest.mark.parametrize(("module", "name"), HOSTILE, ids=".".join)
def test_metadata_that_names_anything_else_is_refused(tmp_path: Path, module: str, name: str) -> None:
    directory = write(tmp_path, dump(Metadata({}, planner_data=GlobalNamed(module, name))))
    with pytest.raises(UnsafeCheckpointError) as caught:
        read_dcp_metadata(directory)
    text = str(caught.value)
    assert f"{directory}/.metadata: refused to load {module}.{name}" in text
    assert "CKPT_FAST_ALLOW_PICKLE=1" in text


def test_refused_metadata_runs_nothing(tmp_path: Path) -> None:
    proof = tmp_path / "ran"
    directory = write(tmp_path, pickle.dumps(Metadata({}, planner_data=Calls(os.mkdir, str(proof)))))
    with pytest.raises(UnsafeCheckpointError):
        read_dcp_metadata(directory)
    assert not proof.exists()


def test_opting_in_runs_what_the_metadata_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = tmp_path / "ran"
    directory = write(tmp_path, pickle.dumps(Metadata({}, planner_data=Calls(os.mkdir, str(proof)))))
    monkeypatch.setenv("CKPT_FAST_ALLOW_PICKLE", "1")
    assert isinstance(read_dcp_metadata(directory), Metadata)
    assert proof.is_dir()


@pytest.mark.parametrize(
    "target",
    [
        ("torch.distributed.checkpoint.metadata", "Metadata"),
        ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.distributed.checkpoint.planner", "WriteItem"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "Path"),
    ],
    ids=".".join,
)
def test_metadata_cannot_change_the_classes_it_names(tmp_path: Path, target: tuple[str, str]) -> None:
    """A pickle may set attributes of whatever is on its stack, classes included."""
    module, name = target
    content = b"\x80\x04" + f"c{module}\n{name}\n".encode() + b"N}\x8c\x06hackedK\x01s\x86b."
    directory = write(tmp_path, content)
    with pytest.raises((UnsafeCheckpointError, CheckpointCorruptError)):
        read_dcp_metadata(directory)
    for thing in (Metadata, MetadataIndex, pathlib.Path, torch.serialization._get_layout):
        assert not hasattr(thing, "hacked")


def test_metadata_of_stock_dcp_with_all_it_may_hold(tmp_path: Path) -> None:
    state = {"a": {"w": torch.ones(3, 2), "n": 4}, "list": [torch.zeros(1), "x"]}
    dcp.save(state, checkpoint_id=tmp_path)
    with (tmp_path / ".metadata").open("rb") as file:
        expected = pickle.load(file)
    assert read_dcp_metadata(str(tmp_path)) == expected


def test_paths_and_containers_are_data(tmp_path: Path) -> None:
    data = {"p": tmp_path, "d": collections.OrderedDict(a=1), "q": collections.defaultdict(None, b=2)}
    found = read_dcp_metadata(write(tmp_path, pickle.dumps(Metadata({}, planner_data=data))))
    assert found.planner_data == data


def test_path_pickled_by_another_python(tmp_path: Path) -> None:
    for module in ("pathlib", "pathlib._local"):
        path = Calls(GlobalNamed(module, "PosixPath"), "/", "a")
        found = read_dcp_metadata(write(tmp_path, dump(Metadata({}, planner_data=path))))
        assert found.planner_data == Path("/a")


def entry() -> dict[str, TensorStorageMetadata]:
    chunk = ChunkStorageMetadata(torch.Size([0]), torch.Size([2]))
    return {"w": TensorStorageMetadata(TensorProperties(dtype=torch.int8), torch.Size([2]), [chunk])}


def test_retired_plans_of_megatron_core(tmp_path: Path) -> None:
    metadata = Metadata(entry())
    metadata.all_local_plans = [Calls(GlobalNamed(MCORE_TORCH, "MCoreSavePlan"))]  # type: ignore[attr-defined]
    assert read_dcp_metadata(write(tmp_path, dump(metadata))).state_dict_metadata == entry()


def test_retired_metadata_of_megatron_core(tmp_path: Path) -> None:
    """Before 0.16, the whole metadata was an object of a subclass with one more field."""
    state = dump({**vars(Metadata(entry())), "mcore_data": {"w": {}}})[2:-1]
    header = f"c{MCORE_TORCH}\nMCoreMetadata\n)".encode() + pickle.NEWOBJ
    found = read_dcp_metadata(write(tmp_path, b"\x80\x02" + header + state + pickle.BUILD + pickle.STOP))
    assert found.state_dict_metadata == entry()


def good_metadata() -> bytes:
    extent = Extent("__0_0.distcp", 0, 100)
    return encode_metadata([ItemRecord("w", extent, torch.float32, (0,), (2,), (2,))])


def test_metadata_cut_short_anywhere(tmp_path: Path) -> None:
    content = good_metadata()
    for nbytes in range(len(content)):
        with pytest.raises(CheckpointCorruptError, match=r"\.metadata"):
            read_dcp_metadata(write(tmp_path, content[:nbytes]))


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"garbage", b"\x80\x04N.", pickle.dumps({"a": 1}), pickle.dumps(Metadata)]
)
def test_invalid_metadata(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointCorruptError, match=r"load an earlier iteration|not checkpoint metadata"):
        read_dcp_metadata(write(tmp_path, content))


def test_missing_metadata(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointNotFoundError, match=r"not a complete checkpoint: it has no \.metadata file"
    ):
        read_dcp_metadata(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the directory does not exist"):
        read_dcp_metadata(str(tmp_path / "nowhere"))


def test_metadata_of_one_rank(tmp_path: Path) -> None:
    (tmp_path / "__3.metadata").write_bytes(good_metadata())
    assert "w" in read_dcp_metadata(str(tmp_path), "__3").state_dict_metadata
    with pytest.raises(CheckpointNotFoundError, match=r"it has no __4\.metadata file"):
        read_dcp_metadata(str(tmp_path), "__4")


# Objects.


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("value", [[1, "two", {"t": 3.0}], None, collections.OrderedDict(a=1)], ids=repr)
def test_objects_come_back(value: Any, verify: bool) -> None:
    assert decode_object(archive_of(value), "it", verify) == value


def test_objects_with_tensors_come_back() -> None:
    value = {"t": torch.arange(5), "u": torch.ones(2, 2).t()}
    found = decode_object(archive_of(value), "it", True)
    assert all(torch.equal(found[key], value[key]) for key in value)


def test_object_that_runs_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = tmp_path / "ran"
    payload = archive_of(Calls(os.mkdir, str(proof)))
    with pytest.raises(
        UnsafeCheckpointError, match=r"(?s)it holds more than tensors.*CKPT_FAST_ALLOW_PICKLE=1"
    ):
        decode_object(payload, "it", True)
    assert not proof.exists()
    monkeypatch.setenv("CKPT_FAST_ALLOW_PICKLE", "1")
    decode_object(payload, "it", True)
    assert proof.is_dir()


def test_object_of_our_own_classes_is_refused() -> None:
    with pytest.raises(UnsafeCheckpointError):
        decode_object(archive_of(errors.CheckpointError("x")), "it", True)


def test_object_in_the_format_before_zip() -> None:
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(2)}, buffer, _use_new_zipfile_serialization=False)
    assert torch.equal(decode_object(buffer.getvalue(), "it", True)["a"], torch.ones(2))


@pytest.mark.parametrize("verify", [True, False])
def test_object_cut_short_anywhere(verify: bool) -> None:
    payload = archive_of({"a": 1})
    for nbytes in range(0, len(payload), 7):
        with pytest.raises(CheckpointCorruptError, match=r"it .*load an earlier iteration"):
            decode_object(payload[:nbytes], "it", verify)


def test_object_with_a_flipped_bit_anywhere() -> None:
    value = {"a": torch.arange(4), "b": [1, 2]}
    payload = archive_of(value)
    for position in range(len(payload)):
        for bit in (0, 3, 7):
            damaged = bytearray(payload)
            damaged[position] ^= 1 << bit
            try:
                found = decode_object(bytes(damaged), "it", True)
            except CheckpointCorruptError:
                continue
            assert torch.equal(found["a"], value["a"]) and found["b"] == value["b"]


# The sidecar of checkpoints from before the manifest.


def test_sidecar_comes_back(tmp_path: Path) -> None:
    files = [FileRecord("__0_0.distcp", 5, 0xDEADBEEF), FileRecord("common.pt", 0, 0)]
    entries = '"__0_0.distcp": {"nbytes": 5, "crc32": "deadbeef"}, "common.pt": {"nbytes": 0, "crc32": "0"}'
    (tmp_path / "ckpt_fast.json").write_text(f'{{"version": 1, "files": {{{entries}}}}}')
    assert read_sidecar(str(tmp_path)) == files


def test_no_sidecar(tmp_path: Path) -> None:
    assert read_sidecar(str(tmp_path)) is None


def test_sidecar_of_a_later_version_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "ckpt_fast.json").write_text('{"version": 2, "anything": true}')
    assert read_sidecar(str(tmp_path)) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"version": "1"}',
        b'{"version": 1}',
        b'{"version": 1, "files": []}',
        b'{"version": 1, "files": {"a": 5}}',
        b'{"version": 1, "files": {"a": {"nbytes": 1}}}',
        b'{"version": 1, "files": {"a": {"nbytes": 1, "crc32": "xyz"}}}',
        b'{"version": 1, "files": {"a": {"nbytes": 1, "crc32": 7}}}',
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_damaged_sidecar(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "ckpt_fast.json").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"ckpt_fast\.json cannot be parsed"):
        read_sidecar(str(tmp_path))
