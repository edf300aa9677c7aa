# SPDX-License-Identifier: Apache-2.0
"""What one does with checkpoints on a laptop. Each function gets an empty directory."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

import ckpt_fast
from ckpt_fast import native
from ckpt_fast.cli import main
from ckpt_fast.storage.spool_directory import SpoolDirectory


def _state(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(300, 200, generator=generator)
    return {
        "weight": weight,
        "columns": weight.t(),
        "half": weight[:7].bfloat16(),
        "step": 7 + seed,
        "settings": {"lr": 0.1},
    }


def _empty() -> dict[str, Any]:
    zeros = {name: torch.zeros_like(value) for name, value in _state().items() if torch.is_tensor(value)}
    return {**_state(), **zeros, "step": 0}


def _require_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        same = torch.equal(found[name], value) if torch.is_tensor(value) else found[name] == value
        assert same, name


def _command(*arguments: str | Path) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main([str(each) for each in arguments])
    assert status == 0, printed.getvalue()
    return printed.getvalue()


def save_and_load(place: Path) -> None:
    assert native.engine().__name__ == "ckpt_fast.native.fallback"
    ckpt_fast.save(_state(), place / "step", no_dist=True)
    into = _empty()
    ckpt_fast.load(into, place / "step", no_dist=True)
    _require_equal(into, _state())


def save_again(place: Path) -> None:
    """The second save replaces the first, by two renames, and leaves nothing behind."""
    for seed in (0, 1):
        ckpt_fast.save(_state(seed), place / "step", no_dist=True)
        into = _empty()
        ckpt_fast.load(into, place / "step", no_dist=True)
        _require_equal(into, _state(seed))
    assert os.listdir(place) == ["step"]


def save_in_the_background(place: Path) -> None:
    state = _state()
    future = ckpt_fast.async_save(state, place / "step", no_dist=True)
    state["weight"].zero_()
    assert future.result().staged_nbytes > 0
    into = _empty()
    ckpt_fast.load(into, place / "step", no_dist=True)
    _require_equal(into, _state())


def exchange_with_torch(place: Path) -> None:
    dcp.save(_state(), storage_writer=ckpt_fast.FastStorageWriter(place / "ours"))
    dcp.save(_state(), checkpoint_id=place / "stock")
    for reader in (dcp.FileSystemReader(place / "ours"), ckpt_fast.FastStorageReader(place / "stock")):
        into = _empty()
        dcp.load(into, storage_reader=reader)
        _require_equal(into, _state())


def look_at_it(place: Path) -> None:
    ckpt_fast.save(_state(), place / "step", no_dist=True)
    assert ckpt_fast.verify(place / "step", deep=True).is_sound
    assert "weight" in {tensor.name for tensor in ckpt_fast.inspect(place / "step").tensors}
    assert "weight" in _command("inspect", place / "step")


def convert(place: Path) -> None:
    """Into each format, and back."""
    ckpt_fast.save(_state(), place / "ours", no_dist=True)
    for form in ("safetensors", "torch_dist", "dcp"):
        _command("convert", place / "ours", place / form, "--to", form)
    _command("convert", place / "torch_dist", place / "again", "--to", "dcp")
    _command("diff", place / "ours", place / "dcp")
    _command("verify", place / "again", "--deep")
    header = (place / "safetensors" / "model.safetensors").read_bytes()
    assert b'"weight"' in header[:1000]


def measure(place: Path) -> None:
    found = json.loads(_command("doctor", place, "--json"))
    assert {each["name"] for each in found} >= {"cores", "memory", "engine", "free space"}
    assert [each for each in found if each["level"] == "broken"] == []
    _command("bench", place, "--size", "1", "--rounds", "1")
    os.environ["CKPT_FAST_METRICS"] = str(place / "saves.jsonl")
    try:
        ckpt_fast.save(_state(), place / "step", no_dist=True)
    finally:
        del os.environ["CKPT_FAST_METRICS"]
    assert json.loads((place / "saves.jsonl").read_text())["files"] >= 1


def pass_through_a_spool(place: Path) -> None:
    spool = SpoolDirectory(str(place))
    path = Path(spool.create())
    (path / "file").write_bytes(b"content")
    spool.remove()
    assert os.listdir(place) == []
