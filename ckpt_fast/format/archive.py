# SPDX-License-Identifier: Apache-2.0
"""Byte layout of an item: a ``torch.save`` archive around one contiguous tensor, written and read here only.

An item is a ZIP archive with stored (uncompressed) members ``archive/data.pkl``, ``archive/byteorder``,
``archive/version`` and, last, ``archive/data/0``: the raw bytes. What comes before the raw bytes (*head*) and
after them (*tail*) depends on dtype and shape alone, except for the raw bytes' CRC-32, which stands twice in
the tail: in the data descriptor and in the central directory. So the place of every byte is known before any
data has moved, and items may be written in any order by any thread.

docs/format.md draws the layout.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zlib
from collections import OrderedDict
from functools import lru_cache
from typing import Any, NamedTuple

import torch

ALIGNMENT = 64
PAGE = 4096

_UTF8 = 0x0800
_CRC_FOLLOWS = 0x0008
_DATE = 0x0021  # 1980-01-01, the earliest date ZIP can say: archives of equal content are equal
_ZIP64_LIMIT = 0xFFFFFFFF
_PADDING_ID = 0x4246
_ZIP64_ID = 0x0001

_LOCAL = struct.Struct("<IHHHHHIIIHH")
_CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
_END = struct.Struct("<IHHHHIIH")
_END64 = struct.Struct("<IQHHIIQQQQ")
_LOCATOR64 = struct.Struct("<IIQI")
_LOCAL_MAGIC, _CENTRAL_MAGIC, _DESCRIPTOR_MAGIC = 0x04034B50, 0x02014B50, 0x08074B50
_END_MAGIC, _END64_MAGIC, _LOCATOR64_MAGIC = 0x06054B50, 0x06064B50, 0x07064B50

_RAW_NAME = b"archive/data/0"
_BYTEORDER = b"little"

_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)


# The storage class that stands for a dtype in a torch.save pickle; newer dtypes have none.
TYPED_STORAGES = {
    torch.float64: "DoubleStorage",
    torch.float32: "FloatStorage",
    torch.float16: "HalfStorage",
    torch.bfloat16: "BFloat16Storage",
    torch.int64: "LongStorage",
    torch.int32: "IntStorage",
    torch.int16: "ShortStorage",
    torch.int8: "CharStorage",
    torch.uint8: "ByteStorage",
    torch.bool: "BoolStorage",
    torch.complex128: "ComplexDoubleStorage",
    torch.complex64: "ComplexFloatStorage",
}


class Archive(NamedTuple):
    """Everything of an item but the raw bytes.

    Attributes:
        head: bytes before the raw data; the length is a multiple of ``ALIGNMENT``.
        tail: bytes after the raw data, with zeros where the CRC-32 goes.
        crc_offsets: positions in ``tail`` of the 4-byte little-endian CRC-32 of the raw data.
    """

    head: bytes
    tail: bytes
    crc_offsets: tuple[int, int]


@lru_cache(maxsize=65536)
def tensor_archive(dtype: torch.dtype, shape: tuple[int, ...]) -> Archive:
    """Head and tail of the item for a contiguous CPU tensor of this dtype and shape.

    Raises:
        TypeError: ``torch.save`` could not store such a tensor as plain bytes (quantized dtypes).
    """
    numel = math.prod(shape)
    raw_nbytes = numel * dtype.itemsize
    members = [
        (b"archive/data.pkl", _pickle_of_tensor(dtype, shape, numel)),
        (b"archive/byteorder", _BYTEORDER),
        (b"archive/version", b"3\n"),
    ]
    head, directory = bytearray(), bytearray()
    for name, content in members:
        crc = zlib.crc32(content)
        directory += _central_entry(name, _UTF8, crc, len(content), len(head))
        head += _local_entry(name, content) + content
    raw_local_offset = len(head)
    head += _raw_local_entry(raw_nbytes, len(head))

    tail = bytearray(_descriptor(raw_nbytes))
    raw_entry = _central_entry(_RAW_NAME, _UTF8 | _CRC_FOLLOWS, 0, raw_nbytes, raw_local_offset)
    directory_offset = len(head) + raw_nbytes + len(tail)
    raw_entry_offset = len(tail) + len(directory)
    directory += raw_entry
    tail += directory
    tail += _end_of_archive(len(members) + 1, len(directory), directory_offset)
    return Archive(bytes(head), bytes(tail), (4, raw_entry_offset + 16))


def item_nbytes(archive: Archive, raw_nbytes: int) -> int:
    """Length of the whole item."""
    return len(archive.head) + raw_nbytes + len(archive.tail)


class RawMember(NamedTuple):
    """How a foreign archive stores its tensor's bytes.

    Attributes:
        local_offset: position of the member's local header in the archive.
        nbytes: length of the raw data.
        crc32: CRC-32 of the raw data.
        pickle_crc32: CRC-32 of ``data.pkl``, which says what the bytes mean.
        byteorder_crc32: CRC-32 of ``byteorder``, which says how each number is stored.
    """

    local_offset: int
    nbytes: int
    crc32: int
    pickle_crc32: int
    byteorder_crc32: int


def is_contiguous_tensor(member: RawMember, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether the raw data is one little-endian, row-major tensor of this dtype and shape, and nothing else.

    ``torch.save`` keeps strides, views and the machine's byte order; what the plain case has in the small
    members is known, so their checksums tell.
    """
    numel = math.prod(shape)
    if member.byteorder_crc32 != zlib.crc32(_BYTEORDER) or member.nbytes != numel * dtype.itemsize:
        return False
    try:
        content = _pickle_of_tensor(dtype, shape, numel)
    except TypeError:
        return False
    return zlib.crc32(content) == member.pickle_crc32


