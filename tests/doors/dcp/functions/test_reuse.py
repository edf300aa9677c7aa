# SPDX-License-Identifier: Apache-2.0
"""Saves of a structure that was saved before: they plan nothing, and write what a first save would."""

from __future__ import annotations

import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan

import ckpt_fast
from ckpt_fast.doors.dcp.direct import save as save_module
from ckpt_fast.doors.dcp.direct.save import KnownStructures
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.manifest import split_manifest
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.pipeline.load.index import CheckpointIndex
from tests.doors.dcp.states import blank, differences, odd_tensors, training_state

Save = Callable[[Any, Path], SaveReport]


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forget all structures; returns what does so again."""

    def forget() -> None:
        monkeypatch.setattr(save_module._known, "_alone", KnownStructures())

    forget()
    return forget


def in_background(state: Any, path: Path) -> SaveReport:
    report = ckpt_fast.async_save(state, path).result()
    assert isinstance(report, SaveReport)
    return report


def state_of(seed: int) -> dict[str, Any]:
    return {**training_state(seed), "odd": odd_tensors(seed)}


def is_planned(report: SaveReport) -> bool:
    return "plan" in report.steps


def contents(directory: Path) -> dict[str, bytes]:
    """Return the files of a checkpoint; of ``.metadata`` what does not differ between equal saves."""
    files = {path.name: path.read_bytes() for path in directory.iterdir()}
    files[".metadata"] = split_manifest(files[".metadata"])[0]
    return files


def loaded(directory: Path, like: Any) -> Any:
    found = blank(like)
    ckpt_fast.load(found, directory)
    return found


@pytest.mark.parametrize("save", [ckpt_fast.save, in_background])
def test_the_same_bytes_as_planned_anew(save: Save, tmp_path: Path, known: Callable[[], None]) -> None:
    planned = [is_planned(save(state_of(seed), tmp_path / str(seed))) for seed in range(3)]
    assert planned == [True, False, False]
    for seed in range(3):
        known()
        assert is_planned(save(state_of(seed), tmp_path / "anew"))
        # Objects have room to grow, so that those of the first save decide where things are.
        pickled = pickle.loads(contents(tmp_path / "anew")[".metadata"])
        assert pickle.loads(contents(tmp_path / str(seed))[".metadata"]).planner_data == pickled.planner_data
        if seed == 0:
            assert contents(tmp_path / "0") == contents(tmp_path / "anew")
        assert differences(state_of(seed), loaded(tmp_path / str(seed), state_of(seed))) == []


def test_only_values_differ(tmp_path: Path, known: Callable[[], None]) -> None:
    def state(seed: int) -> dict[str, Any]:
        return {"odd": odd_tensors(seed), "step": 100 + seed}

    for seed in range(3):
        ckpt_fast.save(state(seed), tmp_path / str(seed))
        known()
        ckpt_fast.save(state(seed), tmp_path / f"anew {seed}")
        assert contents(tmp_path / str(seed)) == contents(tmp_path / f"anew {seed}")
        ckpt_fast.save(state(seed), tmp_path / "again")


CHANGES: dict[str, Any] = {
    "shape": {"a": {"w": torch.ones(3, 5), "v": torch.ones(4)}},
    "dtype": {"a": {"w": torch.ones(3, 4).half(), "v": torch.ones(4)}},
    "strides": {"a": {"w": torch.arange(12.0).view(4, 3).t(), "v": torch.ones(4)}},
    "name": {"a": {"u": torch.ones(3, 4), "v": torch.ones(4)}},
    "order": {"a": {"v": torch.ones(4), "w": torch.ones(3, 4)}},
    "more": {"a": {"w": torch.ones(3, 4), "v": torch.ones(4), "x": torch.ones(1)}},
    "less": {"a": {"w": torch.ones(3, 4)}},
    "an object": {"a": {"w": torch.ones(3, 4), "v": 4}},
    "other nesting": {"a.w": torch.ones(3, 4), "a": {"v": torch.ones(4)}},
    "no nesting": {"a.w": torch.ones(3, 4), "a.v": torch.ones(4)},
    "conjugate": {"a": {"w": torch.ones(3, 4), "v": torch.complex(torch.ones(4), torch.ones(4)).conj()}},
    "sparse": {"a": {"w": torch.ones(3, 4).to_sparse(), "v": torch.ones(4)}},
    "a list": {"a": [torch.ones(3, 4), torch.ones(4)]},
    "keys like a list's": {"a": {"0": torch.ones(3, 4), "1": torch.ones(4)}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_structure(change: str, tmp_path: Path) -> None:
    before = {"a": {"w": torch.zeros(3, 4), "v": torch.zeros(4)}}
    if change == "keys like a list's":
        before = CHANGES["a list"]
    changed = CHANGES[change]
    has_program = change != "sparse"
    for state, planned in ((before, True), (changed, True), (changed, not has_program)):
        assert is_planned(ckpt_fast.save(state, tmp_path)) == planned
        assert CheckpointIndex(str(tmp_path)).metadata.planner_data == flatten_state_dict(state)[1]
        if has_program or state is before:  # sparse tensors can only be saved
            assert differences(state, loaded(tmp_path, state)) == []


def test_an_object_that_outgrows_its_room(tmp_path: Path) -> None:
    for text in ("short", "longer " * 1000, "longer " * 1001, "short"):
        state = {"w": torch.ones(5) * len(text), "text": text}
        ckpt_fast.save(state, tmp_path)
        assert differences(state, loaded(tmp_path, state)) == []


def test_structures_in_turn(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    states = [{"model": model.state_dict()}, {"optimizer": training_state()}, {"step": 3}]
    for turn in range(3):
        for number, state in enumerate(states):
            report = ckpt_fast.save(state, tmp_path / str(number))
            assert is_planned(report) == (turn == 0)
            assert differences(state, loaded(tmp_path / str(number), state)) == []


def test_only_some_structures_are_kept(tmp_path: Path) -> None:
    for _ in range(2):
        for rows in range(1, 7):
            assert is_planned(ckpt_fast.save({"w": torch.ones(rows)}, tmp_path))
    kept = save_module._known._alone
    assert len(kept.divisions) == len(kept.programs) == save_module._MOST_STRUCTURES


def test_no_tensors_are_kept(tmp_path: Path) -> None:
    for save in (ckpt_fast.save, ckpt_fast.save, in_background, in_background):
        tensor = torch.ones(300)
        left = weakref.ref(tensor)
        save({"w": tensor}, tmp_path)
        del tensor
        assert left() is None, save


def test_a_bound_on_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {str(number): torch.full((1000,), float(number)) for number in range(20)}
    in_background(state, tmp_path)
    monkeypatch.setenv("CKPT_FAST_HOST_BUFFER", "30000")
    for number in range(2):
        for tensor in state.values():
            tensor.add_(1)
        assert is_planned(in_background(state, tmp_path)) == (number == 0), "a ring has a program of its own"
        assert differences(state, loaded(tmp_path, state)) == []


class Failing(DefaultSavePlanner):
    """Fails where the storage writer is not told of it."""

    def finish_plan(self, _: SavePlan) -> SavePlan:
        raise ValueError("no plan")


def test_a_save_of_torch_that_failed_does_not_occupy_the_directory(tmp_path: Path) -> None:
    state = {"a": torch.ones(2)}
    ckpt_fast.save(state, tmp_path)
    with pytest.raises(CheckpointException):
        dcp.save(state, storage_writer=ckpt_fast.FastStorageWriter(tmp_path), planner=Failing())
    state["a"].fill_(3)
    ckpt_fast.save(state, tmp_path)
    ckpt_fast.async_save(state, tmp_path).result()
    found = {"a": torch.zeros(2)}
    ckpt_fast.load(found, tmp_path)
    assert torch.equal(found["a"], state["a"])


@pytest.mark.parametrize("save", [ckpt_fast.save, in_background])
def test_zeros_without_memory(save: Save, tmp_path: Path) -> None:
    state = {"w": torch.zeros(3)}
    save(state, tmp_path)
    state["w"] = torch._efficientzerotensor((3,))
    with pytest.raises(CheckpointMismatchError, match="w is a ZeroTensor"):
        save(state, tmp_path)


@pytest.mark.parametrize("nbytes", [0, 396])
@pytest.mark.parametrize("save", [ckpt_fast.save, in_background])
def test_a_storage_that_was_freed_or_cut_short(save: Save, nbytes: int, tmp_path: Path) -> None:
    tensor = torch.ones(100)
    state = {"w": tensor, "v": torch.ones(3)}
    for number in range(2):
        save(state, tmp_path / str(number))
    tensor.untyped_storage().resize_(nbytes)
    with pytest.raises(CheckpointMismatchError, match=rf"w has 100 elements.* only {nbytes} bytes"):
        save(state, tmp_path / "0")
    assert not differences(loaded(tmp_path / "0", {"v": torch.ones(3)}), {"v": torch.ones(3)})
    tensor.untyped_storage().resize_(400)
    tensor.fill_(2)
    save(state, tmp_path / "0")
    assert torch.equal(loaded(tmp_path / "0", state)["w"], torch.full((100,), 2.0))
