# SPDX-License-Identifier: Apache-2.0
"""Bytes on disk that are not what was written: detected, or harmless; never a wrong tensor or a crash."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, CheckpointNotFoundError
from ckpt_fast.format.types import ObjectShard, TensorRequest
from ckpt_fast.pipeline.load.decode import Contents
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_objects, load_tensors
from tests.helpers import memory_limit
from tests.manifests import make_older
from tests.pipeline.layouts import Region, random_tensor, same, shards_of, whole
from tests.saves import save

pytestmark = pytest.mark.usefixtures("native_impl", "no_fsync")

WIDE = random_tensor((6, 5), torch.float32, 1)
FLAT = random_tensor((40,), torch.bfloat16, 2)
OBJECT = "an object that DCP keeps whole"
SLICE = Region((1, 2), (4, 3))


def save_ours(directory: str) -> None:
    payload = io.BytesIO()
    torch.save(OBJECT, payload)
    halves = [Region((0,), (20,)), Region((20,), (20,))]
    save(
        [ObjectShard("object", payload.getvalue()), whole("wide", WIDE), *shards_of("flat", FLAT, halves)],
        directory,
        common_files={"common.pt": b"common"},
        seal_files={"metadata.json": b"{}"},
    )


def save_stock(directory: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"wide": WIDE, "flat": FLAT, "object": OBJECT}, checkpoint_id=directory)


def load_is_right(directory: str) -> bool:
    """Load everything, and a slice of it; return whether all is as saved."""
    index = CheckpointIndex(directory)
    wide, flat, part = torch.zeros_like(WIDE), torch.zeros_like(FLAT), torch.zeros(SLICE.sizes)
    requests = [
        TensorRequest("wide", wide, (0, 0)),
        TensorRequest("flat", flat, (0,)),
        TensorRequest("wide", part, SLICE.offsets),
    ]
    load_tensors(index, requests)
    found = load_objects(index, ["object"])["object"]
    return same(wide, WIDE) and same(flat, FLAT) and same(part, SLICE.of(WIDE)) and found == OBJECT


@pytest.fixture(params=["ours", pytest.param("older", marks=pytest.mark.long), "stock"])
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    (save_stock if request.param == "stock" else save_ours)(str(directory))
    if request.param == "older":
        make_older(directory)
    return directory


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    save_ours(str(directory))
    return directory


def data_file(directory: Path) -> Path:
    (path,) = directory.glob("*.distcp")
    return path


def flips(path: Path, step: int = 1) -> Iterator[int]:
    """Damage the file in many ways in turn, one flipped bit each; restore it at the end."""
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for position in range(0, len(content), step):
            os.pwrite(file.fileno(), bytes([content[position] ^ 1 << position % 8]), position)
            yield position
            os.pwrite(file.fileno(), content[position : position + 1], position)


def test_undamaged(checkpoint: Path) -> None:
    assert load_is_right(str(checkpoint))


@pytest.mark.parametrize("step", [37, pytest.param(11, marks=pytest.mark.long)])
def test_flipped_bit_in_the_data_file(checkpoint: Path, step: int) -> None:
    noticed = 0
    for position in flips(data_file(checkpoint), step):
        try:
            assert load_is_right(str(checkpoint)), f"byte {position}"
        except CheckpointCorruptError:
            noticed += 1
    assert noticed > 10


def test_every_flipped_bit_of_a_tensor_is_detected(ours: Path) -> None:
    content = data_file(ours).read_bytes()
    start = content.index(bytes(WIDE.numpy().tobytes()))
    for position in flips(data_file(ours)):
        if start <= position < start + WIDE.nbytes:
            with pytest.raises(CheckpointCorruptError, match=r"wide in .*has CRC-32 \w{8} instead of \w{8}"):
                load_is_right(str(ours))


def test_flipped_bit_in_our_metadata(ours: Path) -> None:
    for position in flips(ours / ".metadata"):
        with contextlib.suppress(CheckpointCorruptError):
            assert load_is_right(str(ours)), f"byte {position}"


@pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.long)])
def test_flipped_bit_in_stock_metadata(tmp_path: Path, step: int) -> None:
    """It has no checksum: damage may change values, but every error must blame the checkpoint."""
    save_stock(str(tmp_path))
    with memory_limit(4 << 30):
        for _ in flips(tmp_path / ".metadata", step):
            with contextlib.suppress(CheckpointError):
                load_is_right(str(tmp_path))


def test_our_metadata_replaced_by_a_stock_writer(tmp_path: Path) -> None:
    """The sidecar then names a file that is gone."""
    save_ours(str(tmp_path))
    make_older(tmp_path)
    save_stock(str(tmp_path))
    assert (tmp_path / "ckpt_fast.json").exists()
    assert load_is_right(str(tmp_path))


def test_our_metadata_is_compared_with_the_sidecar(ours: Path) -> None:
    """A flip that leaves a valid pickle: in the tensor's name."""
    make_older(ours)
    path = ours / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"wide", b"wild"))
    with pytest.raises(
        CheckpointCorruptError, match=r"\.metadata is damaged: it is not what ckpt_fast\.json says"
    ):
        CheckpointIndex(str(ours))


