# SPDX-License-Identifier: Apache-2.0
"""A load comes from one save, whoever saves to the same place meanwhile, and opens each file once."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import FastLoadStrategy, FastSaveStrategy, FastStorageReader, native
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.errors import CheckpointCorruptError, CheckpointError
from tests.doors.dcp import overwriting
from tests.helpers import preloaded_processes

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]
IMPLEMENTATIONS = ["engine", "fallback"]

# inotify(7)
_IN_CLOSE_NOWRITE, _IN_OPEN, _IN_ISDIR = 0x10, 0x20, 0x40000000
_EVENT = struct.Struct("iIII")


@contextlib.contextmanager
def opens_in(directory: Path) -> Iterator[collections.Counter[str]]:
    """Count how often each file of a directory is opened, according to the kernel; filled in on exit.

    The kernel merges equal consecutive events. Closing is counted too, so two opens are merged only if
    nothing is closed or opened in between.
    """
    counts: collections.Counter[str] = collections.Counter()
    library = ctypes.CDLL(None, use_errno=True)
    watching = library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    assert watching >= 0, os.strerror(ctypes.get_errno())
    try:
        mask = _IN_OPEN | _IN_CLOSE_NOWRITE
        assert library.inotify_add_watch(watching, os.fsencode(directory), mask) >= 0
        yield counts
        events = os.read(watching, 1 << 20)
    finally:
        os.close(watching)
    at = 0
    while at < len(events):
        _, mask, _, nbytes = _EVENT.unpack_from(events, at)
        at += _EVENT.size
        name = events[at : at + nbytes].rstrip(b"\0").decode()
        at += nbytes
        if mask & _IN_OPEN and not mask & _IN_ISDIR:
            counts[name] += 1


def sharded(value: float) -> dict[str, Any]:
    return {
        "a": ShardedTensor.from_rank_offsets("a", torch.full((64, 32), value)),
        "b": ShardedTensor.from_rank_offsets("b", torch.full((300,), value).bfloat16()),
        "c": ShardedObject("c", int(value), (1,), (0,)),
        "common": int(value),
    }


def save_sharded(directory: str, value: float) -> None:
    job = torch_dist.start_save(sharded(value), directory, FastSaveStrategy(thread_count=2))
    job.write()
    job.commit()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("writer", ["ours", "ours-2-files"])
def test_dcp_opens_each_file_once(writer: str, implementation: Any, tmp_path: Path) -> None:
    overwriting.save(str(tmp_path), writer, 3)
    into = overwriting.state(0)
    into["half"] = into["half"].float()  # converted, so it is read into a buffer first
    with native.using(implementation), opens_in(tmp_path) as opens:
        dcp.load(into, storage_reader=FastStorageReader(tmp_path), no_dist=True)
    assert opens == dict.fromkeys(os.listdir(tmp_path), 1)
    assert values_of(into) == {3.0}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("strict", ["assume_ok_unexpected", "raise_all"])
def test_megatron_core_opens_each_file_once(strict: str, implementation: Any, tmp_path: Path) -> None:
    save_sharded(str(tmp_path), 3.0)
    with native.using(implementation), opens_in(tmp_path) as opens:
        loaded = torch_dist.load(sharded(0.0), str(tmp_path), strict=strict)
    # Read to see whether the checkpoint is sealed and which backend wrote it, before it is loaded.
    assert opens.pop("metadata.json") <= 3
    assert opens == dict.fromkeys(set(os.listdir(tmp_path)) - {"metadata.json"}, 1)
    assert (loaded["c"], loaded["common"], values_of(loaded)) == (3, 3, {3.0})


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_our_load_strategy_opens_each_file_once(implementation: Any, tmp_path: Path) -> None:
    save_sharded(str(tmp_path), 3.0)
    with native.using(implementation), opens_in(tmp_path) as opens:
        loaded = dist_checkpointing.load(
            sharded(0.0), str(tmp_path), FastLoadStrategy(), validate_access_integrity=False
        )
    ours = [name for name in os.listdir(tmp_path) if name.endswith(".distcp")] + [".metadata"]
    assert {name: opens[name] for name in ours} == dict.fromkeys(ours, 1)
    assert (loaded["c"], values_of(loaded)) == (3, {3.0})


def test_common_state_of_another_save(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for directory, value in ((one, 1.0), (other, 2.0)):
        directory.mkdir()
        save_sharded(str(directory), value)
    os.replace(other / "common.pt", one / "common.pt")
    with pytest.raises(CheckpointCorruptError, match=r"common.pt is damaged, or of another save than \w+"):
        torch_dist.load(sharded(0.0), str(one))


def values_of(loaded: dict[str, Any]) -> set[float]:
    """Return all values in what was loaded."""
    found: set[float] = set()
    for value in loaded.values():
        found |= set(value.float().unique().tolist()) if isinstance(value, torch.Tensor) else {float(value)}
    return found


@contextlib.contextmanager
def saving(directory: Path, writer: str, manner: str) -> Iterator[None]:
    """Let another process save in a loop."""
    overwriting.save(str(directory), writer, 1)
    process = preloaded_processes().Process(target=overwriting.main, args=(str(directory), writer, manner))
    process.start()
    try:
        yield
        assert process.is_alive(), "the other process has failed"
    finally:
        process.kill()
        process.join()


def is_ours(error: Exception) -> bool:
    """Return whether the error blames the checkpoint. Without metadata, torch raises one for us."""
    failures = [each for each, _ in getattr(error, "failures", {0: (error, None)}).values()]
    return all(isinstance(each, CheckpointError) or "metadata is None" in str(each) for each in failures)


def race(directory: Path, writer: str, manner: str, implementation: Any, loads: int) -> dict[str, int]:
    """Load while another process saves. Return how many loads were of one save, failed, or mixed saves."""
    ends: collections.Counter[str] = collections.Counter()
    seen: set[float] = set()
    with native.using(implementation), saving(directory, writer, manner):
        while ends.total() < loads or len(seen) < 2:
            into = overwriting.state(0)
            try:
                dcp.load(into, storage_reader=FastStorageReader(directory), no_dist=True)
            except (CheckpointException, CheckpointError) as error:
                assert is_ours(error), error
                ends["error"] += 1
                continue
            values = values_of(into)
            ends["one save" if len(values) == 1 and values != {0.0} else "mixed"] += 1
            seen |= values
    return dict(ends)


MANNERS = [
    ("ours", "in place"),
    ("ours-2-files", "in place"),
    ("ours", "beside"),
    ("ours-2-files", "beside"),
    ("stock", "in place"),
    ("stock", "beside"),
]


@pytest.mark.parametrize(
    ("writer", "manner", "implementation"),
    [
        ("ours", "in place", "engine"),
        ("ours-2-files", "beside", "fallback"),
        ("stock", "in place", "fallback"),
        ("stock", "beside", "engine"),
    ],
)
def test_loads_while_another_process_saves(
    writer: str, manner: str, implementation: str, tmp_path: Path
) -> None:
    ends = race(tmp_path / "checkpoint", writer, manner, implementation, 40)
    assert "mixed" not in ends


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("writer", "manner"), MANNERS)
def test_a_thousand_loads_while_another_process_saves(
    writer: str, manner: str, implementation: str, tmp_path: Path
) -> None:
    ends = race(tmp_path / "checkpoint", writer, manner, implementation, 1000)
    logging.getLogger(__name__).warning("%s, %s, %s: %s", writer, manner, implementation, ends)
    assert "mixed" not in ends
