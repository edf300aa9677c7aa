# SPDX-License-Identifier: Apache-2.0
"""How fast checkpoints can be written to a directory and read from it, and how fast they are."""

from __future__ import annotations

import gc
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_stock
from torch.distributed.checkpoint.state_dict_saver import save as save_stock

from ckpt_fast import native, settings
from ckpt_fast.doors.dcp.direct.functions import load, save
from ckpt_fast.errors import CheckpointNotFoundError, CheckpointWriteError
from ckpt_fast.storage.commit import fsync_directory
from ckpt_fast.storage.space import require_space
from ckpt_fast.tools.streaming import Progress, no_progress

Contestant = Literal["limit", "ckpt_fast", "torch DCP"]

_TENSORS = 16


@dataclass(frozen=True)
class Measured:
    """One contestant at one task.

    Attributes:
        task: "save" (until durable) or "load" (with a cold page cache, on Linux).
        contestant: "limit" writes and reads the same bytes as one file, and no checkpoint.
        seconds: one for each round.
        nbytes: that a round moves.
    """

    task: str
    contestant: Contestant
    seconds: tuple[float, ...]
    nbytes: int

    @property
    def median_s(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.seconds)

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second in the median round."""
        return self.nbytes / self.median_s / 1e9


def bench(
    directory: str | os.PathLike[str],
    nbytes: int = 512 << 20,
    rounds: int = 3,
    progress: Progress = no_progress,
) -> list[Measured]:
    """Measure the storage of a directory: its limit, ckpt_fast, and torch DCP. Local; from CPU memory.

    Every round runs each contestant once, in turn, so that what else the machine does affects all alike; a
    first round is not counted. What is written lies in a directory below, which is removed.

    Args:
        directory: on the storage that is meant.
        nbytes: of the state, in float32 tensors; it is in memory twice.
        rounds: counted.
        progress: called with the runs done so far, and those that there are.

    Returns:
        First the saves, then the loads; the limit first.

    Raises:
        CheckpointNotFoundError: there is no such directory.
        CheckpointWriteError: it cannot be written, or there is no room.
    """
    root = os.fspath(directory)
    if not os.path.isdir(root):
        raise CheckpointNotFoundError(f"{root} is no directory")
    # Three checkpoints lie there at once, each with what replaces it.
    require_space(root, 6 * nbytes)
    try:
        place = tempfile.mkdtemp(prefix=".ckpt_fast-bench-", dir=root)
    except OSError as error:
        raise CheckpointWriteError(
            f"cannot write in {root}: {error.strerror or error}", error.errno, root
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch DCP's, of having no process group
            return _Bench(place, nbytes).run(rounds, progress)
    finally:
        shutil.rmtree(place, ignore_errors=True)


class _Bench:
    def __init__(self, place: str, nbytes: int) -> None:
        numel = max(1, nbytes // _TENSORS // 4)
        # Random bits are neither compressed nor deduplicated by the storage.
        self._state = {
            f"tensor_{number}": torch.randint(-(1 << 31), (1 << 31) - 1, (numel,), dtype=torch.int32)
            for number in range(_TENSORS)
        }
        self._into = {name: torch.empty_like(tensor) for name, tensor in self._state.items()}
        self.nbytes = numel * 4 * _TENSORS
        self._places = {name: os.path.join(place, name.replace(" ", "_")) for name in _CONTESTANTS}
        os.mkdir(self._places["limit"])

    def run(self, rounds: int, progress: Progress) -> list[Measured]:
        runs: dict[tuple[str, Contestant], Callable[[], Any]] = {
            ("save", "limit"): self._write_limit,
            ("save", "ckpt_fast"): lambda: save(self._state, self._places["ckpt_fast"], no_dist=True),
            ("save", "torch DCP"): self._save_stock,
            ("load", "limit"): self._read_limit,
            ("load", "ckpt_fast"): lambda: load(self._into, self._places["ckpt_fast"], no_dist=True),
            ("load", "torch DCP"): self._load_stock,
        }
        seconds: dict[tuple[str, Contestant], list[float]] = {key: [] for key in runs}
        total = (rounds + 1) * len(runs)
        for number in range(rounds + 1):
            for at, ((task, contestant), run) in enumerate(runs.items(), start=1):
                if task == "load":
                    _drop_from_page_cache(self._places[contestant])
                gc.collect()
                begin = time.perf_counter()
                run()
                if number:
                    seconds[task, contestant].append(time.perf_counter() - begin)
                progress(number * len(runs) + at, total)
        return [
            Measured(task, contestant, tuple(each), self.nbytes)
            for (task, contestant), each in seconds.items()
        ]

    @property
    def _file(self) -> str:
        return os.path.join(self._places["limit"], "file")

    def _columns(self, tensors: dict[str, torch.Tensor]) -> tuple[array[int], ...]:
        """File, offset, length and address of each tensor in one file."""
        each = self.nbytes // _TENSORS
        zeros = array("q", [0]) * _TENSORS
        offsets = array("q", (number * each for number in range(_TENSORS)))
        addresses = array("q", (tensor.data_ptr() for tensor in tensors.values()))
        return zeros, offsets, array("q", [each]) * _TENSORS, addresses

    def _write_limit(self) -> None:
        files, offsets, lengths, addresses = self._columns(self._state)
        nothing: array[int] = array("q")
        native.write_files(
            [self._file],
            file_nbytes=array("q", [self.nbytes]),
            piece_file=files,
            piece_offset=offsets,
            piece_nbytes=lengths,
            piece_address=addresses,
            piece_digest=array("q", [-1]) * _TENSORS,
            patch_file=nothing,
            patch_offset=nothing,
            patch_digest=nothing,
            digest_count=0,
            threads=settings.io_threads(),
            chunk_bytes=settings.chunk_bytes(),
            direct=settings.direct_io(),
            fsync=True,
        )
        fsync_directory(self._places["limit"])

    def _read_limit(self) -> None:
        files, offsets, lengths, addresses = self._columns(self._into)
        nothing: array[int] = array("q")
        native.read_extents(
            [self._file],
            extent_file=files,
            extent_offset=offsets,
            extent_nbytes=lengths,
            extent_address=addresses,
            range_file=nothing,
            range_offset=nothing,
            range_nbytes=nothing,
            range_block=nothing,
            threads=settings.io_threads(),
            chunk_bytes=settings.chunk_bytes(),
            direct=settings.direct_io(),
        )

    def _save_stock(self) -> None:
        writer = FileSystemWriter(self._places["torch DCP"], thread_count=settings.io_threads())
        save_stock(self._state, storage_writer=writer, no_dist=True)

    def _load_stock(self) -> None:
        load_stock(self._into, storage_reader=FileSystemReader(self._places["torch DCP"]), no_dist=True)


_CONTESTANTS: tuple[Contestant, ...] = ("limit", "ckpt_fast", "torch DCP")


def _drop_from_page_cache(directory: str) -> None:
    """What was read or written through the page cache is read from the storage again, on Linux."""
    if sys.platform == "linux":
        for entry in os.scandir(directory):
            if entry.is_file():
                descriptor = os.open(entry.path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                finally:
                    os.close(descriptor)