def test_metadata_of_many_frames_is_compared_too(tmp_path: Path) -> None:
    """Pickles are divided into frames of 64 KiB."""
    save([whole(f"{n:06}" + "x" * 60, torch.zeros(1)) for n in range(600)], str(tmp_path))
    make_older(tmp_path)
    path = tmp_path / ".metadata"
    assert path.stat().st_size > 1 << 16
    path.write_bytes(path.read_bytes().replace(b"000300", b"000x00"))
    with pytest.raises(CheckpointCorruptError, match=r"\.metadata is damaged"):
        CheckpointIndex(str(tmp_path))


def test_flipped_bit_in_the_sidecar(ours: Path) -> None:
    make_older(ours)
    for position in flips(ours / "ckpt_fast.json"):
        with contextlib.suppress(CheckpointCorruptError):
            assert load_is_right(str(ours)), f"byte {position}"


def test_data_file_cut_short(checkpoint: Path) -> None:
    path = data_file(checkpoint)
    nbytes, noticed = path.stat().st_size, 0
    for end in range(nbytes - 1, -1, -83):
        os.truncate(path, end)
        try:
            assert load_is_right(str(checkpoint)), f"cut at {end} of {nbytes}"
        except CheckpointCorruptError as error:
            assert "file ends at" in str(error)
            noticed += 1
    assert noticed > 20


def test_data_file_missing(checkpoint: Path) -> None:
    data_file(checkpoint).unlink()
    with pytest.raises(
        CheckpointNotFoundError, match=r"a data file of the checkpoint is gone: open .*distcp"
    ):
        load_is_right(str(checkpoint))


def test_unreadable_data_file(checkpoint: Path) -> None:
    path = data_file(checkpoint)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match="Is a directory"):
        load_is_right(str(checkpoint))


def test_a_hole_in_the_data_file(checkpoint: Path) -> None:
    """A block that never reached the disk reads as zeros."""
    path = data_file(checkpoint)
    content = bytearray(path.read_bytes())
    begin = content.index(WIDE.numpy().tobytes())
    content[begin : begin + 64] = bytes(64)
    path.write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=rf"wide in {path} .* has CRC-32"):
        load_is_right(str(checkpoint))


def test_data_file_with_other_content(checkpoint: Path) -> None:
    """With the right length, as after mixing files of two checkpoints."""
    path = data_file(checkpoint)
    path.write_bytes(os.urandom(path.stat().st_size))
    with pytest.raises(CheckpointCorruptError, match=path.name):
        load_is_right(str(checkpoint))


def test_an_item_is_missing(ours: Path) -> None:
    metadata = dcp.FileSystemReader(ours).read_metadata()
    lost = next(index for index in metadata.storage_data if index.fqn == "flat" and index.offset == (20,))
    del metadata.storage_data[lost]
    with pytest.raises(CheckpointCorruptError, match=r"makes no sense \(flat has 1 items for 2 pieces\)"):
        CheckpointIndex(str(ours), Contents.of(metadata))


def test_a_shard_is_missing(ours: Path) -> None:
    metadata = dcp.FileSystemReader(ours).read_metadata()
    lost = next(index for index in metadata.storage_data if index.fqn == "flat" and index.offset == (20,))
    del metadata.storage_data[lost]
    del metadata.state_dict_metadata["flat"].chunks[lost.index]
    index = CheckpointIndex(str(ours), Contents.of(metadata))
    message = r"has only 20 of the 40 elements of flat at \(0,\), and none of \(20,\) at \(20,\)"
    with pytest.raises(CheckpointCorruptError, match=message):
        load_tensors(index, [TensorRequest("flat", torch.zeros_like(FLAT), (0,))])


def test_no_descriptor_left(checkpoint: Path) -> None:
    """The checkpoint is not to blame, and no older one should be loaded because of it."""
    index = CheckpointIndex(str(checkpoint))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = max(map(int, os.listdir("/proc/self/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(3, in_use), limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"Too many open files.*remove the cause") as caught:
            load_tensors(index, [TensorRequest("wide", torch.zeros_like(WIDE), (0, 0))])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert not isinstance(caught.value, CheckpointCorruptError)
    assert load_is_right(str(checkpoint))
