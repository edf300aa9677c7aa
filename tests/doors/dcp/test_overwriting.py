# SPDX-License-Identifier: Apache-2.0
"""``dcp.save`` over an existing checkpoint, which stays valid until the new one is."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from ckpt_fast import FastStorageReader, FastStorageWriter
from tests.doors.dcp.test_door import load, save
from tests.manifests import manifest_lies


class Broken:
    def __reduce__(self) -> Any:
        raise ValueError("cannot be pickled")


def test_a_failed_save_leaves_the_older_checkpoint_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(CheckpointException, match="cannot be pickled"):
        save(tmp_path, {"w": torch.zeros(5), "broken": Broken()})
    with pytest.raises(CheckpointException, match="not a complete checkpoint"):
        load(tmp_path, {"w": torch.zeros(5)})
    for number in range(3):
        save(tmp_path, {"w": torch.full((5,), float(number))})
        with pytest.raises(CheckpointException, match="cannot be pickled"):
            save(tmp_path, {"w": torch.zeros(5), "broken": Broken()})
        state = {"w": torch.zeros(5)}
        load(tmp_path, state)
        assert torch.equal(state["w"], torch.full((5,), float(number)))
        assert manifest_lies(tmp_path) == []


def test_an_older_checkpoint_is_there_until_the_new_one_is(tmp_path: Path) -> None:
    """Observed from outside while the data is being written."""
    state = {f"w{number}": torch.full((5,), 1.0) for number in range(4)}
    writer = FastStorageWriter(tmp_path, thread_count=2)
    dcp.save(state, storage_writer=writer)
    (tmp_path / "notes.txt").write_text("of the user")
    found = []

    class Watching(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            loaded = {name: torch.zeros(5) for name in state}
            dcp.load(loaded, storage_reader=FastStorageReader(tmp_path), no_dist=True)
            found.append(float(loaded["w3"][0]))
            return super().resolve_data(write_item)

    for number in (2.0, 3.0):
        newer = {name: torch.full((5,), number) for name in state}
        dcp.save(newer, storage_writer=writer, planner=Watching())
    assert found == [1.0] * 4 + [2.0] * 4
    data = {path.name for path in tmp_path.iterdir()}
    assert len(data) == 4 and {".metadata", "notes.txt"} < data
    load(tmp_path, state)
    assert all(bool((value == 3).all()) for value in state.values())


def test_one_of_another_format_ends_first(tmp_path: Path) -> None:
    """Its seal would otherwise vouch for the files of the new one."""
    save(tmp_path, {"w": torch.zeros(5)})
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(CheckpointException, match="cannot be pickled"):
        save(tmp_path, {"w": torch.zeros(5), "broken": Broken()})
    assert not (tmp_path / "metadata.json").exists() and not (tmp_path / ".metadata").exists()


@pytest.mark.parametrize("cached", [False, True])
def test_plans_that_are_kept(tmp_path: Path, cached: bool) -> None:
    """torch may cache each rank's plan between saves; file names are not part of it."""
    options = {"enable_plan_caching": True} if cached else {}
    for number in range(4):
        state = {"w": torch.full((5,), float(number)), "step": number}
        planner = DefaultSavePlanner(**options)  # type: ignore[arg-type]
        dcp.save(state, storage_writer=FastStorageWriter(tmp_path), planner=planner)
        found = {"w": torch.zeros(5), "step": -1}
        load(tmp_path, found)
        assert found["step"] == number and bool((found["w"] == number).all())  # type: ignore[attr-defined]
        assert len(list(tmp_path.iterdir())) == 2 and manifest_lies(tmp_path) == []


def test_a_later_save_removes_what_dead_saves_left(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.zeros(5)})
    (tmp_path / "__0_7.distcp").write_bytes(b"whole, of a save that was never published")
    os.utime(tmp_path / "__0_7.distcp", (time.time() - 7200,) * 2)
    (tmp_path / ".__0_8.distcp.0123abcd.partial").write_bytes(b"not even that")
    save(tmp_path, {"w": torch.ones(5)})
    assert {path.name for path in tmp_path.iterdir()} == {".metadata", "__0_8.distcp"}


def test_two_processes_that_save_there_without_each_other(tmp_path: Path) -> None:
    """The later one finds its data even if the other has published in the meantime."""
    save(tmp_path, {"w": torch.zeros(5)})

    class Slow(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            save(tmp_path, {"w": torch.ones(5)}, no_dist=True)
            return super().resolve_data(write_item)

    save(tmp_path, {"w": torch.full((5,), 2.0)}, planner=Slow(), no_dist=True)
    state = {"w": torch.zeros(5)}
    load(tmp_path, state)
    assert torch.equal(state["w"], torch.full((5,), 2.0)) and manifest_lies(tmp_path) == []
