# SPDX-License-Identifier: Apache-2.0
"""Verifying what other libraries wrote: whatever changes the values that would be loaded is found."""

from __future__ import annotations

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import verify
from ckpt_fast.errors import CheckpointNotFoundError
from ckpt_fast.verification.report import State
from tests.pipeline.layouts import same

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


def state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "weight": torch.randn(40, 30, generator=generator),
        "half": torch.randn(7, 1, 5, generator=generator).bfloat16(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "strided": torch.randn(8, 6, generator=generator).t(),
        "step": 12,
        "groups": [{"lr": 0.1, "betas": (0.9, 0.95)}],
    }


@pytest.fixture
def stock(tmp_path: Path) -> Path:
    dcp.save(state(), storage_writer=dcp.FileSystemWriter(tmp_path / "stock"))
    return tmp_path / "stock"


def loaded(directory: Path) -> dict[str, Any]:
    target = {
        name: torch.zeros_like(value) if isinstance(value, torch.Tensor) else value
        for name, value in state().items()
    }
    target["step"] = 0
    dcp.load(target, storage_reader=dcp.FileSystemReader(directory))
    return target


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and same(one, other)
    return type(one) is type(other) and one == other


def test_a_sound_one(stock: Path) -> None:
    for deep in (False, True):
        report = verify(stock, deep)
        assert report.is_sound and not report.unchecked and report.deep is deep


def test_every_flip_that_changes_what_would_be_loaded_is_found(stock: Path) -> None:
    expected, chosen = state(), random.Random(5)
    found = harmless = refused = 0
    for path in sorted(stock.iterdir()):
        content = path.read_bytes()
        for position in chosen.sample(range(len(content)), 120):
            changed = bytearray(content)
            changed[position] ^= 1 << chosen.randrange(8)
            path.write_bytes(changed)
            if not verify(stock, deep=True).is_sound:
                found += 1
                continue
            harmless += 1
            try:
                values = loaded(stock)
            except CheckpointException:  # a name in .metadata; a byte of an archive that only torch looks at
                refused += 1
                continue
            assert all(equal(values[name], value) for name, value in expected.items()), (path, position)
        path.write_bytes(content)
    assert found > 100 and harmless > 5 and refused < 6
    assert verify(stock, deep=True).is_sound


@pytest.mark.parametrize("deep", [False, True])
def test_a_file_that_is_missing_or_short(stock: Path, deep: bool) -> None:
    data = stock / "__0_0.distcp"
    content = data.read_bytes()
    data.write_bytes(content[:-1])
    report = verify(stock, deep)
    assert report.damages[0].startswith(f"{data} has {len(content) - 1} bytes")
    assert [each.state for each in report.items].count(State.TRUNCATED) == 1
    data.unlink()
    report = verify(stock, deep)
    assert report.damages[0] == f"{data} is missing"
    assert {each.state for each in report.items} == {State.MISSING} and not report.is_complete


def test_each_damaged_item_is_named(stock: Path) -> None:
    data = stock / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    values = state()
    for name in ("weight", "half"):
        raw = values[name].view(torch.uint8).numpy().tobytes()
        content[content.index(raw) + 5] ^= 1
    data.write_bytes(content)
    report = verify(stock, deep=True)
    assert {each.name for each in report.items if each.state is State.FLIPPED} == {"weight", "half"}
    assert [each.path for each in report.files if each.state is State.FLIPPED] == [data.name]
    assert len(report.damages) == 3


def test_pieces_that_leave_some_out(tmp_path: Path) -> None:
    """As of two ranks of which the metadata of one is left."""

    dcp.save({"w": torch.ones(4, 2)}, storage_writer=dcp.FileSystemWriter(tmp_path))
    metadata = dcp.FileSystemReader(tmp_path).read_metadata()
    metadata.state_dict_metadata["w"].size = torch.Size((8, 2))
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    (line,) = verify(tmp_path).damages
    assert "w in" in line and "8 of its 16 elements" in line


def test_an_object_of_a_class_that_is_not_read_is_not_called_damaged(tmp_path: Path) -> None:
    dcp.save({"w": torch.ones(4), "odd": Odd()}, storage_writer=dcp.FileSystemWriter(tmp_path))
    report = verify(tmp_path, deep=True)
    assert report.is_sound and len(report.unchecked) == 1 and "odd" in report.unchecked[0]


class Odd:
    """A class that nobody allows."""


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("file", "empty", "nowhere"):
        with pytest.raises(CheckpointNotFoundError, match=name):
            verify(tmp_path / name)
