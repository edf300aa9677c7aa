# SPDX-License-Identifier: Apache-2.0
"""No file takes more memory or time than its length justifies, whatever it contains and whatever it is."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from ckpt_fast import native
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError, UnsafeCheckpointError
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.decode import decode_object, read_contents, read_dcp_metadata, read_sidecar
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_objects, load_tensors
from tests.manifests import make_older
from tests.pipeline.load.test_damage import WIDE, data_file, save_ours
from tests.storage.test_small_files import SPECIAL, make_special

pytestmark = pytest.mark.usefixtures("native_impl", "no_fsync")

CAN_MEASURE = os.access("/proc/self/clear_refs", os.W_OK)
MOST_MEMORY = 300 << 20


def memory(name: str) -> int:
    """Return bytes from the kernel's accounting of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10


@pytest.fixture
def bounded() -> Iterator[None]:
    """Assert that memory use grows by less than 300 MiB during the test."""
    before = memory("VmRSS")
    if CAN_MEASURE:
        Path("/proc/self/clear_refs").write_text("5")
    yield
    assert not CAN_MEASURE or memory("VmHWM") - before < MOST_MEMORY


@pytest.fixture
def at_once(bounded: None) -> Iterator[None]:
    """... and that it takes less than 5 seconds."""
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < 5


def save_stock(directory: Path, state: dict[str, Any]) -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=directory)
    return (directory / ".metadata").read_bytes()


def metadata_of(kind: str, directory: Path) -> bytes:
    if kind == "ours":
        save_ours(str(directory))
        return (directory / ".metadata").read_bytes()
    if kind == "stock":
        return save_stock(directory, {"w": torch.ones(3, 2)})
    content = save_stock(directory, {"a": {"w": torch.ones(3, 2), "n": 4}, "list": [torch.zeros(1), "x"]})
    return pickle.dumps(pickle.loads(content), protocol=2) if kind == "protocol 2" else content


@pytest.mark.timeout(900)
@pytest.mark.parametrize("step", [23, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize("kind", ["ours", "stock", "stock, nested", "protocol 2"])
def test_flipped_bits_of_metadata(tmp_path: Path, kind: str, step: int, bounded: None) -> None:
    """One of our errors, or metadata that can be indexed; if it is ours, only what was written."""
    content = metadata_of(kind, tmp_path)
    (tmp_path / ".metadata").write_bytes(content)
    original = read_dcp_metadata(str(tmp_path))
    slowest, refused = 0.0, 0
    with (tmp_path / ".metadata").open("r+b", buffering=0) as file:
        for bit in range(0, 8 * len(content), step):
            at, damaged = bit // 8, bytes([content[bit // 8] ^ 1 << bit % 8])
            os.pwrite(file.fileno(), damaged, at)
            begin = time.monotonic()
            try:
                contents = read_contents(str(tmp_path))
                metadata, index = contents.metadata, CheckpointIndex(str(tmp_path), contents)
                for name in metadata.state_dict_metadata:
                    index.tensor(name)
                assert kind != "ours" or metadata == original
            except CheckpointError:
                refused += 1
            slowest = max(slowest, time.monotonic() - begin)
            os.pwrite(file.fileno(), content[at : at + 1], at)
    assert refused > len(content) // step
    assert slowest < 5


def nested(levels: int) -> Any:
    value: Any = ()
    for _ in range(levels):
        value = (value, value)
    return value


def with_memo_of_all_memory() -> bytes:
    content = pickle.dumps(Metadata({}), protocol=2)
    return content[:-1] + b"r\xff\xff\xff\x3f."


BOMBS = {
    "memo": with_memo_of_all_memory,
    "shared tuples": lambda: pickle.dumps(Metadata({}, planner_data=nested(60)), 4),
    "shared tuples in an index": lambda: pickle.dumps(Metadata({}, storage_data=nested(200)), 4),
    "key": lambda: b"\x80\x04}K\x01\x94" + b"".join(b"h%c\x86\x94" % n for n in range(60)) + b"Ns.",
    "deep": lambda: b"\x80\x04)" + b"\x85" * 500_000 + b".",
    "integer": lambda: b"\x80\x04\x8b\xff\xff\xff\x7f" + b"1" * 100 + b".",
    "long path": lambda: (
        b"\x80\x04\x8c\x07pathlib\x8c\x09PosixPath\x93\x94X\x40\x42\x0f\x00" + b"a/" * 500_000
        + b"\x94(" + b"h\x01" * 100_000 + b"tR."
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_pickle_that_grows_is_refused(tmp_path: Path, name: str, at_once: None) -> None:
    (tmp_path / ".metadata").write_bytes(BOMBS[name]())
    with pytest.raises(CheckpointCorruptError, match=r"cannot be parsed \(ValueError: opcode 0x"):
        read_dcp_metadata(str(tmp_path))


def test_bounds_stay_where_code_is_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: None
) -> None:
    monkeypatch.setenv("CKPT_FAST_ALLOW_PICKLE", "1")
    (tmp_path / ".metadata").write_bytes(BOMBS["memo"]())
    with pytest.raises(CheckpointCorruptError, match="memo has no place"):
        read_dcp_metadata(str(tmp_path))


def test_metadata_cannot_change_the_members_of_an_enum(tmp_path: Path) -> None:
    """They are the same objects for the whole process."""
    member = b"\x80\x04ctorch.distributed.checkpoint.planner\nWriteItemType\nK\x01\x85"
    for made in (b"R", b"\x81"):
        (tmp_path / ".metadata").write_bytes(member + made + b"}\x8c\x06hackedK\x01sb.")
        with pytest.raises((CheckpointCorruptError, UnsafeCheckpointError)):
            read_dcp_metadata(str(tmp_path))
    assert not hasattr(dcp.planner.WriteItemType.SHARD, "hacked")


def test_large_metadata_is_not_suspicious(tmp_path: Path) -> None:
    index = [MetadataIndex(f"{n:0100}", torch.Size([n, n]), n) for n in range(3000)]
    plain = Metadata(
        {}, storage_data=dict.fromkeys(index, None), planner_data=dict.fromkeys(index, "x" * 500)
    )
    for protocol in (2, 4):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(plain, protocol))
        assert read_dcp_metadata(str(tmp_path)) == plain


# Special files.


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [".metadata", "ckpt_fast.json"])
def test_special_file_of_ours(tmp_path: Path, kind: str, name: str, at_once: None) -> None:
    save_ours(str(tmp_path))
    if name == "ckpt_fast.json":
        make_older(tmp_path)
    (tmp_path / name).unlink()
    make_special(tmp_path / name, kind)
    with pytest.raises(CheckpointCorruptError, match=rf"{name} is a {kind}, where"):
        CheckpointIndex(str(tmp_path))


@pytest.mark.parametrize("kind", SPECIAL)
def test_special_data_file(tmp_path: Path, kind: str, at_once: None) -> None:
    save_ours(str(tmp_path))
    path = data_file(tmp_path)
    path.unlink()
    make_special(path, kind)
    index = CheckpointIndex(str(tmp_path))
    expected = "Is a directory" if kind == "directory" else f"it is a {kind}, not a regular file"
    with pytest.raises(CheckpointCorruptError, match=expected):
        load_tensors(index, [TensorRequest("wide", torch.zeros_like(WIDE), (0, 0))])


@pytest.mark.parametrize(
    "content", [b"[" * 1_000_000, b'{"version": 1, "files": ' + b"[" * 100_000], ids=["whole", "files"]
)
def test_deep_sidecar(tmp_path: Path, content: bytes, at_once: None) -> None:
    (tmp_path / "ckpt_fast.json").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"ckpt_fast\.json cannot be parsed"):
        read_sidecar(str(tmp_path))


