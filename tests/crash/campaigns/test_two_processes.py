# SPDX-License-Identifier: Apache-2.0
"""Two processes that save to one directory at once: what a third loads is complete, or is refused."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from ckpt_fast import native
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from tests.pipeline.layouts import whole
from tests.saves import save

SHAPE = (3, 100_000)  # blocks of the manifest and chunks from several saves


def save_often(directory: str, numbers: range) -> None:
    for number in numbers:
        shards = [whole(name, torch.full(SHAPE, float(number))) for name in "abc"]
        # Files of the other process vanish: either the save or the load notices.
        with contextlib.suppress(CheckpointError):
            save(shards, directory, seal_files={"metadata.json": b"{}"})


def save_often_with(implementation: native.Implementation, directory: str, numbers: range) -> None:
    os.environ["CKPT_FAST_FSYNC"] = "0"
    with native.using(implementation):
        save_often(directory, numbers)


def load(directory: str) -> float | None:
    """Return the number that all tensors equal; None if there is no checkpoint or it is refused."""
    tensors = [torch.zeros(SHAPE) for _ in "abc"]
    try:
        index = CheckpointIndex(directory)
        load_tensors(index, [TensorRequest(n, t, (0, 0)) for n, t in zip("abc", tensors, strict=True)])
    except CheckpointError:
        return None
    numbers = {float(number) for tensor in tensors for number in (tensor.min(), tensor.max())}
    assert len(numbers) == 1, f"a mixture of saves {numbers}"
    return numbers.pop()


def overwrite_each_other(directory: str, saves: int, implementation: native.Implementation) -> Counter[str]:
    # Forked from a process that has imported torch and has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    children = [
        context.Process(target=save_often_with, args=(implementation, directory, range(first, first + saves)))
        for first in (0, 1_000_000)
    ]
    counts: Counter[str] = Counter()
    for child in children:
        child.start()
    while any(child.is_alive() for child in children):
        counts["refused" if load(directory) is None else "whole"] += 1
    assert [child.exitcode for child in children] == [0, 0], "a process that saves has failed"
    # Nobody interferes any more.
    save_often(directory, range(7, 8))
    assert load(directory) == 7
    return counts


@pytest.mark.parametrize("implementation", ["engine", "fallback"])
def test_what_is_loaded_is_whole(
    tmp_path: Path, no_fsync: None, implementation: native.Implementation
) -> None:
    with native.using(implementation):
        assert overwrite_each_other(str(tmp_path / "c"), 15, implementation).total()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["engine", "fallback"])
def test_what_is_loaded_is_whole_a_thousand_times(
    tmp_path: Path, no_fsync: None, implementation: native.Implementation
) -> None:
    with native.using(implementation):
        counts = overwrite_each_other(str(tmp_path / "c"), 1000, implementation)
    assert counts["whole"] and counts["refused"]
