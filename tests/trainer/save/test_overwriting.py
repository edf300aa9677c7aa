# SPDX-License-Identifier: Apache-2.0
"""Saving an iteration again: the old checkpoint stays, complete in every part, until it is replaced."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ckpt_fast.errors import CheckpointError
from ckpt_fast.storage import replacement
from ckpt_fast.trainer.contents.sidecars import resume_dataloader
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer.contents.test_sidecars import Loader, iterator

CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "_exchange")


def home_of(name: str) -> Any:
    return replacement if name == "_exchange" else os


@contextlib.contextmanager
def killed_at(number: int, root: Path, left: Path) -> Iterator[None]:
    """Copy ``root`` to ``left`` before the n-th change of a directory."""
    remaining = [number]
    originals = {name: getattr(home_of(name), name) for name in CHANGES}

    def changed(name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            path = os.fspath(arguments[0])
            if not os.path.isabs(path) or path.startswith(f"{root}/"):
                remaining[0] -= 1
                if remaining[0] == -1:
                    shutil.copytree(root, left, symlinks=True)
            return originals[name](*arguments, **options)

        return call

    for name in CHANGES:
        setattr(home_of(name), name, changed(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(home_of(name), name, original)


def state_of(run: Run, number: int) -> dict[str, Any]:
    """Make everything in a checkpoint depend on the number."""
    train_state = run.state.train_state
    train_state.step, train_state.consumed_train_samples = 5, 100 + number
    with torch.no_grad():
        for parameter in run.model[0].parameters():
            parameter.fill_(number)
    return {"position": 10 * number, "samples": 100 + number}


def save(run: Run, number: int) -> None:
    found = state_of(run, number)
    run.save(train_data_iterator=iterator(Loader(found["position"])))


def number_in(run: Run, root: Path) -> int:
    """Return which save a load finds; all its parts must be from that save."""
    state_of(run, -1)
    loader = Loader(-1)
    run.checkpoint.load = str(root)
    context: dict[str, Any] = {}
    result = run.load(checkpointing_context=context)
    resume_dataloader(run.state, iterator(loader), context)
    assert result[0] == 5
    number = int(run.state.train_state.consumed_train_samples) - 100
    weights = {float(value) for each in run.model[0].parameters() for value in each.unique()}
    assert weights == {float(number)}, f"weights of {weights} with the counters of {number}"
    assert loader.position == 10 * number, f"position of {loader.position / 10} with the weights of {number}"
    return number


def kill_at_every_change(_: int, directory: str) -> list[int]:
    root, left = Path(directory, "run"), Path(directory, "left")
    found: list[int] = []
    with Run(Setup(), save=str(root)) as run:
        run.train(1)
        save(run, 1)
        shutil.copytree(root, Path(directory, "start"), symlinks=True)
        number = 0
        while True:
            shutil.rmtree(root)
            shutil.copytree(Path(directory, "start"), root, symlinks=True)
            shutil.rmtree(left, ignore_errors=True)
            with killed_at(number, root, left):
                save(run, 2)
            if not left.exists():
                break
            found.append(number_in(run, left))
            # What is left must not get in the way.
            run.checkpoint.save = str(left)
            save(run, 3)
            assert number_in(run, left) == 3
            hidden = [name for name in os.listdir(left) + os.listdir(left / "energon") if name[0] == "."]
            assert hidden == []
            run.checkpoint.save = str(root)
            number += 1
        assert number_in(run, root) == 2
    return found


def test_killed_at_every_change_of_a_directory(tmp_path: Path, no_fsync: None) -> None:
    (found,) = run_ranks(kill_at_every_change, 1, str(tmp_path), timeout_s=200)
    assert found == sorted(found) and {1, 2} == set(found) and len(found) > 15


def fail(_: int, directory: str) -> tuple[int, list[str]]:
    with Run(Setup(), save=directory) as run:
        run.train(1)
        save(run, 1)
        with pytest.raises(CheckpointError, match="cannot write"):
            state_of(run, 2)
            original = os.replace

            def replace(source: str, target: str) -> None:
                if target.endswith("train_state.pt") and "latest" not in target:
                    raise OSError(5, os.strerror(5), target)
                original(source, target)

            os.replace = replace  # type: ignore[assignment]
            try:
                save(run, 2)
            finally:
                os.replace = original
        return number_in(run, Path(directory)), sorted(os.listdir(directory))


def test_a_save_that_fails_leaves_the_old_one(tmp_path: Path, no_fsync: None) -> None:
    ((number, names),) = run_ranks(fail, 1, str(tmp_path))
    assert number == 1 and not [name for name in names if name.endswith("-new")]


def save_with_and_without_a_position(_: int, directory: str, states: str | None) -> int:
    with Run(Setup(), save=directory) as run:
        run.state.cfg.dataset = SimpleNamespace(dataloader_save=states, dataloader_load=states)
        run.train(1)
        state_of(run, 1)
        run.save()
        save(run, 2)
        save(run, 3)
        state_of(run, -1)
        run.checkpoint.load = directory
        loader, context = Loader(-1), dict[str, Any]()
        run.load(checkpointing_context=context)
        resume_dataloader(run.state, iterator(loader), context)
        return int(loader.position)


@pytest.mark.parametrize("place", ["beside", "elsewhere", "among the checkpoints"])
def test_the_position_was_not_saved_before(tmp_path: Path, no_fsync: None, place: str) -> None:
    root = tmp_path / "run"
    states = {
        "beside": None,
        "elsewhere": str(tmp_path / "new" / "states"),
        "among the checkpoints": str(root),
    }
    assert run_ranks(save_with_and_without_a_position, 1, str(root), states[place]) == [30]
    left = [
        name for _, inner, files in os.walk(tmp_path) for name in [*inner, *files] if "ckpt_fast-" in name
    ]
    assert left == []
