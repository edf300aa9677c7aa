# SPDX-License-Identifier: Apache-2.0
"""Records of ranks on their way to the coordinator: whatever fails there fails the save on all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.columns.records import encode_record
from ckpt_fast.format.types import ObjectShard, RankRecord, Shard, TensorShard
from ckpt_fast.pipeline.save import gathered, sealed
from ckpt_fast.pipeline.save.program import ProgramCache
from tests.helpers import run_ranks
from tests.pipeline.layouts import same
from tests.pipeline.save.test_save import FILES, assert_not_published, loaded
from tests.saves import save

pytestmark = pytest.mark.usefixtures("no_fsync")


def shards_of(rank: int, value: int, dtype: torch.dtype = torch.int32) -> list[Shard]:
    row = torch.full((1, 5), value * 100 + rank, dtype=dtype)
    return [TensorShard("w", row, (rank, 0), (2, 5)), ObjectShard(f"o{rank}", bytes(10 + value))]


def rows(value: int) -> torch.Tensor:
    return torch.tensor([[value * 100 + rank] * 5 for rank in range(2)], dtype=torch.int32)


def failing(_: object, *args: object, **kwargs: object) -> Any:
    raise RuntimeError("it cannot be done")


def of_another_version(record: RankRecord) -> bytes:
    content = encode_record(record)
    return content[:4] + b"\x09\0" + content[6:]


def saves_that_fail(rank: int, root: str, phase: str) -> list[str]:
    """Save twice, fail once, and save once more; return what each said."""
    programs, told = ProgramCache(), []
    for number in range(4):
        dtype = torch.int32
        with pytest.MonkeyPatch.context() as patch:
            if number == 2 and rank == 1 and phase == "encode":
                patch.setattr(gathered, "encode_record", failing)
            if number == 2 and rank == 1 and phase == "version":
                patch.setattr(gathered, "encode_record", of_another_version)
            if number == 2 and rank == 0 and phase == "join":
                patch.setattr(gathered, "join_records", failing)
            if number == 2 and rank == 0 and phase == "patch":
                patch.setattr(sealed, "set_object_nbytes", failing)
            if number == 2 and rank == 1 and phase == "structure":
                dtype = torch.int16
            try:
                save(shards_of(rank, number, dtype), f"{root}/{number}", programs=programs, **FILES)
            except CheckpointError as error:
                told.append(str(error))
            else:
                told.append("saved")
    return told


@pytest.mark.parametrize(
    ("phase", "message"),
    [
        ("encode", "rank 1: RuntimeError: it cannot be done"),
        ("version", "rank 0: ValueError: rank 1 of the group sent a record of version 9"),
        ("join", "rank 0: RuntimeError: it cannot be done"),
        ("patch", "rank 0: RuntimeError: it cannot be done"),
        ("structure", "rank 0: ranks disagree on w: (2, 5) of torch.int32 on one, (2, 5) of torch.int16"),
    ],
)
def test_a_failure_on_the_way_fails_the_save_on_all(tmp_path: Path, phase: str, message: str) -> None:
    first, second = run_ranks(saves_that_fail, 2, str(tmp_path), phase)
    assert first == second
    assert first[2].startswith(message)
    assert [first[number] for number in (0, 1, 3)] == ["saved"] * 3
    assert_not_published(tmp_path / "2")
    for number in (0, 1, 3):
        assert same(loaded(tmp_path / str(number), "w", rows(number)), rows(number))
