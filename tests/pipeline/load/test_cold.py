# SPDX-License-Identifier: Apache-2.0
"""Uncached data bypasses the page cache, and slices read only themselves."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import native
from ckpt_fast.format.types import Extent, TensorRequest, TensorShard
from ckpt_fast.pipeline.load import complete as complete_module
from ckpt_fast.pipeline.load import load as load_module
from ckpt_fast.pipeline.load.complete import crc32_of
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.load.read import ReadProgram
from ckpt_fast.storage.files import Directory
from tests.saves import save

ROWS, COLUMNS = 1024, 4096


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    """Save a directory with one 8 MiB tensor, "w"."""
    tensor = torch.arange(ROWS * COLUMNS).to(torch.int16).view(ROWS, COLUMNS)
    save([TensorShard("w", tensor, (0, 0), tuple(tensor.shape))], str(tmp_path / "c"))
    return tmp_path / "c", tensor


def forget(directory: Path) -> None:
    """Drop the checkpoint from the page cache; skip if the file system is in memory."""
    cold = False
    for path in directory.glob("*.distcp"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        program = ReadProgram(Directory(str(directory)))
        program.add(Extent(path.name, 0, path.stat().st_size), 0)
        cold = program.is_cold()
    if not cold:
        pytest.skip("the file system keeps files in memory")


def spy_on_direct(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Record the ``direct`` argument of every read from now on."""
    seen: list[bool] = []
    read_extents = native.read_extents

    def spying(*args: Any, **options: Any) -> list[int]:
        seen.append(options["direct"])
        return read_extents(*args, **options)

    monkeypatch.setattr(native, "read_extents", spying)
    monkeypatch.setattr(load_module, "MIN_DIRECT_NBYTES", 0)
    return seen


@pytest.mark.parametrize("rows", [ROWS, ROWS // 8])
def test_cold_bytes_come_past_the_page_cache(
    native_impl: str, checkpoint: tuple[Path, torch.Tensor], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, tensor = checkpoint
    index = CheckpointIndex(str(directory))
    seen = spy_on_direct(monkeypatch)
    forget(directory)
    into = torch.zeros(rows, COLUMNS, dtype=tensor.dtype)
    report = load_tensors(index, [TensorRequest("w", into, (3 * (ROWS - rows) // 7, 0))])
    assert torch.equal(into, tensor[3 * (ROWS - rows) // 7 :][:rows])
    assert seen[-1] is True and report.verified == 1


def test_cached_bytes_come_from_the_page_cache(
    native_impl: str, checkpoint: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, tensor = checkpoint
    for path in directory.glob("*.distcp"):
        path.read_bytes()
    seen = spy_on_direct(monkeypatch)
    into = torch.zeros_like(tensor)
    load_tensors(CheckpointIndex(str(directory)), [TensorRequest("w", into, (0, 0))])
    assert torch.equal(into, tensor) and seen[-1] is False


@pytest.mark.parametrize(("rows", "direct"), [(ROWS, False), (ROWS // 2, True)])
def test_what_several_ranks_want_goes_through_the_cache(
    checkpoint: tuple[Path, torch.Tensor], rows: int, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks that each want everything want it twice; two halves may be two parts of it."""
    directory, tensor = checkpoint
    monkeypatch.setattr(load_module, "ranks_on_this_node", lambda: 2)
    seen = spy_on_direct(monkeypatch)
    forget(directory)
    into = torch.zeros(rows, COLUMNS, dtype=tensor.dtype)
    load_tensors(CheckpointIndex(str(directory)), [TensorRequest("w", into, (0, 0))])
    assert torch.equal(into, tensor[:rows]) and seen[-1] is direct


def test_direct_reads_can_be_turned_off(
    checkpoint: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, tensor = checkpoint
    monkeypatch.setenv("CKPT_FAST_DIRECT", "0")
    seen = spy_on_direct(monkeypatch)
    forget(directory)
    load_tensors(CheckpointIndex(str(directory)), [TensorRequest("w", torch.zeros_like(tensor), (0, 0))])
    assert seen[-1] is False


def bytes_read() -> int:
    """Return the bytes read by this process's read calls, from files of any kind."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["rchar"])


def test_the_checksum_of_a_cold_file_is_computed_past_the_page_cache(
    native_impl: str, checkpoint: tuple[Path, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, _ = checkpoint
    monkeypatch.setattr(complete_module, "MIN_DIRECT_NBYTES", 0)
    seen = spy_on_direct(monkeypatch)
    (path,) = directory.glob("*.distcp")
    content = path.read_bytes()
    assert crc32_of(str(path), len(content)) == zlib.crc32(content)
    forget(directory)
    before = bytes_read()
    assert crc32_of(str(path), len(content)) == zlib.crc32(content)
    assert bytes_read() - before <= 1.01 * len(content)
    assert seen == [False, True]


@pytest.mark.parametrize("rest", [-1, 0, 1])
@pytest.mark.parametrize("blocks", [0, 1, 5])
def test_the_checksum_of_a_file_of_any_length(
    native_impl: str, tmp_path: Path, blocks: int, rest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_CHUNK", "64K")
    content = os.urandom(max(blocks * (64 << 10) + rest, 0))
    path = tmp_path / "file"
    path.write_bytes(content + b"more")
    progress = native.Progress()
    assert crc32_of(str(path), len(content), progress) == zlib.crc32(content)
    assert progress.nbytes == len(content)
    with pytest.raises(OSError, match="file ends at"):
        crc32_of(str(path), len(content) + (64 << 10))


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize(("axis", "verify"), [(0, "1"), (0, "0"), (1, "0")])
def test_an_eighth_reads_an_eighth(
    checkpoint: tuple[Path, torch.Tensor], axis: int, verify: str, cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With checksums too if the eighth is rows; columns touch every block."""
    monkeypatch.setenv("CKPT_FAST_VERIFY", verify)
    directory, tensor = checkpoint
    if cold:
        monkeypatch.setattr(load_module, "MIN_DIRECT_NBYTES", 0)
        forget(directory)
    index = CheckpointIndex(str(directory))
    wanted = tensor.chunk(8, axis)[3]
    into = torch.zeros_like(wanted).contiguous()
    offsets = (3 * ROWS // 8, 0) if axis == 0 else (0, 3 * COLUMNS // 8)
    before = bytes_read()
    load_tensors(index, [TensorRequest("w", into, offsets)])
    read = bytes_read() - before
    assert torch.equal(into, wanted)
    assert read <= 1.1 * wanted.nbytes