# Archives.


def archive_of(members: list[tuple[str, bytes]], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", compression) as archive:
        warnings.simplefilter("ignore")  # from names that occur twice
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def overlapping() -> bytes:
    """Return a directory whose entries are all the same long member under different names."""
    members = [(f"archive/data/{n}", b"x" * (1 << 20 if n == 0 else 1)) for n in range(200)]
    content = bytearray(archive_of(members))
    end = content.rindex(b"PK\x05\x06")
    at = int.from_bytes(content[end + 16 : end + 20], "little")
    first = content[at : at + 46]
    while content[at : at + 4] == b"PK\x01\x02":
        content[at + 16 : at + 28], content[at + 42 : at + 46] = first[16:28], first[42:46]
        at += 46 + content[at + 28]
    return bytes(content)


ARCHIVES = {
    "compressed": (
        lambda: archive_of([("archive/data.pkl", bytes(1 << 26))], zipfile.ZIP_DEFLATED),
        "compressed or encrypted",
    ),
    "twice": (lambda: archive_of([("archive/data.pkl", b"\x80\x02N.")] * 2), "two members of one name"),
    "overlapping": (overlapping, "longer together than the whole"),
    "more behind it": (lambda: archive_of([("archive/data.pkl", b"\x80\x02N.")]) + b"more", "not end as"),
}


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("name", ARCHIVES)
def test_archive_that_torch_never_makes(name: str, verify: bool, at_once: None) -> None:
    make, reason = ARCHIVES[name]
    with pytest.raises(CheckpointCorruptError, match=reason):
        decode_object(make(), "it", verify)


@pytest.mark.parametrize("before_zip", [False, True])
@pytest.mark.parametrize("name", ["memo", "key", "deep", "bytes"])
def test_object_that_grows_is_refused(name: str, before_zip: bool, at_once: None) -> None:
    bomb = b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R." if name == "bytes" else BOMBS[name]()
    payload = archive_of([("archive/data.pkl", bomb), ("archive/version", b"3\n")])
    if before_zip:
        buffer = io.BytesIO()
        torch.save(1, buffer, _use_new_zipfile_serialization=False)
        payload = buffer.getvalue()
        at = 0
        for _ in range(3):
            at += native.check_pickle(payload[at:], archive=True)
        payload = payload[:at] + bomb
    with pytest.raises(UnsafeCheckpointError, match=r"it holds more than .*opcode 0x"):
        decode_object(payload, "it", verify=True)


# --- keys whose hashes are equal, items that are not there ------------------------------------------------

# Multiples of it have the hash 0.
_MODULUS = (1 << 61) - 1


def number(value: int) -> bytes:
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return pickle.LONG1 + bytes([len(content)]) + content


def equal_hashes(kind: str) -> bytes:
    """Return a 400 kB pickle with as many keys with the same hash as fit."""
    key: Callable[[bytes], bytes] = {
        "integers": lambda each: each,
        "tuples": lambda each: each + pickle.TUPLE1,
        "sets": lambda each: each,
        "frozen sets": lambda each: pickle.MARK + each + pickle.FROZENSET,
        # Global 0 is MetadataIndex, text 1 "fqn", text 2 "offset".
        "indices": lambda each: b"h\x00)\x81}(h\x01h\x01h\x02" + each + b"\x85ub",
    }[kind]
    header = b"\x80\x04(ctorch.distributed.checkpoint.metadata\nMetadataIndex\nq\x00X\x03\0\0\0fqnq\x01"
    header += b"X\x06\0\0\0offsetq\x02"
    begin, value = (pickle.EMPTY_SET, b"") if kind == "sets" else (pickle.EMPTY_DICT, pickle.NONE)
    parts, nbytes = [], 0
    while nbytes < 400_000:
        parts.append(key(number((len(parts) + 1) * _MODULUS)) + value)
        nbytes += len(parts[-1])
    end = pickle.ADDITEMS if kind == "sets" else pickle.SETITEMS
    return header + begin + pickle.MARK + b"".join(parts) + end + pickle.TUPLE + pickle.STOP


@pytest.mark.parametrize("kind", ["integers", "tuples", "sets", "frozen sets", "indices"])
def test_keys_of_one_hash(tmp_path: Path, kind: str, at_once: None) -> None:
    (tmp_path / ".metadata").write_bytes(equal_hashes(kind))
    with pytest.raises(CheckpointCorruptError, match=r"keys that are no texts|have the same hash"):
        read_contents(str(tmp_path))


def test_other_keys_may_be_there(tmp_path: Path) -> None:
    keys = {**dict.fromkeys(range(500)), ("a", 1): 2, "b": {1.5, None}}
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, planner_data=keys)))
    assert read_contents(str(tmp_path)).metadata.planner_data == keys


