# SPDX-License-Identifier: Apache-2.0
"""Listeners hear of every save, and cannot harm it."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ckpt_fast.format.types import TensorShard
from ckpt_fast.jobs import metrics
from ckpt_fast.jobs.report import SaveReport
from tests.saves import new_save, save

pytestmark = pytest.mark.usefixtures("no_fsync")

SHARDS = [TensorShard("w", torch.arange(1000.0), (0,), (1000,))]


def test_every_save_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "saves.jsonl"
    monkeypatch.setenv("CKPT_FAST_METRICS", str(path))
    first = save(SHARDS, str(tmp_path / "a"))
    job = new_save(SHARDS, str(tmp_path / "b"), snapshot=True)
    job.stage()
    job.write()
    assert len(path.read_text().splitlines()) == 1, "the second is not committed yet"
    second = job.commit()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["directory"] for line in lines] == [first.directory, second.directory]
    assert [line["nbytes"] for line in lines] == [first.nbytes, second.nbytes]
    assert [line["rank"] for line in lines] == [0, 0]
    assert lines[0]["stall_s"] == lines[0]["seconds"] > 0
    assert 0 < lines[1]["stall_s"] < lines[1]["seconds"]
    assert {"prepare", "plan", "stage", "encode", "write", "commit"} <= set(lines[1]["steps"])


def test_listeners_come_and_go(tmp_path: Path) -> None:
    seen: list[SaveReport] = []
    leave = metrics.add_listener(seen.append)
    report = save(SHARDS, str(tmp_path / "a"))
    leave()
    save(SHARDS, str(tmp_path / "b"))
    assert seen == [report]


def test_nobody_who_listens_can_fail_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(report: SaveReport) -> None:
        raise RuntimeError("the dashboard is down")

    monkeypatch.setenv("CKPT_FAST_METRICS", str(tmp_path / "no such directory" / "saves.jsonl"))
    leave = metrics.add_listener(broken)
    with caplog.at_level(logging.WARNING):
        save(SHARDS, str(tmp_path / "a"))
    leave()
    assert (tmp_path / "a" / ".metadata").exists()
    assert "the dashboard is down" in caplog.text and "no such directory" in caplog.text


def test_steps_are_nvtx_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Showing ranges needs NVIDIA's tools; that they open and close can be checked without."""
    events = []

    class Nvtx:
        @staticmethod
        @contextlib.contextmanager
        def annotate(name: str) -> Iterator[None]:
            events.append(name)
            yield
            events.append(f"end of {name}")

    monkeypatch.setattr(metrics, "nvtx", Nvtx)
    save(SHARDS, str(tmp_path / "a"))
    for step in ("plan", "stage", "encode", "write", "commit"):
        assert events.index(f"ckpt_fast.{step}") < events.index(f"end of ckpt_fast.{step}")
