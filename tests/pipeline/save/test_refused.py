# SPDX-License-Identifier: Apache-2.0
"""Invalid requests are refused on all ranks, before anything of an older checkpoint is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ckpt_fast import FastStorageWriter
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.types import TensorShard
from tests.helpers import run_ranks
from tests.pipeline.layouts import whole
from tests.pipeline.save.test_save import FILES
from tests.saves import save
from tests.test_settings import ODD

pytestmark = pytest.mark.usefixtures("no_fsync")
SETTINGS = [(name, value) for name, values in ODD.items() for value in values]


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def through_the_pipeline(directory: Path, **options: Any) -> None:
    save([whole("w", torch.ones(8))], str(directory), **FILES, **options)


def through_dcp(directory: Path, writers: int | None = None) -> None:
    dcp.save({"w": torch.ones(8)}, storage_writer=FastStorageWriter(directory, thread_count=writers))


DOORS = [(through_the_pipeline, CheckpointError), (through_dcp, CheckpointException)]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize(("door", "error"), DOORS)
@pytest.mark.parametrize(("name", "value"), SETTINGS)
def test_an_invalid_setting(
    tmp_path: Path,
    name: str,
    value: str,
    door: Callable[..., None],
    error: type[Exception],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    door(tmp_path)
    before = content(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(error, match=rf"{name}="):
        door(tmp_path)
    monkeypatch.delenv(name)
    assert content(tmp_path) == before
    door(tmp_path)


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize(("door", "error"), DOORS)
@pytest.mark.parametrize("writers", [0, -1])
def test_no_files_to_write(
    tmp_path: Path, writers: int, door: Callable[..., None], error: type[Exception]
) -> None:
    door(tmp_path)
    before = content(tmp_path)
    with pytest.raises(error, match=f"{writers} files per rank"):
        door(tmp_path, writers=writers)
    assert content(tmp_path) == before


@pytest.mark.parametrize("bound", [0, -5])
def test_no_host_memory(tmp_path: Path, bound: int) -> None:
    through_the_pipeline(tmp_path)
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match=f"a bound of {bound} bytes"):
        through_the_pipeline(tmp_path, host_buffer=bound)
    assert content(tmp_path) == before


def odd_on_one_rank(rank: int, directory: str, name: str, value: str) -> list[str]:
    """Return what each door raises on this rank if rank 1 has an invalid setting."""
    if rank == 1:
        os.environ[name] = value
    shard = TensorShard("w", torch.ones(1, 8), (rank, 0), (2, 8))
    texts = []
    try:
        save([shard], directory, **(FILES if rank == 0 else {}))
    except CheckpointError as error:
        texts.append(str(error))
    try:
        dcp.save({f"w{rank}": torch.ones(8)}, storage_writer=FastStorageWriter(directory))
    except CheckpointException as error:
        texts.append(f"{sorted(error.failures)}: {name in str(error)}")
    dist.barrier()
    return texts


@pytest.mark.parametrize(
    ("name", "value"),
    [("HOST_BUFFER", "0"), ("NATIVE", "yes"), ("STAGING", "gpu"), ("THREADS", "0"), ("TIMEOUT", "0")],
)
def test_an_invalid_setting_on_one_rank(tmp_path: Path, name: str, value: str) -> None:
    through_the_pipeline(tmp_path)
    before = content(tmp_path)
    first, second = run_ranks(odd_on_one_rank, 2, str(tmp_path), f"CKPT_FAST_{name}", value, timeout_s=30)
    assert first == second and len(first) == 2
    assert first[0].startswith("rank 1: ") and f"CKPT_FAST_{name}=" in first[0]
    assert first[1] == "[1]: True"
    assert content(tmp_path) == before
