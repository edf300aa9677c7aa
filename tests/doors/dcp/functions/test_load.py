# SPDX-License-Identifier: Apache-2.0
"""Loads that do not fit, and loads of a part: nothing is changed by those that fail before reading."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError, CheckpointNotFoundError
from tests.doors.dcp.states import differences, training_state

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

SAVED = {"a": {"w": torch.ones(3, 4), "v": torch.ones(5)}, "step": 7, "list": [1, 2]}


def wanted() -> dict[str, Any]:
    return {"a": {"w": torch.zeros(3, 4), "v": torch.zeros(5)}, "step": 0, "list": []}


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "missing tensor": ({"more": torch.zeros(2)}, "has no more"),
    "missing object": ({"more": 5}, "has no more"),
    "missing below": ({"a": {"w": torch.zeros(3, 4), "u": torch.zeros(1)}}, r"has no a\.u"),
    "another shape": (
        {"a": {"w": torch.zeros(4, 3)}},
        r"a\.w is a tensor of shape \(4, 3\).*shape \(3, 4\)",
    ),
    "fewer dimensions": ({"a": {"w": torch.zeros(12)}}, r"a\.w is a tensor of shape \(12,\)"),
    "an object for a tensor": ({"a": {"w": 3}}, r"a\.w is an object there and a tensor of shape \(3, 4\)"),
    "a tensor for an object": ({"step": torch.zeros(1)}, r"step is a tensor of shape \(1,\).*an object in"),
}


@pytest.mark.parametrize("kind", MISFITS)
@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_what_does_not_fit_changes_nothing(writer: str, kind: str, tmp_path: Path) -> None:
    if writer == "ours":
        ckpt_fast.save(SAVED, tmp_path)
    else:
        dcp.save(SAVED, checkpoint_id=tmp_path)
    change, text = MISFITS[kind]
    found = {**wanted(), **change}
    before = [value for value in found["a"].values() if isinstance(value, torch.Tensor)]
    with pytest.raises(CheckpointMismatchError, match=text):
        ckpt_fast.load(found, tmp_path)
    assert not any(value.any() for value in before) and found["list"] == []


def test_all_that_does_not_fit_is_named(tmp_path: Path) -> None:
    ckpt_fast.save({str(number): torch.ones(2) for number in range(9)}, tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"0 is.*4 is.*\(and 4 more\)"):
        ckpt_fast.load({str(number): torch.ones(3) for number in range(9)}, tmp_path)


def test_partial_loads(tmp_path: Path) -> None:
    ckpt_fast.save(SAVED, tmp_path)
    found = {"a": {"v": torch.zeros(5)}, "more": torch.zeros(2), "other": "stays"}
    ckpt_fast.load(found, tmp_path, allow_partial_load=True)
    assert torch.equal(found["a"]["v"], torch.ones(5))
    assert found.keys() == {"a", "more", "other"}
    assert not found["more"].any() and found["other"] == "stays"


def test_what_is_not_asked_for_is_ignored_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = training_state()
    ckpt_fast.save(state, tmp_path)
    with caplog.at_level(logging.WARNING):
        ckpt_fast.load(training_state(1), tmp_path)
        assert caplog.text == ""
        found = {"model": training_state(1)["model"]}
        ckpt_fast.load(found, tmp_path, allow_partial_load=True)
        assert caplog.text == ""
        ckpt_fast.load(found, tmp_path)
    assert "no rank asked for these parts" in caplog.text and "optimizer" in caplog.text
    assert differences(state["model"], found["model"]) == []


def test_no_checkpoint(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointNotFoundError, match=str(path)):
            ckpt_fast.load(wanted(), path)


def test_damage(tmp_path: Path) -> None:
    ckpt_fast.save(SAVED, tmp_path)
    path = tmp_path / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(3, 4).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    found = wanted()
    with pytest.raises(CheckpointCorruptError):
        ckpt_fast.load(found, tmp_path)
    assert found["step"] == 0


def test_a_load_that_does_not_fit_materializes_nothing(tmp_path: Path) -> None:
    ckpt_fast.save({"x": {"a": torch.ones(2), "b": torch.ones(3)}}, tmp_path)
    into = {"x": {"a": torch.empty(2, device="meta"), "b": torch.zeros(4)}}
    with pytest.raises(CheckpointMismatchError):
        ckpt_fast.load(into, tmp_path)
    assert into["x"]["a"].is_meta
    into["x"]["b"] = torch.zeros(3)
    ckpt_fast.load(into, tmp_path)
    assert torch.equal(into["x"]["a"], torch.ones(2)) and torch.equal(into["x"]["b"], torch.ones(3))
