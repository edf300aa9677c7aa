# SPDX-License-Identifier: Apache-2.0
"""The timeline: whole after a crash and several runs, in order, of all ranks, and no harm to a save."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt_fast
from ckpt_fast.format.types import TensorShard
from ckpt_fast.jobs import trace
from ckpt_fast.pipeline.save import seal
from tests.helpers import preloaded_processes, run_ranks
from tests.saves import new_save, save

pytestmark = pytest.mark.usefixtures("no_fsync")

SHARDS = [TensorShard("w", torch.arange(100_000.0), (0,), (100_000,))]


def events_of(path: Path) -> list[dict[str, Any]]:
    """The events, read as the format says: the array need not be closed."""
    text = path.read_text()
    assert text.endswith(",\n")
    events: list[dict[str, Any]] = json.loads(text[:-2] + "]")
    return events


def spans_of(events: list[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """(thread, name, begin, end) of every block; each ends in its thread before what it is in does."""
    threads = {
        (event["pid"], event["tid"]): event["args"]["name"]
        for event in events
        if event["ph"] == "M" and event["name"] == "thread_name"
    }
    spans, open_ones = [], defaultdict(list)
    for event in events:
        row = (event["pid"], event["tid"])
        if event["ph"] == "B":
            open_ones[row].append(event)
        elif event["ph"] == "E":
            begin = open_ones[row].pop()
            spans.append((threads[row], begin["name"], begin["ts"], event["ts"]))
    assert [each for left in open_ones.values() for each in left] == []
    return spans


@pytest.fixture
def timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CKPT_FAST_TRACE", str(tmp_path / "timeline.json"))
    return tmp_path / "timeline.json"


def test_a_background_save_is_shown_by_thread(timeline: Path, tmp_path: Path) -> None:
    job = new_save(SHARDS, str(tmp_path / "a"), snapshot=True)
    job.stage()
    job.write()
    job.commit()
    spans = {name: (thread, begin, end) for thread, name, begin, end in spans_of(events_of(timeline))}
    assert {"save", "prepare", "collect", "plan", "stage", "encode", "write", "commit", "publish"} <= set(
        spans
    )
    assert spans["stage"][0] == "MainThread" and spans["write"][0] == "ckpt_fast-write"
    outer, inner = spans["save"], spans["stage"]
    assert outer[1] <= inner[1] <= inner[2] <= outer[2]
    assert spans["write"][2] <= spans["publish"][1], "it is published once it is written"


def test_what_was_written_and_read_is_shown_with_its_bytes(timeline: Path, tmp_path: Path) -> None:
    state = {"w": torch.arange(100_000.0)}
    ckpt_fast.save(state, tmp_path / "a", no_dist=True)
    ckpt_fast.load(state, tmp_path / "a", no_dist=True)
    events = events_of(timeline)
    facts = {event["name"]: event["args"] for event in events if event["ph"] == "B"}
    assert facts["save"]["directory"] == facts["load"]["directory"] == str(tmp_path / "a")
    for name in ("write", "read"):
        assert facts[name]["nbytes"] >= 400_000 and facts[name]["files"] == 1
    assert {"plan", "place"} <= set(facts)
    for name in ("written", "read"):
        rates = [event["args"]["MB/s"] for event in events if event["ph"] == "C" and event["name"] == name]
        assert max(rates) > 0 and rates[-1] == 0


def save_as_rank(rank: int, directory: str) -> None:
    ckpt_fast.save({"w": torch.full((1000,), float(rank))}, directory)


def test_ranks_are_processes_in_one_file(timeline: Path, tmp_path: Path) -> None:
    run_ranks(save_as_rank, 2, str(tmp_path / "a"))
    events = events_of(timeline)
    names = {event["pid"]: event["args"]["name"] for event in events if event.get("name") == "process_name"}
    assert sorted(names) == [0, 1]
    assert all(name.startswith(f"rank {rank} (") for rank, name in names.items())
    spans_of(events)
    times = [event["ts"] for event in events if "ts" in event]
    assert max(times) - min(times) < 60e6, "the clocks of two ranks have one origin"


def test_later_runs_are_added(timeline: Path, tmp_path: Path) -> None:
    save(SHARDS, str(tmp_path / "a"))
    first = events_of(timeline)
    code = "import sys, torch, ckpt_fast; ckpt_fast.save({'w': torch.ones(9)}, sys.argv[1], no_dist=True)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "b")], check=True)
    both = events_of(timeline)
    assert both[: len(first)] == first
    saved = [event["args"]["directory"] for event in both if event["ph"] == "B" and event["name"] == "save"]
    assert saved == [str(tmp_path / "a"), str(tmp_path / "b")]


def save_and_be_killed(environment: dict[str, str], root: str) -> None:
    os.environ.update(environment)
    ckpt_fast.save({"w": torch.ones(9)}, f"{root}/a", no_dist=True)
    seal.seal = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    ckpt_fast.save({"w": torch.ones(9)}, f"{root}/b", no_dist=True)


def test_what_was_under_way_when_the_process_was_killed_is_shown(timeline: Path, tmp_path: Path) -> None:
    process = preloaded_processes().Process(target=save_and_be_killed, args=(dict(os.environ), str(tmp_path)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    begun = [event for event in events_of(timeline) if event["ph"] in "BE"]
    open_ones: list[str] = []
    for event in begun:
        if event["ph"] == "B":
            open_ones.append(event["name"])
        elif event["tid"] == begun[0]["tid"]:
            open_ones.pop()
    assert open_ones[-1] == "publish"


def test_an_empty_file_may_be_there(timeline: Path, tmp_path: Path) -> None:
    timeline.touch()
    save(SHARDS, str(tmp_path / "a"))
    assert events_of(timeline)


def test_a_file_that_cannot_be_written_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CKPT_FAST_TRACE", str(tmp_path / "no such directory" / "timeline.json"))
    with caplog.at_level(logging.WARNING, logger="ckpt_fast.jobs.trace"):
        save(SHARDS, str(tmp_path / "a"))
    assert (tmp_path / "a" / ".metadata").exists()
    assert len(caplog.records) == 1 and "no such directory" in caplog.text


def test_a_full_disk_ends_the_timeline_and_not_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CKPT_FAST_TRACE", "/dev/full")
    monkeypatch.setattr(os.path, "getsize", lambda path, real=os.path.getsize: real(path) or 1)
    with caplog.at_level(logging.WARNING, logger="ckpt_fast.jobs.trace"):
        save(SHARDS, str(tmp_path / "a"))
    assert (tmp_path / "a" / ".metadata").exists()
    assert [record.message for record in caplog.records] == [
        "the timeline in /dev/full ends here: No space left on device"
    ]


def test_without_the_variable_nothing_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_FAST_TRACE", raising=False)
    monkeypatch.setattr(trace, "Trace", lambda path: pytest.fail(f"{path} was opened"))
    save(SHARDS, str(tmp_path / "a"))
    assert os.listdir(tmp_path) == ["a"]


def test_a_span_that_fails_ends(timeline: Path) -> None:
    with pytest.raises(ZeroDivisionError), trace.span("outer"), trace.span("inner", what=object()):
        _ = 1 / 0
    assert [name for _, name, _, _ in spans_of(events_of(timeline))] == ["inner", "outer"]
