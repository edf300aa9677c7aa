# SPDX-License-Identifier: Apache-2.0
"""Scheduling and publishing background saves, with and without a queue."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import compat
from ckpt_fast.compat import MCoreAsyncRequest
from ckpt_fast.config import CheckpointConfig
from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.trainer.save import async_save
from ckpt_fast.trainer.save.async_save import (
    get_save_and_finalize_callbacks,
    is_empty_async_queue,
    maybe_finalize_async_save,
    schedule_async_save,
)
from tests.helpers import RankError, run_ranks


class State:
    """The part of GlobalState that these functions use."""

    def __init__(self, queue: Any = None) -> None:
        self.async_calls_queue = queue


def write(path: Path, staged: str) -> None:
    path.write_text(staged)


def append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line)


def request_to(path: Path, log: Path) -> Any:
    """Return a request that stages "staged", writes it to ``path`` and appends two lines to ``log``."""
    return MCoreAsyncRequest(
        write,
        (path, None),
        [partial(append, log, "first\n"), partial(append, log, "second\n")],
        preload_fn=lambda: "staged",
    )


CONFIG = CheckpointConfig(async_save=True, save="/nowhere")


def state(queue: Any = None) -> Any:
    return State(queue)


def test_no_queue_is_an_empty_queue() -> None:
    assert is_empty_async_queue(state())
    maybe_finalize_async_save(state(), CONFIG, blocking=True, terminate=True)


def test_a_save_is_published_when_finalised(tmp_path: Path) -> None:
    run = state(AsyncCallsQueue())
    data, log = tmp_path / "data", tmp_path / "log"
    schedule_async_save(run, request_to(data, log))
    assert not is_empty_async_queue(run)
    assert not log.exists()
    maybe_finalize_async_save(run, CONFIG, blocking=True, terminate=True)
    assert is_empty_async_queue(run)
    assert data.read_text() == "staged"
    assert log.read_text() == "first\nsecond\n"


def test_only_blocking_on_a_save_in_flight_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    run = state(AsyncCallsQueue())
    maybe_finalize_async_save(run, CONFIG, blocking=True)
    assert "Unfinalized async checkpoint saves" not in caplog.text
    schedule_async_save(run, request_to(tmp_path / "data", tmp_path / "log"))
    maybe_finalize_async_save(run, CONFIG, blocking=True)
    assert "Unfinalized async checkpoint saves" in caplog.text


def test_a_synchronous_configuration_touches_no_queue(tmp_path: Path) -> None:
    run = state(AsyncCallsQueue())
    schedule_async_save(run, request_to(tmp_path / "data", tmp_path / "log"))
    maybe_finalize_async_save(run, CheckpointConfig(), blocking=True, terminate=True)
    assert not is_empty_async_queue(run)
    maybe_finalize_async_save(run, CONFIG, blocking=True)


def test_without_a_queue_the_save_happens_at_once_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async_save._warn_without_queue.cache_clear()
    for number in range(2):
        data, log = tmp_path / f"data{number}", tmp_path / f"log{number}"
        schedule_async_save(state(), request_to(data, log))
        assert data.read_text() == "staged"
        assert log.read_text() == "first\nsecond\n"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "initialize_async_checkpoint_worker" in warnings[0].getMessage()


def save_without_queue(rank: int, directory: str) -> None:
    log = Path(directory) / f"log{rank}"
    missing = Path(directory) / ("missing" if rank == 1 else "") / f"data{rank}"
    schedule_async_save(state(), request_to(missing, log))


def test_without_a_queue_no_rank_publishes_what_another_could_not_write(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="No such file") as failure:
        run_ranks(save_without_queue, 2, str(tmp_path))
    assert failure.value.errors == {0: "AsyncSaveError", 1: "AsyncSaveError"}
    assert [path.name for path in tmp_path.iterdir()] == ["data0"]


class Writer:
    """Prepared data, as FileSystemWriterAsync returns it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def get_save_function_and_args(self) -> tuple[Any, Any, tuple[Any, ...]]:
        return write, lambda: "staged", (self.path, None)


@pytest.mark.skipif(not compat.HAVE_NVRX, reason="needs nvidia-resiliency-ext")
def test_request_of_a_prepared_writer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished: list[tuple[Any, ...]] = []
    monkeypatch.setattr(compat, "save_state_dict_async_finalize", lambda *ret: finished.append(ret))
    request = get_save_and_finalize_callbacks(Writer(tmp_path / "data"), ("writer", "metadata", "group"))
    assert isinstance(request, compat.NVRxAsyncRequest)
    run = state(AsyncCallsQueue())
    schedule_async_save(run, request)
    assert finished == []
    maybe_finalize_async_save(run, CONFIG, blocking=True)
    assert (tmp_path / "data").read_text() == "staged"
    assert finished == [("writer", "metadata", "group")]


def test_request_without_nvrx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compat, "save_state_dict_async_finalize", None)
    with pytest.raises(compat.UnavailableError, match="nvidia-resiliency-ext"):
        get_save_and_finalize_callbacks(Writer(tmp_path), ())
