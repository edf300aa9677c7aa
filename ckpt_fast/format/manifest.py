# SPDX-License-Identifier: Apache-2.0
"""The manifest: the record in ``.metadata`` that ties every byte of a checkpoint to its save.

It follows the pickle. Readers that do not know it stop there. docs/format.md draws the layout.
"""

from __future__ import annotations

import json
import secrets
import struct
import zlib
from array import array
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ckpt_fast.format.table import Table, decode_table, is_bound_to
from ckpt_fast.format.types import BlockDigests, FileRecord

# Each so many bytes of an item's payload have a CRC-32 of their own.
BLOCK_NBYTES = 256 << 10

_VERSION = 1
_MAGIC = b"CKPTFAST"
# Lengths of the manifest and of the pickle, version; then the CRC-32 of all before it, and the magic number.
_LENGTHS = struct.Struct("<QQI")
_END = struct.Struct("<I8s")
FOOTER_NBYTES = _LENGTHS.size + _END.size
_U32 = struct.Struct("<I")


def new_save_id() -> str:
    """The random id of one save."""
    return secrets.token_hex(16)


class Head(NamedTuple):
    """What a manifest says of its save besides the files.

    Attributes:
        save_id: of the save.
        notes: what else the writer had to say.
    """

    save_id: str
    notes: dict[str, Any]


class Payload(NamedTuple):
    """Checked bytes of a file.

    Attributes:
        nbytes: how many.
        crcs: the CRC-32 of every block of ``Manifest.block_nbytes`` of them; the last may be shorter.
    """

    nbytes: int
    crcs: memoryview


