# SPDX-License-Identifier: Apache-2.0
"""Items are torch.save archives: readable by torch and zipfile, and predictable to the byte."""

from __future__ import annotations

import io
import mmap
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from ckpt_fast.format import archive
from tests.pipeline.layouts import PLAIN_DTYPES, random_tensor, raw_bytes, same, shapes

SHAPES = [(), (0,), (1,), (7,), (3, 0, 2), (1, 1), (5, 3), (2, 1, 3), (4, 4, 4, 4), (129, 33)]
FIVE_GIB = (5 << 30) + 12


def build(tensor: torch.Tensor) -> bytes:
    """Return the item of a tensor, assembled as a writer that follows the plan does."""
    head, tail, crc_offsets = archive.tensor_archive(tensor.dtype, tuple(tensor.shape))
    raw = raw_bytes(tensor)
    patched = bytearray(tail)
    for offset in crc_offsets:
        assert patched[offset : offset + 4] == bytes(4)
        struct.pack_into("<I", patched, offset, zlib.crc32(raw))
    return head + raw + bytes(patched)


def stock(tensor: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def find(item: bytes, tail_nbytes: int = 1024) -> archive.RawMember | None:
    tail = item[-tail_nbytes:]
    return archive.find_raw_member(tail, len(item) - len(tail))


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_and_zipfile_read_every_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(shape, dtype)
    item = build(tensor)
    for weights_only in (True, False):
        loaded = torch.load(io.BytesIO(item), weights_only=weights_only)
        assert same(loaded, tensor) and loaded.stride() == tensor.stride()
    with zipfile.ZipFile(io.BytesIO(item)) as opened:
        assert opened.testzip() is None
        assert opened.read("archive/data/0") == raw_bytes(tensor)


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pickle_is_the_one_torch_writes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = random_tensor(shape, dtype)
    ours, theirs = (zipfile.ZipFile(io.BytesIO(item)) for item in (build(tensor), stock(tensor)))
    for name in ("archive/data.pkl", "archive/byteorder", "archive/version"):
        assert ours.read(name) == theirs.read(name)


@given(shapes, st.sampled_from(PLAIN_DTYPES))
@example((), torch.float64)
def test_layout_is_computable(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = random_tensor(shape, dtype)
    made = archive.tensor_archive(dtype, shape)
    item = build(tensor)
    assert len(made.head) % archive.ALIGNMENT == 0
    assert len(item) == archive.item_nbytes(made, tensor.numel() * dtype.itemsize)
    member = find(item)
    assert member is not None
    header_nbytes = archive.local_header_nbytes(item[member.local_offset :][: archive.LOCAL_HEADER_NBYTES])
    assert header_nbytes is not None
    assert member.local_offset + header_nbytes == len(made.head)
    assert (member.nbytes, member.crc32) == (len(raw_bytes(tensor)), zlib.crc32(raw_bytes(tensor)))
    assert archive.is_contiguous_tensor(member, dtype, shape)


@given(shapes, st.sampled_from(PLAIN_DTYPES))
def test_raw_member_of_stock_archives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = random_tensor(shape, dtype)
    item = stock(tensor)
    member = find(item)
    assert member is not None and archive.is_contiguous_tensor(member, dtype, shape)
    header = item[member.local_offset :][: archive.LOCAL_HEADER_NBYTES]
    start = member.local_offset + (archive.local_header_nbytes(header) or 0)
    assert item[start : start + member.nbytes] == raw_bytes(tensor)
    assert member.crc32 == zlib.crc32(raw_bytes(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12.0)[2:8],
        torch.arange(12.0)[::2],
        torch.zeros(1).expand(4),
        torch.zeros(3, requires_grad=True),
        torch.zeros(3, dtype=torch.complex64).conj(),
    ],
    ids=["transposed", "part", "strided", "expanded", "requires_grad", "conj"],
)
def test_tensors_that_are_more_than_their_bytes_are_told_apart(tensor: torch.Tensor) -> None:
    member = find(stock(tensor))
    assert member is not None
    assert not archive.is_contiguous_tensor(member, tensor.dtype, tuple(tensor.shape))


def test_another_shape_or_dtype_is_told_apart() -> None:
    member = find(stock(torch.zeros(4, 3)))
    assert member is not None
    assert archive.is_contiguous_tensor(member, torch.float32, (4, 3))
    assert not archive.is_contiguous_tensor(member, torch.float32, (3, 4))
    assert not archive.is_contiguous_tensor(member, torch.int32, (4, 3))
    assert not archive.is_contiguous_tensor(member, torch.complex32, (4, 3))


@pytest.mark.parametrize("value", [[torch.zeros(2), torch.zeros(3)], {"a": 1}, "text"], ids=repr)
def test_archives_of_anything_else_are_not_one_tensor(value: object) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    member = find(buffer.getvalue())
    assert member is None or not archive.is_contiguous_tensor(member, torch.float32, (2,))


def test_compressed_member_is_not_raw() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("archive/data.pkl", b"x")
        opened.writestr("archive/data/0", bytes(1000))
    assert find(buffer.getvalue()) is None


@pytest.mark.parametrize("dtype", [torch.complex32, torch.quint8, torch.qint32, torch.bits8], ids=str)
def test_dtypes_that_are_not_plain_bytes(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=f"a tensor of {dtype} cannot be stored as plain bytes"):
        archive.tensor_archive(dtype, (2,))


@given(st.binary(max_size=400), st.integers(0, 1 << 40))
def test_junk_is_not_an_archive(junk: bytes, offset: int) -> None:
    assert archive.find_raw_member(junk, offset) is None
    assert archive.local_header_nbytes(junk) is None


@pytest.mark.parametrize("kind", ["stock", "zip64"])
def test_damaged_directories_never_raise(kind: str) -> None:
    if kind == "stock":
        item, base = stock(torch.arange(5, dtype=torch.int32)), 0
    else:
        head, item, _ = archive.tensor_archive(torch.uint8, (FIVE_GIB,))
        base = len(head) + FIVE_GIB
    for position, before in enumerate(item):
        for byte in (0, 1, 8, 0x7F, 0xFF, before ^ 1, before ^ 0x80):
            damaged = item[:position] + bytes([byte]) + item[position + 1 :]
            for found in (
                archive.find_raw_member(damaged, base),
                archive.find_raw_member(damaged[:position], base),
            ):
                assert found is None or found.local_offset + found.nbytes <= base + len(item)


@pytest.fixture(scope="module")
def sparse_five_gib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the item of a 5 GiB tensor of zeros (except at its ends), in a sparse file."""
    head, tail, crc_offsets = archive.tensor_archive(torch.uint8, (FIVE_GIB,))
    path = tmp_path_factory.mktemp("large") / "item"
    with path.open("wb") as file:
        file.write(head + b"first")
        file.seek(len(head) + FIVE_GIB - 4)
        file.write(b"last" + tail)
    assert path.stat().st_blocks * 512 < 1 << 20, "the file system makes no holes"
    assert all(tail[offset : offset + 4] == bytes(4) for offset in crc_offsets)
    return path


def test_zip64_archive_is_read_by_zipfile(sparse_five_gib: Path) -> None:
    with zipfile.ZipFile(sparse_five_gib) as opened:
        infos = {info.filename: info for info in opened.infolist()}
        assert infos["archive/data/0"].file_size == FIVE_GIB
        assert infos["archive/data/0"].compress_size == FIVE_GIB
        with opened.open("archive/data/0") as member:
            assert member.read(8) == b"first" + bytes(3)


def test_zip64_archive_is_read_by_torch(sparse_five_gib: Path) -> None:
    tensor = torch.load(sparse_five_gib, weights_only=True, mmap=True)
    assert tensor.shape == (FIVE_GIB,)
    assert bytes(tensor[:5].tolist()) == b"first" and bytes(tensor[-4:].tolist()) == b"last"


def test_zip64_raw_member_is_found(sparse_five_gib: Path) -> None:
    nbytes = sparse_five_gib.stat().st_size
    with sparse_five_gib.open("rb") as file:
        file.seek(nbytes - 1024)
        member = archive.find_raw_member(file.read(), nbytes - 1024)
        assert member is not None and member.nbytes == FIVE_GIB
        file.seek(member.local_offset)
        header_nbytes = archive.local_header_nbytes(file.read(archive.LOCAL_HEADER_NBYTES))
        file.seek(member.local_offset + (header_nbytes or 0))
        assert file.read(5) == b"first"


@pytest.mark.parametrize("numel", [(1 << 32) - 2, (1 << 32) - 1, 1 << 32], ids=hex)
def test_around_the_zip64_limit(tmp_path: Path, numel: int) -> None:
    head, tail, _ = archive.tensor_archive(torch.uint8, (numel,))
    path = tmp_path / "item"
    with path.open("wb") as file:
        file.write(head)
        file.seek(len(head) + numel)
        file.write(tail)
    with zipfile.ZipFile(path) as opened:
        assert opened.getinfo("archive/data/0").file_size == numel
    assert torch.load(path, weights_only=True, mmap=True).numel() == numel
    member = archive.find_raw_member(tail, len(head) + numel)
    assert member is not None and member.nbytes == numel


def test_raw_data_can_be_mapped(tmp_path: Path) -> None:
    tensor = random_tensor((4096,), torch.float32)
    path = tmp_path / "item"
    path.write_bytes(build(tensor))
    head = archive.tensor_archive(torch.float32, (4096,)).head
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert mapped[len(head) : len(head) + 4096 * 4] == raw_bytes(tensor)
    assert os.path.getsize(path) == len(build(tensor))
