# SPDX-License-Identifier: Apache-2.0
"""A load reads its checkpoint once: each rank opens and decodes the files it needs exactly once."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ckpt_fast import compat, native
from ckpt_fast.doors.megatron import common_state
from ckpt_fast.pipeline.load import decode
from tests.helpers import run_ranks, uninstall_rng_tracker
from tests.models import FLOPS, Run, Setup
from tests.trainer import training
from tests.trainer.contents.test_fsdp_runs import Training

SETUP = Setup(bf16=True, distributed=True)
COLLECTIVES = [
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_object",
    "all_reduce",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "gather",
    "gather_object",
    "scatter_object_list",
]
SMALL_FILES = [".metadata", "metadata.json", "common.pt", "run_config.yaml", "train_state.pt"]


class Watch:
    """What a process does with the files of a directory.

    Attributes:
        opened: how often each file was opened, by its name below the directory.
        extents: (file, offset, length) of everything the engine was told to read.
        calls: how often ``.metadata`` was unpickled, ``common.pt`` decoded, and a collective made.
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.opened: Counter[str] = Counter()
        self.extents: list[tuple[str, int, int]] = []
        self.calls: Counter[str] = Counter()

    def note(self, path: object) -> None:
        if not isinstance(path, str | os.PathLike) or not os.fspath(path).startswith(self.directory + "/"):
            return
        if os.path.exists(path):
            self.opened[os.path.relpath(path, self.directory)] += 1

    def counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            self.calls[name] += 1
            return function(*args, **options)

        return wrapped

    def reading(self, read_extents: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(paths: list[str], *columns: Any, **options: Any) -> Any:
            for path in paths:
                self.note(path)
            self.extents += [(paths[file], *place) for file, *place in zip(*columns[:3], strict=True)]
            return read_extents(paths, *columns, **options)

        return wrapped


@functools.cache
def _watches() -> list[Watch]:
    """Return the active watches. Python's audit hooks cannot be removed."""
    watches: list[Watch] = []

    def audit(event: str, args: tuple[Any, ...]) -> None:
        if event == "open":
            for watch in watches:
                watch.note(args[0])

    sys.addaudithook(audit)
    return watches


@contextlib.contextmanager
def watched(directory: str) -> Iterator[Watch]:
    watch = Watch(directory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "read_extents", watch.reading(native.read_extents))
        for module, name in (
            (decode, "unpickle_metadata"),
            (common_state, "decode_object"),
            *((torch.distributed, name) for name in COLLECTIVES),
        ):
            patch.setattr(module, name, watch.counted(name, getattr(module, name)))
        _watches().append(watch)
        try:
            yield watch
        finally:
            _watches().remove(watch)


def overlaps(extents: list[tuple[str, int, int]]) -> list[tuple[str, int]]:
    """Return the positions at which something is read that was already read."""
    found, ends = [], {"": 0}
    for path, offset, nbytes in sorted(extents):
        if offset < ends.get(path, 0):
            found.append((path, offset))
        ends[path] = max(ends.get(path, 0), offset + nbytes)
    return found


def load(rank: int, root: str, config: dict[str, Any]) -> tuple[Any, Watch]:
    with Run(SETUP, load=root, **config) as run, watched(root) as watch:
        return run.load(), watch


def require_once(watch: Watch, directory: str, names: list[str], unpickled: int = 0) -> None:
    small = {name: count for name, count in watch.opened.items() if not name.endswith(".distcp")}
    assert {name: count for name, count in small.items() if count > 1} == {}
    assert {name for name in small if name.startswith(directory)} == {f"{directory}/{name}" for name in names}
    assert watch.calls["unpickle_metadata"] == unpickled  # the table suffices
    assert overlaps(watch.extents) == []


@pytest.mark.parametrize("config", [{}, {"dist_ckpt_strictness": "log_all"}], ids=["default", "strict"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_torch_dist(tmp_path: Path, ranks: int, config: dict[str, Any]) -> None:
    root = str(tmp_path / "run")
    run_ranks(training.save_steps, ranks, SETUP, root, 1, {})
    for rank, (result, watch) in enumerate(run_ranks(load, ranks, root, config)):
        assert result == (1, float(FLOPS))
        # What rank 0 alone decides, it alone reads.
        require_once(watch, "iter_0000001", SMALL_FILES if rank == 0 else SMALL_FILES[:3])
        assert watch.calls["decode_object"] == 1
        if ranks > 1:
            # One of them hands over what rank 0 has read of .metadata.
            assert sum(watch.calls[name] for name in COLLECTIVES) <= 19


def save_fsdp(rank: int, root: str) -> None:
    Training(save=root).save()
    uninstall_rng_tracker()


def load_fsdp(rank: int, root: str) -> Watch:
    run = Training(seed=5, load=root)
    with watched(root) as watch:
        run.load()
    uninstall_rng_tracker()
    return watch


@pytest.mark.skipif(not compat.HAVE_MEGATRON_FSDP, reason="needs Megatron FSDP")
def test_fsdp_dtensor(tmp_path: Path) -> None:
    root = str(tmp_path / "run")
    run_ranks(save_fsdp, 2, root)
    for rank, watch in enumerate(run_ranks(load_fsdp, 2, root)):
        names = [".metadata", "run_config.yaml", "train_state.pt"]
        require_once(
            watch, "iter_0000001", names if rank == 0 else names[:1], unpickled=1
        )  # for torch's planner
