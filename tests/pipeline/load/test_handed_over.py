# SPDX-License-Identifier: Apache-2.0
"""One rank reads ``.metadata`` for all; and a rank that needs few pieces of many looks at no others."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import ckpt_fast
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.format.types import TensorRequest, TensorShard
from ckpt_fast.pipeline.load import decode
from ckpt_fast.pipeline.load.entries import columns
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.storage import files
from ckpt_fast.storage.files import Directory
from tests.helpers import run_ranks
from tests.manifests import manifest_of
from tests.pipeline.layouts import random_tensor, same
from tests.saves import save


def state(fill: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((n + 2,), fill) for n, name in enumerate("abc")}


def loads(rank: int, directory: str) -> tuple[int, bool]:
    """Return how often this rank read the whole ``.metadata``, and whether it has what was saved."""
    ckpt_fast.save(state(3.0), directory)
    reads = 0
    original = files.read_small_file

    def counting(path: str, limit: int) -> bytes:
        nonlocal reads
        reads += os.path.basename(path) == METADATA_FILE
        return original(path, limit)

    loaded = state(0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "read_small_file", counting)
        ckpt_fast.load(loaded, directory)
    return reads, all(same(loaded[name], value) for name, value in state(3.0).items())


def test_one_rank_reads_for_all(tmp_path: Path) -> None:
    assert run_ranks(loads, 3, str(tmp_path / "saved")) == [(1, True), (0, True), (0, True)]


def loads_of_two_places(rank: int, root: str) -> str:
    """Return what a load says of ranks that do not share their storage."""
    directory = os.path.join(root, str(rank))
    if rank == 0:
        ckpt_fast.save(state(1.0), directory, no_dist=True)
    dist.barrier()
    if rank == 1:
        ckpt_fast.save(state(2.0), directory, no_dist=True)
    dist.barrier()
    try:
        ckpt_fast.load(state(0.0), directory)
    except CheckpointError as error:
        return str(error)
    return "loaded"


def test_a_rank_that_sees_another_save_does_not_take_what_it_is_given(tmp_path: Path) -> None:
    told = run_ranks(loads_of_two_places, 2, str(tmp_path))
    assert all("rank 1 sees another .metadata" in each for each in told)


def saved_in_pieces(directory: Path, count: int = 200) -> torch.Tensor:
    tensor = random_tensor((count, 6), torch.float32, 5)
    pieces = [
        TensorShard("w", tensor[n : n + 1, 3 * c : 3 * c + 3], (n, 3 * c), (count, 6))
        for n in range(count)
        for c in range(2)
    ]
    save(random.Random(3).sample(pieces, len(pieces)), str(directory))
    return tensor


def test_what_is_handed_over_is_as_good_as_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = saved_in_pieces(tmp_path)
    handed = OpenCheckpoint(Directory(str(tmp_path))).to_hand_over()
    assert 0 < len(handed) < (tmp_path / METADATA_FILE).stat().st_size
    opened = OpenCheckpoint(Directory(str(tmp_path)))
    opened.accept(handed)
    assert opened.is_own and opened.manifest is not None
    assert opened.manifest.save_id == manifest_of(tmp_path).save_id
    loaded = torch.zeros_like(tensor)
    load_tensors(opened.index, [TensorRequest("w", loaded, (0, 0))])
    assert same(loaded, tensor)
    # The pickle is there for whoever asks, as long as it is that of the same save.
    assert opened.index.metadata.state_dict_metadata["w"].size == tensor.shape
    late = OpenCheckpoint(Directory(str(tmp_path)))
    late.accept(handed)
    index = late.index
    shutil.rmtree(tmp_path)
    saved_in_pieces(tmp_path)
    with pytest.raises(CheckpointCorruptError, match="was replaced while it was being read"):
        _ = index.metadata


@pytest.mark.parametrize("damage", ["shorter", "other end", "gone"])
def test_what_does_not_fit_the_file_is_not_used(tmp_path: Path, damage: str) -> None:
    saved_in_pieces(tmp_path, 3)
    path = tmp_path / METADATA_FILE
    content = path.read_bytes()
    opened = OpenCheckpoint(Directory(str(tmp_path)))
    opened.accept(OpenCheckpoint(Directory(str(tmp_path))).to_hand_over())
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "shorter" else content[:-9] + b"X" + content[-8:])
    with pytest.raises(CheckpointError):
        _ = opened.index


def test_a_damaged_file_is_not_handed_over(tmp_path: Path) -> None:
    saved_in_pieces(tmp_path, 3)
    path = tmp_path / METADATA_FILE
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    assert OpenCheckpoint(Directory(str(tmp_path))).to_hand_over() == b""
    assert OpenCheckpoint(Directory(str(tmp_path / "nowhere"))).to_hand_over() == b""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_regions_of_a_tensor_in_many_pieces(
    tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any region is as it was saved; objects are made only of the pieces that it touches."""
    tensor = saved_in_pieces(tmp_path)
    made = 0
    piece = columns.Piece

    def counted(*parts: object) -> object:
        nonlocal made
        made += 1
        return piece(*parts)

    monkeypatch.setattr(columns, "Piece", counted)
    monkeypatch.setattr(decode, "unpickle_metadata", lambda content: pytest.fail("unpickled"))
    chance = random.Random(0)
    for _ in range(40):
        begin = (chance.randrange(200), chance.randrange(6))
        end = (min(200, begin[0] + chance.randint(0, 5)), chance.randint(begin[1], 6))
        wanted = tensor[begin[0] : end[0], begin[1] : end[1]]
        loaded, made = torch.zeros(wanted.shape, dtype=dtype), 0
        load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("w", loaded, begin)])
        assert same(loaded, wanted.to(dtype))
        assert made <= 2 * (end[0] - begin[0]) or not wanted.numel()


def test_an_exact_piece_of_many(tmp_path: Path) -> None:
    tensor = saved_in_pieces(tmp_path)
    index = CheckpointIndex(str(tmp_path))
    found, piece = index.tensor_within("w", (7, 3), (1, 3))
    assert piece is not None and found.pieces == [piece]
    _, piece = index.tensor_within("w", (7, 2), (1, 3))
    assert piece is None
    loaded = [torch.zeros(1, 3) for _ in range(200)]
    load_tensors(index, [TensorRequest("w", each, (n, 3)) for n, each in enumerate(loaded)])
    assert same(torch.cat(loaded), tensor[:, 3:])