def find_raw_member(tail: bytes, tail_offset: int) -> RawMember | None:
    """Read the central directory at the end of an archive.

    Args:
        tail: the last bytes of the archive.
        tail_offset: position of ``tail`` in the archive.

    Returns:
        The only ``data/`` member, or None when the archive is anything but one tensor in stored members whose
        directory lies within ``tail``.
    """
    end = tail.rfind(struct.pack("<I", _END_MAGIC))
    if end < 0 or end + _END.size > len(tail):
        return None
    _, _, _, _, count, directory_nbytes, directory_offset, _ = _END.unpack_from(tail, end)
    if directory_offset == _ZIP64_LIMIT or count == 0xFFFF:
        located = _read_end64(tail, tail_offset, end)
        if located is None:
            return None
        count, directory_nbytes, directory_offset = located
    start = directory_offset - tail_offset
    if start < 0 or start + directory_nbytes > len(tail):
        return None
    member = _scan_directory(tail, start, count)
    if member is None or member.local_offset + member.nbytes > directory_offset:
        return None
    return member


def local_header_nbytes(header: bytes) -> int | None:
    """Length of a local header with name and extra field, from its first 30 bytes; None if it is none."""
    if len(header) < _LOCAL.size:
        return None
    fields = _LOCAL.unpack_from(header)
    if fields[0] != _LOCAL_MAGIC:
        return None
    return int(_LOCAL.size + fields[9] + fields[10])


LOCAL_HEADER_NBYTES = _LOCAL.size


def _scan_directory(tail: bytes, position: int, count: int) -> RawMember | None:
    found: RawMember | None = None
    pickle_crc32 = byteorder_crc32 = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(tail):
            return None
        entry = _CENTRAL.unpack_from(tail, position)
        magic, method, crc, nbytes = entry[0], entry[4], entry[7], entry[9]
        name_nbytes, extra_nbytes, comment_nbytes, local_offset = entry[10], entry[11], entry[12], entry[16]
        if magic != _CENTRAL_MAGIC:
            return None
        name = tail[position + _CENTRAL.size :][:name_nbytes]
        extra = tail[position + _CENTRAL.size + name_nbytes :][:extra_nbytes]
        position += _CENTRAL.size + name_nbytes + extra_nbytes + comment_nbytes
        if name.endswith(b"/data.pkl"):
            pickle_crc32 = crc
        if name.endswith(b"/byteorder"):
            byteorder_crc32 = crc
        if b"/data/" not in name:
            continue
        if found is not None or method != 0:
            return None
        widened = _widen(extra, entry[8], nbytes, local_offset)
        if widened is None:
            return None
        found = RawMember(*widened, crc, 0, 0)
    if found is None:
        return None
    return found._replace(pickle_crc32=pickle_crc32, byteorder_crc32=byteorder_crc32)


def _widen(extra: bytes, compressed: int, nbytes: int, local_offset: int) -> tuple[int, int] | None:
    """(local offset, nbytes), where a 32-bit field that overflowed is replaced by the ZIP64 extra field's.

    None when the field that must be there is not.
    """
    fields = [nbytes, compressed, local_offset]
    overflowed = [number for number, field in enumerate(fields) if field == _ZIP64_LIMIT]
    position = 0
    while overflowed and position + 4 <= len(extra):
        identifier, length = struct.unpack_from("<HH", extra, position)
        position += 4
        if identifier == _ZIP64_ID:
            # The field has the overflowed values only, in the order of ``fields``.
            if 8 * len(overflowed) > min(length, len(extra) - position):
                return None
            values = struct.unpack_from(f"<{len(overflowed)}Q", extra, position)
            for number, value in zip(overflowed, values, strict=True):
                fields[number] = value
            overflowed = []
        position += length
    return None if overflowed else (fields[2], fields[0])


def _read_end64(tail: bytes, tail_offset: int, end: int) -> tuple[int, int, int] | None:
    locator = end - _LOCATOR64.size
    if locator < 0:
        return None
    magic, _, end64_offset, _ = _LOCATOR64.unpack_from(tail, locator)
    position = end64_offset - tail_offset
    if magic != _LOCATOR64_MAGIC or position < 0 or position + _END64.size > len(tail):
        return None
    fields = _END64.unpack_from(tail, position)
    if fields[0] != _END64_MAGIC:
        return None
    return fields[7], fields[8], fields[9]


