# SPDX-License-Identifier: Apache-2.0
"""What a rank tells the coordinator once it has written: a binary record. And those of all ranks, joined.

Items are in it unless the coordinator knows them already: their digest then stands for them.
"""

from __future__ import annotations

import hashlib
import json
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ckpt_fast.format.columns.items import Items, encode_items, join_items
from ckpt_fast.format.columns.lists import Ints
from ckpt_fast.format.types import FileRecord, RankRecord

_MAGIC = b"CFRR"
_VERSION = 1
_IS_KNOWN = 1
# Magic number, version, flags, program; bytes of the items, objects, bytes of the checksums, of the files.
_HEAD = struct.Struct("<4sHH32s4Q")


@dataclass(frozen=True)
class WorldRecord:
    """What all ranks have written.

    Attributes:
        programs: of each rank, the save program; "" where there was none.
        items: None if some rank has left out its own.
        object_nbytes: int64: the length of each object, in the order of ranks and items.
        crcs: the checksums of all payloads, as in ``BlockDigests``.
        files: every file.
        beside: files that lie beside the checkpoint.
    """

    programs: list[str]
    items: Items | None
    object_nbytes: Ints
    crcs: bytes
    files: list[FileRecord]
    beside: list[FileRecord]


def encode_record(record: RankRecord) -> bytes:
    """A rank's record as it travels."""
    items = b"" if record.is_known else encode_items(record.items, record.digests)
    nbytes = array("q", record.object_nbytes)
    crcs = b"".join(digests.crcs for digests in record.digests)
    files = json.dumps([record.files, record.beside], separators=(",", ":")).encode()
    flags = _IS_KNOWN if record.is_known else 0
    head = _HEAD.pack(
        _MAGIC, _VERSION, flags, record.program.encode(), len(items), len(nbytes), len(crcs), len(files)
    )
    return b"".join([head, items, nbytes.tobytes(), crcs, files])


def join_records(records: Sequence[bytes]) -> WorldRecord:
    """The records of all ranks as one.

    Args:
        records: of each rank in rank order, as ``encode_record`` makes them.

    Raises:
        ValueError: a rank runs another version of ckpt_fast.
    """
    programs, items, nbytes, crcs = [], [], [], []
    files: list[FileRecord] = []
    beside: list[FileRecord] = []
    is_known = False
    for rank, record in enumerate(records):
        magic, version, flags, program, item_nbytes, objects, crc_nbytes, _ = _HEAD.unpack_from(record)
        if magic != _MAGIC or version != _VERSION:
            raise ValueError(
                f"rank {rank} of the group sent a record of version {version} instead of {_VERSION}: all "
                "ranks need the same version of ckpt_fast"
            )
        view, at = memoryview(record), _HEAD.size
        end = at + item_nbytes
        is_known = is_known or bool(flags & _IS_KNOWN)
        programs.append(program.rstrip(b"\0").decode())
        items.append(record[at:end])
        nbytes.append(view[end : end + 8 * objects])
        end += 8 * objects
        crcs.append(view[end : end + crc_nbytes])
        own, others = json.loads(record[end + crc_nbytes :])
        files += [FileRecord(*file) for file in own]
        beside += [FileRecord(*file) for file in others]
    object_nbytes = np.frombuffer(b"".join(nbytes), np.int64)
    joined = None if is_known else join_items(items).with_object_nbytes(object_nbytes)
    return WorldRecord(programs, joined, object_nbytes, b"".join(crcs), files, beside)


def token_of(encoded_items: bytes) -> str:
    """Names what ``encode_items`` has made, wherever and whenever it did."""
    return hashlib.blake2b(encoded_items, digest_size=16).hexdigest()
