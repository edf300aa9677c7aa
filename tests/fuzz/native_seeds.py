# SPDX-License-Identifier: Apache-2.0
"""Seeds for the fuzz targets in ``tests/cpp/fuzz``: ``python -m tests.fuzz.native_seeds DIRECTORY``.

They are what readers of real checkpoints give the engine: ``pickle`` the pickles, ``read`` the tables.
"""

from __future__ import annotations

import collections
import pickle
import struct
import sys
import tempfile
import warnings
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast import native
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from tests.fuzz.checkpoints import KINDS, state_of

# Rows of tests/cpp/fuzz/read_target.cc: kind, file, offset, length; of a range also the length of its blocks.
_EXTENT, _RANGE = struct.Struct("<BBii"), struct.Struct("<BBiii")
_LARGEST_FILE, _LARGEST_NBYTES = 3, 65_553
_DIRECT, _CHUNK = 0x01, 0x08
_HUGE_RANGE = 0x09  # its length and that of its blocks are multiples of 2 ** 32


class Recorder:
    """What the engine was asked for.

    Attributes:
        pickles: that were checked.
        tables: of extents and ranges that were read, as the target ``read`` has them.
    """

    def __init__(self) -> None:
        self.pickles: list[bytes] = []
        self.tables: list[bytes] = []
        self._check_pickle, self._read_extents = native.check_pickle, native.read_extents

    def check_pickle(self, content: bytes | memoryview, archive: bool = False) -> int:
        """``native.check_pickle``, noted."""
        end = self._check_pickle(content, archive)
        self.pickles.append(bytes(content[:end]))
        return end

    def read_extents(self, paths: Sequence[str], *, direct: bool, **columns: Any) -> bytes:
        """``native.read_extents``, noted."""
        table = bytes([_CHUNK | direct])
        for row in _rows(columns, "extent", "offset", "nbytes"):
            table += _EXTENT.pack(0, _LARGEST_FILE, *row)
        for row in _rows(columns, "range", "offset", "nbytes", "block"):
            table += _RANGE.pack(1, _LARGEST_FILE, *row)
        self.tables.append(table)
        return self._read_extents(paths, direct=direct, **columns)


def _rows(columns: dict[str, array[int]], kind: str, *names: str) -> list[tuple[int, ...]]:
    """Those of the first file."""
    files = columns[f"{kind}_file"]
    rows = zip(*(columns[f"{kind}_{name}"] for name in names), strict=True)
    return [row for file, row in zip(files, rows, strict=True) if file == 0]


def record() -> Recorder:
    """Load and verify a checkpoint of every kind."""
    recorder, expected = Recorder(), state_of(1)
    with (
        tempfile.TemporaryDirectory() as directory,
        patch.object(native, "check_pickle", recorder.check_pickle),
        patch.object(native, "read_extents", recorder.read_extents),
    ):
        for kind in KINDS:
            place = Path(directory) / kind
            KINDS[kind].save(expected, place)
            if kind != "pieces":
                ckpt_fast.load(state_of(2), place)
                dcp.load(state_of(2), storage_reader=ckpt_fast.FastStorageReader(place))
            part = TensorRequest("model.weight", torch.zeros(16, 16), (40, 24))
            load_tensors(CheckpointIndex(str(place)), [part])
            ckpt_fast.verify(place, deep=True)
    return recorder


def everyday() -> list[bytes]:
    """Pickles of every opcode that plain data needs."""
    values = [
        {"step": 7, "lr": 0.5, "betas": (0.9, 0.95), "names": ["a", "b"] * 20, "none": None, "big": 3 << 80},
        collections.OrderedDict(a=collections.defaultdict(list, {1: [2]}), b=(), c=(1,), d=(1, 2, 3, 4)),
        [{1, 2}, frozenset({"a"}), b"x" * 300, bytearray(b"abc"), range(5), "ä" * 300, [[]] * 300],
        {str(n): (n, [n]) for n in range(100)},
        torch.optim.Adam([torch.nn.Parameter(torch.ones(2))]).state_dict(),
    ]
    return [pickle.dumps(value, protocol) for value in values for protocol in (2, 3, 4, 5)]


def edges() -> list[bytes]:
    """Tables that went wrong once: empty extents behind a file's end, ranges that no file holds."""
    end = _EXTENT.pack(0, _LARGEST_FILE, _LARGEST_NBYTES - 100, 100)
    start = _EXTENT.pack(0, _LARGEST_FILE, 0, 100)
    return [
        bytes([_DIRECT]) + end + _EXTENT.pack(0, _LARGEST_FILE, _LARGEST_NBYTES + 300, 0),
        bytes([0]) + end + end + _EXTENT.pack(0, _LARGEST_FILE, _LARGEST_NBYTES + 300, 0),
        bytes([0]) + start + _RANGE.pack(_HUGE_RANGE, _LARGEST_FILE, 0, 1 << 30, 1 << 30),
        bytes([0]) + start + _RANGE.pack(1, _LARGEST_FILE, 0, (1 << 31) - 1, 1),
    ]


def main(directory: Path) -> None:
    """Write the seeds of each target into a folder of its name."""
    warnings.simplefilter("ignore")
    recorder = record()
    for target, contents in ("pickle", recorder.pickles + everyday()), ("read", recorder.tables + edges()):
        (directory / target).mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(dict.fromkeys(contents)):
            (directory / target / f"{number:03}").write_bytes(content)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
