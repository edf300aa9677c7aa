# SPDX-License-Identifier: Apache-2.0
"""Memory with an address, and readable descriptions of requests."""

from __future__ import annotations

import ctypes
import random
import zlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckpt_fast import native


class Memory:
    """Bytes at an address, with guard bytes on both sides that must not change."""

    GUARD = b"\xa5" * 64

    def __init__(self, content: bytes, misalign: int = 0) -> None:
        self._before = len(self.GUARD) + misalign
        self._nbytes = len(content)
        whole = bytes(self._before) + content + self.GUARD
        self._storage = (ctypes.c_ubyte * len(whole)).from_buffer_copy(whole)
        ctypes.memmove(self._storage, self.GUARD, len(self.GUARD))
        self.address = ctypes.addressof(self._storage) + self._before

    def __len__(self) -> int:
        return self._nbytes

    def content(self) -> bytes:
        """Return the bytes; fails if a guard byte was overwritten."""
        whole = bytes(self._storage)
        assert whole.startswith(self.GUARD) and whole.endswith(self.GUARD), "wrote outside the memory"
        return whole[self._before : self._before + self._nbytes]


def noise(nbytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(nbytes)


PIECE = ("piece_file", "piece_offset", "piece_nbytes", "piece_address", "piece_digest")
PATCH = ("patch_file", "patch_offset", "patch_digest")
EXTENT = ("extent_file", "extent_offset", "extent_nbytes", "extent_address")
RANGE = ("range_file", "range_offset", "range_nbytes", "range_block")


def named(names: Sequence[str], columns: Iterable[Any]) -> dict[str, Any]:
    """Return columns by name."""
    return dict(zip(names, columns, strict=True))


def column(*values: int) -> array[int]:
    return array("q", values)


@dataclass
class WriteCase:
    """A request to ``write_files`` together with the files and CRCs it must produce."""

    directory: Path
    images: list[bytearray] = field(default_factory=list)
    pieces: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    patches: list[tuple[int, int, int]] = field(default_factory=list)
    streams: dict[int, bytes] = field(default_factory=dict)
    memory: list[Memory] = field(default_factory=list)

    def add_file(self) -> int:
        self.images.append(bytearray())
        return len(self.images) - 1

    def add_piece(self, content: bytes, digest: int = -1, gap: int = 0) -> None:
        """Append ``gap`` zeros and ``content`` to the last file."""
        image = self.images[-1]
        image += bytes(gap)
        self.memory.append(Memory(content, misalign=len(self.memory) % 7))
        row = (len(self.images) - 1, len(image), len(content), self.memory[-1].address, digest)
        self.pieces.append(row)
        image += content
        if digest >= 0:
            self.streams[digest] = self.streams.get(digest, b"") + content

    def add_patch(self, offset: int, digest: int) -> None:
        """Patch the last file, to which all pieces have been added."""
        crc = zlib.crc32(self.streams.get(digest, b""))
        self.images[-1][offset : offset + 4] = crc.to_bytes(4, "little")
        self.patches.append((len(self.images) - 1, offset, digest))

    def paths(self) -> list[str]:
        return [str(self.directory / f"file{i}") for i in range(len(self.images))]

    def write(
        self,
        threads: int = 2,
        chunk_bytes: int = 4096,
        direct: bool = False,
        fsync: bool = False,
        progress: native.Progress | None = None,
        block_bytes: int = 0,
    ) -> tuple[list[int], list[int], bytes]:
        pieces = [column(*values) for values in zip(*self.pieces, strict=True)] or [column()] * 5
        patches = [column(*values) for values in zip(*self.patches, strict=True)] or [column()] * 3
        return native.write_files(
            self.paths(),
            file_nbytes=column(*map(len, self.images)),
            **named(PIECE, pieces),
            **named(PATCH, patches),
            digest_count=self.digest_count(),
            threads=threads,
            chunk_bytes=chunk_bytes,
            direct=direct,
            fsync=fsync,
            progress=progress,
            block_bytes=block_bytes,
        )

    def digest_count(self) -> int:
        return max(self.streams, default=-1) + 1

    def expected(self, block_bytes: int = 0) -> tuple[list[int], list[int], bytes]:
        contents = [self.streams.get(digest, b"") for digest in range(self.digest_count())]
        blocks = array("I")
        for content in contents if block_bytes else []:
            blocks.extend(
                zlib.crc32(content[i : i + block_bytes]) for i in range(0, len(content), block_bytes)
            )
        return [zlib.crc32(each) for each in contents], [zlib.crc32(i) for i in self.images], blocks.tobytes()