class Manifest:
    """The record that one save keeps of its bytes.

    Attributes:
        save_id: of the save.
        block_nbytes: length of the blocks.
        files: every file of the checkpoint but ``.metadata``, by its name in it.
        beside: files that belong to the checkpoint and lie elsewhere (states of data loaders), by the end of
            their path.
        notes: what else the writer had to say.
        encoded_table: the table of the payloads, as ``table.bound_to`` makes it; empty if there is none.
    """

    def __init__(
        self,
        save_id: str,
        files: Iterable[FileRecord],
        digests: Iterable[BlockDigests] = (),
        *,
        beside: Iterable[FileRecord] = (),
        notes: Mapping[str, Any] | None = None,
        block_nbytes: int = BLOCK_NBYTES,
        encoded_table: bytes = b"",
    ) -> None:
        self.save_id = save_id
        self.block_nbytes = block_nbytes
        self.files = {file.path: file for file in files}
        self.beside = {file.path: file for file in beside}
        self.notes = dict(notes or {})
        self.encoded_table = encoded_table
        self._digests = list(digests)

    def payload(self, path: str, offset: int) -> Payload | None:
        """The checksums of the payload that starts at ``offset`` of a data file; None if there are none."""
        row = self._row_at.get((path, offset))
        if row is None:
            return None
        first, end = self.first_blocks[row : row + 2]
        return Payload(self.payloads.nbytes[row], self.crcs[first:end])

    @cached_property
    def table(self) -> Table | None:
        """The table of the payloads; None if there is none, or of a later version.

        Raises:
            ValueError, struct.error: it is not as it was written.
        """
        return decode_table(self.encoded_table) if self.encoded_table else None

    @cached_property
    def payloads(self) -> BlockDigests:
        """All payloads, in the order of the manifest."""
        paths = sorted({path for part in self._digests for path in part.paths})
        if len(self._digests) == 1 and paths == self._digests[0].paths:
            return self._digests[0]
        number = {path: i for i, path in enumerate(paths)}
        file, offset, nbytes = array("I"), array("q"), array("q")
        for part in self._digests:
            numbers = [number[path] for path in part.paths]
            file.extend(map(numbers.__getitem__, part.file))
            offset.extend(part.offset)
            nbytes.extend(part.nbytes)
        return BlockDigests(paths, file, offset, nbytes, b"".join(part.crcs for part in self._digests))

    @cached_property
    def crcs(self) -> memoryview:
        """The CRC-32 of every block of every payload."""
        return memoryview(self.payloads.crcs).cast("I")

    @cached_property
    def first_blocks(self) -> array[int]:
        """For each payload, which of ``crcs`` is that of its first block; then their number."""
        counts = -(-np.frombuffer(self.payloads.nbytes, np.int64) // self.block_nbytes)
        first = array("q", [0])
        first.frombytes(np.cumsum(counts).tobytes())
        if first[-1] != len(self.crcs):
            raise ValueError(f"{len(self.crcs)} blocks have checksums, but there are {first[-1]}")
        return first

    @cached_property
    def _row_at(self) -> dict[tuple[str, int], int]:
        paths, file, offset, _, _ = self.payloads
        return {
            (paths[number], begin): row for row, (number, begin) in enumerate(zip(file, offset, strict=True))
        }

    def without(self, paths: set[str]) -> Manifest:
        """The manifest of a checkpoint that has lost these files, with a new id: it is not what was saved."""
        kept = []
        for part in self._digests:
            digests = BlockDigests(part.paths, array("I"), array("q"), array("q"), b"")
            crcs, at = [], 0
            for file, offset, nbytes in zip(part.file, part.offset, part.nbytes, strict=True):
                end = at + 4 * -(-nbytes // self.block_nbytes)
                if part.paths[file] not in paths:
                    digests.file.append(file)
                    digests.offset.append(offset)
                    digests.nbytes.append(nbytes)
                    crcs.append(part.crcs[at:end])
                at = end
            kept.append(digests._replace(crcs=b"".join(crcs)))
        return Manifest(
            new_save_id(),
            (file for file in self.files.values() if file.path not in paths),
            kept,
            beside=self.beside.values(),
            notes=self.notes,
            block_nbytes=self.block_nbytes,
        )

    def encode(self) -> bytes:
        """The manifest without the table, and without what frames it in ``.metadata``."""
        paths, file, offset, nbytes, crcs = self.payloads
        head = json.dumps(
            {
                "save_id": self.save_id,
                "block_nbytes": self.block_nbytes,
                "files": _encode_files(self.files),
                "beside": _encode_files(self.beside),
                "notes": self.notes,
                "data_files": paths,
            },
            separators=(",", ":"),
        ).encode()
        counts = _U32.pack(len(head)) + _U32.pack(len(file)) + _U32.pack(len(crcs) // 4)
        columns = [column.tobytes() for column in (file, offset, nbytes)]
        return b"".join([counts, head, *columns, crcs])


def append_manifest(pickled: bytes, manifest: Manifest) -> bytes:
    """The content of ``.metadata``: the pickle, the manifest, and the table if it is that of the pickle."""
    body = manifest.encode()
    if is_bound_to(manifest.encoded_table, pickled):
        body += manifest.encoded_table
    parts, crc = [pickled, body, _LENGTHS.pack(len(body), len(pickled), _VERSION)], 0
    for part in parts:
        crc = zlib.crc32(part, crc)
    return b"".join([*parts, _END.pack(crc, _MAGIC)])


def without_pickle(content: bytes) -> bytes:
    """All of a ``.metadata`` that a reader of the table needs; empty if it has no table.

    It ends as the file does.

    Raises:
        ValueError: the file is not as it was written.
    """
    pickled, manifest = split_manifest(content)
    return content[len(pickled) :] if manifest is not None and manifest.encoded_table else b""


def manifest_in(rest: bytes) -> Manifest:
    """The manifest in what ``without_pickle`` has left."""
    return _decode(memoryview(rest)[:-FOOTER_NBYTES])


def mark_of(rest: bytes) -> tuple[int, int]:
    """CRC-32 and length of the file that ``without_pickle`` was given."""
    _, pickle_nbytes, _ = _LENGTHS.unpack_from(rest, len(rest) - FOOTER_NBYTES)
    before, _ = _END.unpack_from(rest, len(rest) - _END.size)
    return zlib.crc32(memoryview(rest)[-_END.size :], before), len(rest) + int(pickle_nbytes)


def has_manifest(content: bytes) -> bool:
    """Whether a ``.metadata`` file ends as one with a manifest does."""
    return content.endswith(_MAGIC)


def split_manifest(content: bytes) -> tuple[bytes, Manifest | None]:
    """The pickle of a ``.metadata`` file, and the manifest if it has one.

    A manifest of a later version is as good as none.

    Raises:
        ValueError: the file is not as it was written.
    """
    footer = FOOTER_NBYTES
    if len(content) < footer or not has_manifest(content):
        return content, None
    crc, _ = _END.unpack_from(content, len(content) - _END.size)
    found = zlib.crc32(memoryview(content)[: -_END.size])
    if found != crc:
        raise ValueError(f"its CRC-32 is {found:08x} instead of {crc:08x}")
    body_nbytes, pickle_nbytes, version = _LENGTHS.unpack_from(content, len(content) - footer)
    if body_nbytes + pickle_nbytes + footer != len(content):
        raise ValueError(f"its parts have {body_nbytes} and {pickle_nbytes} bytes, the file {len(content)}")
    pickled = content[:pickle_nbytes]
    if version > _VERSION:
        return pickled, None
    try:
        return pickled, _decode(memoryview(content)[pickle_nbytes : pickle_nbytes + body_nbytes])
    except (KeyError, TypeError, AttributeError, struct.error, RecursionError) as error:
        raise ValueError(f"its manifest makes no sense ({type(error).__name__}: {error})") from error


def head_of(read: Callable[[int, int], bytes], nbytes: int) -> Head | None:
    """The head of the manifest of a ``.metadata`` file, from a few of its bytes; nothing is verified.

    Args:
        read: gives the bytes of the file from an offset on, a number of them.
        nbytes: length of the file.

    Returns:
        None without a manifest, or if it makes no sense.
    """
    if nbytes < FOOTER_NBYTES:
        return None
    footer = read(nbytes - FOOTER_NBYTES, FOOTER_NBYTES)
    if len(footer) < FOOTER_NBYTES or not has_manifest(footer):
        return None
    body_nbytes, pickle_nbytes, version = _LENGTHS.unpack_from(footer)
    if version > _VERSION or body_nbytes + pickle_nbytes + FOOTER_NBYTES != nbytes or body_nbytes < 12:
        return None
    try:
        (head_nbytes,) = _U32.unpack(read(pickle_nbytes, _U32.size))
        head = json.loads(read(pickle_nbytes + 12, min(head_nbytes, body_nbytes - 12)))
        return Head(str(head["save_id"]), dict(head["notes"]))
    except (ValueError, KeyError, TypeError, struct.error, RecursionError):
        return None


def _decode(body: memoryview) -> Manifest:
    head_nbytes, count, crc_count = (_U32.unpack_from(body, 4 * i)[0] for i in range(3))
    at = 12 + head_nbytes
    columns = [array("I"), array("q"), array("q"), array("I")]
    for column, length in zip(columns, (count, count, count, crc_count), strict=True):
        end = at + length * column.itemsize
        if end > len(body):
            raise ValueError("its manifest is cut short")
        column.frombytes(body[at:end])
        at = end
    head = json.loads(bytes(body[12 : 12 + head_nbytes]))
    paths, block_nbytes = list(map(str, head["data_files"])), int(head["block_nbytes"])
    if (
        block_nbytes < 1
        or (len(columns[0]) and np.frombuffer(columns[0], np.uint32).max() >= len(paths))
        or any(len(column) and np.frombuffer(column, np.int64).min() < 0 for column in columns[1:3])
    ):
        raise ValueError("its manifest makes no sense")
    file, offset, nbytes, crcs = columns
    return Manifest(
        str(head["save_id"]),
        _decode_files(head["files"]),
        [BlockDigests(paths, file, offset, nbytes, crcs.tobytes())],
        beside=_decode_files(head["beside"]),
        notes=head["notes"],
        block_nbytes=block_nbytes,
        encoded_table=bytes(body[at:]),
    )


def _encode_files(files: Mapping[str, FileRecord]) -> dict[str, list[Any]]:
    return {name: [file.nbytes, f"{file.crc32:08x}"] for name, file in sorted(files.items())}


def _decode_files(entries: Mapping[str, Any]) -> list[FileRecord]:
    return [FileRecord(name, int(nbytes), int(crc, 16)) for name, (nbytes, crc) in entries.items()]


def file_record(path: str, content: bytes) -> FileRecord:
    """The manifest's entry for a file with this content."""
    return FileRecord(path, len(content), zlib.crc32(content))