def test_metadata_has_the_indices_of_torch(tmp_path: Path) -> None:
    save_stock(tmp_path, {"w": torch.ones(2), "n": 3})
    assert {type(index) for index in read_dcp_metadata(str(tmp_path)).storage_data} == {MetadataIndex}


def test_many_objects_that_are_not_there(tmp_path: Path, bounded: None) -> None:
    save_stock(tmp_path, {f"o{number}": number for number in range(1000)})
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    for place, info in enumerate(metadata.storage_data.values()):
        info.offset, info.length = place << 20, 1 << 20
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    index = CheckpointIndex(str(tmp_path))
    with pytest.raises(CheckpointCorruptError, match="but the file ends at"):
        load_objects(index, [f"o{number}" for number in range(1000)])


@pytest.mark.parametrize("larger", [64, 1 << 20, -2])
@pytest.mark.parametrize("shape", [(), (33,), (4, 8)])
def test_a_length_in_an_archive(tmp_path: Path, shape: tuple[int, ...], larger: int) -> None:
    """What an archive's directory says of its length decides over no memory but the tensor's own."""
    save_stock(tmp_path, {"w": torch.ones(shape, dtype=torch.int16), "z": torch.zeros(1 << 20)})
    (data,) = tmp_path.glob("*.distcp")
    content, nbytes = bytearray(data.read_bytes()), 2 * math.prod(shape)
    name = content.index(b"/data/0", content.index(b"PK\x01\x02"))  # in the first archive's directory
    entry = content.rindex(b"PK\x01\x02", 0, name)
    for field in (entry + 20, entry + 24):
        assert int.from_bytes(content[field : field + 4], "little") == nbytes
        content[field : field + 4] = (nbytes + larger).to_bytes(4, "little")
    data.write_bytes(content)
    around = torch.full((3, max(nbytes, 64) * 4), 7, dtype=torch.int16)
    target = around[1, : math.prod(shape)].view(shape)
    with contextlib.suppress(CheckpointError):
        load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("w", target, (0,) * len(shape))])
    assert (around[[0, 2]] == 7).all() and (around[1, math.prod(shape) :] == 7).all(), "wrote beside it"


def test_an_entry_that_is_neither_a_tensor_nor_an_object(tmp_path: Path) -> None:
    save_stock(tmp_path, {"w": torch.ones(3, 2), "step": 3})
    metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    metadata.state_dict_metadata["step"] = Metadata({})
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointCorruptError, match="step is described by a Metadata"):
        read_dcp_metadata(str(tmp_path))