def _local_entry(name: bytes, content: bytes) -> bytes:
    nbytes = len(content)
    fixed = (_LOCAL_MAGIC, 20, _UTF8, 0, 0, _DATE, zlib.crc32(content), nbytes, nbytes, len(name), 0)
    return _LOCAL.pack(*fixed) + name


def _raw_local_entry(raw_nbytes: int, position: int) -> bytes:
    """Local header of the raw member at ``position``, padded so that the data behind it is aligned."""
    extra = b""
    size_field = 0
    if raw_nbytes >= _ZIP64_LIMIT:
        # Sizes of zero in a ZIP64 field: the descriptor behind the data has the real ones, 8 bytes each.
        extra = struct.pack("<HHQQ", _ZIP64_ID, 16, 0, 0)
        size_field = _ZIP64_LIMIT
    padding = -(position + _LOCAL.size + len(_RAW_NAME) + len(extra)) % ALIGNMENT
    if padding:
        padding += ALIGNMENT if padding < 4 else 0
        extra += struct.pack("<HH", _PADDING_ID, padding - 4) + bytes(padding - 4)
    version = 45 if size_field else 20
    fixed = _LOCAL.pack(
        _LOCAL_MAGIC,
        version,
        _UTF8 | _CRC_FOLLOWS,
        0,
        0,
        _DATE,
        0,
        size_field,
        size_field,
        len(_RAW_NAME),
        len(extra),
    )
    return fixed + _RAW_NAME + extra


def _descriptor(raw_nbytes: int) -> bytes:
    form = "<IIQQ" if raw_nbytes >= _ZIP64_LIMIT else "<IIII"
    return struct.pack(form, _DESCRIPTOR_MAGIC, 0, raw_nbytes, raw_nbytes)


def _central_entry(name: bytes, flags: int, crc: int, nbytes: int, local_offset: int) -> bytes:
    extra, size_field, version = b"", nbytes, 20
    if nbytes >= _ZIP64_LIMIT:
        extra, size_field, version = struct.pack("<HHQQ", _ZIP64_ID, 16, nbytes, nbytes), _ZIP64_LIMIT, 45
    fixed = _CENTRAL.pack(
        _CENTRAL_MAGIC,
        version,
        version,
        flags,
        0,
        0,
        _DATE,
        crc,
        size_field,
        size_field,
        len(name),
        len(extra),
        0,
        0,
        0,
        0,
        local_offset,
    )
    return fixed + name + extra


def _end_of_archive(count: int, directory_nbytes: int, directory_offset: int) -> bytes:
    if directory_offset < _ZIP64_LIMIT:
        return _END.pack(_END_MAGIC, 0, 0, count, count, directory_nbytes, directory_offset, 0)
    end64 = _END64.pack(
        _END64_MAGIC, _END64.size - 12, 45, 45, 0, 0, count, count, directory_nbytes, directory_offset
    )
    locator = _LOCATOR64.pack(_LOCATOR64_MAGIC, 0, directory_offset + directory_nbytes, 1)
    end = _END.pack(_END_MAGIC, 0, 0, count, count, directory_nbytes, _ZIP64_LIMIT, 0)
    return end64 + locator + end


class _StorageReference:
    """Stands for the tensor's storage while pickling; becomes a persistent id."""


class _Rebuild:
    """Pickles as a call of the function that ``torch.load`` rebuilds a tensor with."""

    def __init__(self, function: Any, arguments: tuple[Any, ...]) -> None:
        self._call = (function, arguments)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self._call


class _TensorPickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, storage_id: tuple[Any, ...]) -> None:
        super().__init__(file, protocol=2)
        self._storage_id = storage_id

    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        return self._storage_id if isinstance(obj, _StorageReference) else None


def _pickle_of_tensor(dtype: torch.dtype, shape: tuple[int, ...], numel: int) -> bytes:
    stride, step = [0] * len(shape), 1
    for dimension in reversed(range(len(shape))):
        stride[dimension] = step
        step *= max(shape[dimension], 1)
    common: tuple[Any, ...] = (_StorageReference(), 0, shape, tuple(stride), False, OrderedDict())
    storage_name = TYPED_STORAGES.get(dtype)
    if storage_name is not None:
        storage_id = ("storage", getattr(torch, storage_name), "0", "cpu", numel)
        call = _Rebuild(torch._utils._rebuild_tensor_v2, common)
    elif dtype.is_floating_point or dtype in _UNSIGNED:
        storage_id = ("storage", torch.UntypedStorage, "0", "cpu", numel * dtype.itemsize)
        call = _Rebuild(torch._utils._rebuild_tensor_v3, (*common, dtype))
    else:
        raise TypeError(f"a tensor of {dtype} cannot be stored as plain bytes")
    buffer = io.BytesIO()
    _TensorPickler(buffer, storage_id).dump(call)
    return buffer.getvalue()
