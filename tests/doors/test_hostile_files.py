# SPDX-License-Identifier: Apache-2.0
"""Special files and bombs in a checkpoint, through every door, are refused at once without blocking."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from ckpt_fast import FastLoadStrategy, FastSaveStrategy
from ckpt_fast.doors.dcp import FastStorageReader, FastStorageWriter
from ckpt_fast.doors.megatron.common_state import is_sealed, load_common_state_dict
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError
from tests.helpers import run_ranks
from tests.models import Run, Setup, megatron_on_cpu
from tests.pipeline.load.test_hostile import BOMBS
from tests.storage.test_small_files import LAUGHS, SPECIAL, make_special

SETUP = Setup()


def replace_by(path: Path, kind: str) -> None:
    path.unlink()
    make_special(path, kind)


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.parametrize("writer", ["ours", "stock"])
@pytest.mark.filterwarnings("ignore")
def test_dcp(tmp_path: Path, writer: str, name: str, kind: str) -> None:
    state = {"w": torch.ones(3), "o": "object"}
    if writer == "ours":
        dcp.save(state, storage_writer=FastStorageWriter(tmp_path))
    else:
        dcp.save(state, checkpoint_id=tmp_path)
    replace_by(tmp_path / name, kind)
    begin = time.monotonic()
    # DCP wraps its reader's exceptions and keeps their text.
    with pytest.raises(BaseException, match=rf"{name} is a {kind}|it is a {kind}|Is a directory"):
        dcp.load({"w": torch.zeros(3), "o": ""}, storage_reader=FastStorageReader(tmp_path))
    assert time.monotonic() - begin < 5


def sharded(value: float) -> dict[str, Any]:
    return {
        "w": ShardedTensor.from_rank_offsets("w", torch.full((3,), value)),
        "o": ShardedObject("o", value, (1,), (0,)),
        "common": value,
    }


def load_with_strategy(rank: int, root: str, names: list[tuple[str, str]]) -> dict[str, tuple[str, float]]:
    """Load with every name replaced by each kind of special file; return the outcomes and durations."""
    found = {}
    os.mkdir(root)
    dist_checkpointing.save(sharded(1.0), root, FastSaveStrategy())
    for name, kind in names:
        path = Path(root, name)
        content = path.read_bytes()
        replace_by(path, kind)
        begin = time.monotonic()
        try:
            with megatron_on_cpu():
                dist_checkpointing.load(sharded(0.0), root, FastLoadStrategy())
            outcome = "loaded"
        except CheckpointError as error:
            outcome = f"{type(error).__name__}: {error}"
        found[f"{name} {kind}"] = (outcome, time.monotonic() - begin)
        path.rmdir() if kind == "directory" else path.unlink()
        path.write_bytes(content)
    return found


def test_load_strategy(tmp_path: Path) -> None:
    # Megatron-Core opens common.pt itself before it calls a strategy.
    names = [(name, kind) for name in (".metadata", "__0_0.distcp") for kind in SPECIAL]
    (found,) = run_ranks(load_with_strategy, 1, str(tmp_path / "run"), names)
    for case, (outcome, seconds) in found.items():
        kind = case.split()[1]
        assert outcome.startswith("CheckpointCorruptError"), case
        assert f"is a {kind}" in outcome or "Is a directory" in outcome, outcome
        assert seconds < 5, case


@pytest.mark.parametrize("kind", SPECIAL)
def test_seal(tmp_path: Path, kind: str) -> None:
    make_special(tmp_path / "metadata.json", kind)
    for look in (is_sealed, load_common_state_dict):
        with pytest.raises(CheckpointCorruptError, match=rf"metadata\.json is a {kind}"):
            look(str(tmp_path))


@pytest.mark.parametrize("content", [b"[" * 1_000_000, b"[]", b"null"], ids=["deep", "list", "null"])
def test_invalid_seal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "metadata.json").write_bytes(content)
    with pytest.raises(CheckpointCorruptError, match=r"metadata\.json cannot be parsed"):
        is_sealed(str(tmp_path))


def save_run(rank: int, root: str) -> None:
    with Run(SETUP, save=root) as run:
        run.train(1)
        run.save()


def load_runs(rank: int, roots: list[str]) -> list[tuple[str, float]]:
    found = []
    with Run(SETUP) as run:
        run.train(1)
        for root in roots:
            run.checkpoint.load = root
            begin = time.monotonic()
            try:
                run.load()
                outcome = "loaded"
            except Exception as error:
                outcome = f"{type(error).__name__}: {error}"
            found.append((outcome, time.monotonic() - begin))
    return found


def test_load_checkpoint(tmp_path: Path) -> None:
    """Whatever the content is, and whether or not another file has the same data, the error comes at once."""
    run_ranks(save_run, 1, str(tmp_path / "run"))
    names = [
        os.path.relpath(path, tmp_path / "run") for path in (tmp_path / "run").rglob("*") if path.is_file()
    ]
    assert {"iter_0000001/run_config.yaml", "iter_0000001/train_state.pt"} < set(names)
    cases = [(name, kind) for name in names for kind in (*SPECIAL, "bomb")]
    roots = []
    for number, (name, kind) in enumerate(cases):
        root = shutil.copytree(tmp_path / "run", tmp_path / str(number))
        if kind == "bomb":
            (root / name).write_bytes(LAUGHS if name.endswith("yaml") else BOMBS["memo"]())
        else:
            replace_by(root / name, kind)
        roots.append(str(root))
    (found,) = run_ranks(load_runs, 1, roots)
    for (name, kind), (outcome, seconds) in zip(cases, found, strict=True):
        assert seconds < 5, (name, kind)
        # One tracker is enough; everything else must be there.
        if not name.startswith("latest"):
            assert outcome != "loaded" and "MemoryError" not in outcome, (name, kind, outcome)
