# SPDX-License-Identifier: Apache-2.0
"""Each call that changes the disk fails once, or is the last thing the process does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import native
from ckpt_fast.errors import CheckpointError
from tests.crash.states.faults import Faults, die, fail, tear
from tests.crash.states.scenario import check, is_published, save_iteration, tracked, train
from tests.helpers import preloaded_processes

# The iteration whose save meets the fault, and the ones before it. Even ones save in the background.
SAVES = {"foreground": (5, [3, 4]), "background": (4, [2, 3]), "over itself": (5, [4, 5])}


def before_the_save(directory: str, kind: str) -> str:
    """Return a copy of the run as it is before the faulty save, to be copied again."""
    start = os.path.join(directory, "start")
    os.mkdir(start)
    for iteration in SAVES[kind][1]:
        save_iteration(start, iteration)
    return start


def copy_run(start: str) -> str:
    root = os.path.join(os.path.dirname(start), "run")
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(start, root)
    return root


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        *((kind, "engine") for kind in SAVES),
        pytest.param("foreground", "fallback", marks=pytest.mark.long),
    ],
)
def test_every_call_fails(
    tmp_path: Path, kind: str, implementation: native.Implementation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_RETRIES", "0")
    with native.using(implementation):
        start = before_the_save(str(tmp_path), kind)
        counted, iteration, root = Faults(None, fail), SAVES[kind][0], copy_run(start)
        with counted.injected():
            save_iteration(root, iteration)
        assert counted.count > 15, "too few calls to be all of a save's"
        for number in range(counted.count):
            root = copy_run(start)
            before = tracked(root)
            try:
                with Faults(number, fail).injected():
                    save_iteration(root, iteration)
            except CheckpointError as error:
                assert "Input/output error" in str(error), "the cause is not named"
                # The last call makes the tracker's new content durable, which is already in place by then.
                assert check(root) == (iteration if number == counted.count - 1 else before)
            else:
                assert kind == "over itself", "only what is left of a checkpoint that was replaced may stay"
            save_iteration(root, iteration)
            assert check(root) == iteration and is_published(root, iteration)
            left = [name for _, _, names in os.walk(root) for name in names if name.endswith(".partial")]
            assert left == []


@pytest.mark.parametrize(
    ("fault", "implementation", "kinds"),
    [
        (die, "engine", ["over itself"]),
        pytest.param(die, "engine", ["foreground", "background"], marks=pytest.mark.long),
        pytest.param(tear, "fallback", [*SAVES], marks=pytest.mark.long),
    ],
)
def test_the_process_ends_at_every_call(
    tmp_path: Path, fault: Callable[..., Any], implementation: native.Implementation, kinds: list[str]
) -> None:
    # In a process without threads, which may fork.
    arguments = (dict(os.environ), str(tmp_path), fault, implementation, kinds)
    process = preloaded_processes().Process(target=end_all_saves, args=arguments)
    process.start()
    process.join()
    assert process.exitcode == 0, "see the traceback on stderr"


def end_all_saves(
    environment: dict[str, str],
    directory: str,
    fault: Callable[..., Any],
    implementation: native.Implementation,
    kinds: list[str],
) -> None:
    os.environ.clear()  # it is that of the test which started the first such process
    os.environ.update(environment)
    for kind in kinds:
        os.mkdir(os.path.join(directory, kind))
        end_at_every_call(os.path.join(directory, kind), kind, fault, implementation)


def end_at_every_call(
    directory: str, kind: str, fault: Callable[..., Any], implementation: native.Implementation
) -> None:
    iteration, number, done = SAVES[kind][0], 0, os.path.join(directory, "done")
    with native.using(implementation):
        forked(before_the_save, directory, kind)
        while not os.path.exists(done):
            root = copy_run(os.path.join(directory, "start"))
            before = tracked(root)
            forked(save_until, root, iteration, number, fault, done)
            assert check(root) in (before, iteration)
            # The remains of the crash must not get in the way.
            forked(train_without_syncing, root)
            assert check(root) > before
            number += 1
    assert number > 15, "too few calls to be all of a save's"


def save_until(root: str, iteration: int, number: int, fault: Callable[..., Any], done: str) -> None:
    with Faults(number, fault).injected():
        save_iteration(root, iteration)
    with open(done, "w"):
        pass


def train_without_syncing(root: str) -> None:
    os.environ["CKPT_FAST_FSYNC"] = "0"
    train(root, 1)


def forked(action: Callable[..., Any], *arguments: Any) -> None:
    """Run ``action`` in a fork of this process, which thereby stays without threads."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action(*arguments)
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, "the child failed"
