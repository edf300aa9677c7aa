# SPDX-License-Identifier: Apache-2.0
"""Failures on one rank become the same failure on all, over real gloo groups."""

from __future__ import annotations

import errno
import threading
from typing import Any

import pytest
import torch.distributed as dist

from ckpt_fast.errors import (
    AsyncSaveError,
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointWriteError,
    UnsafeCheckpointError,
)
from ckpt_fast.ranks import group as module
from ckpt_fast.ranks.group import ControlGroup
from tests.helpers import run_ranks


class OddError(CheckpointMismatchError):
    """An error that other processes cannot rebuild: another constructor, and a lock inside."""

    def __init__(self, a: str, b: str) -> None:
        super().__init__(f"{a} and {b}")
        self.lock = threading.Lock()


def fail(kind: str) -> None:
    """Raise an error of this kind."""
    if kind == "write":
        raise CheckpointWriteError("disk is full", errno.ENOSPC, "/data/file")
    if kind == "odd":
        raise OddError("this", "that")
    if kind == "unpicklable":
        raise CheckpointCorruptError("broken", threading.Lock())
    if kind == "foreign":
        raise ZeroDivisionError("by zero")
    raise {
        "base": CheckpointError,
        "not found": CheckpointNotFoundError,
        "corrupt": CheckpointCorruptError,
        "mismatch": CheckpointMismatchError,
        "unsafe": UnsafeCheckpointError,
        "async": AsyncSaveError,
    }[kind]("it went wrong")


def caught(action: Any) -> tuple[str, str, Any, Any]:
    try:
        action()
    except CheckpointError as error:
        return (
            type(error).__name__,
            str(error),
            getattr(error, "errno", None),
            getattr(error, "filename", None),
        )
    raise AssertionError("nothing was raised")


KINDS = {
    "base": "CheckpointError",
    "not found": "CheckpointNotFoundError",
    "corrupt": "CheckpointCorruptError",
    "mismatch": "CheckpointMismatchError",
    "unsafe": "UnsafeCheckpointError",
    "async": "AsyncSaveError",
    "write": "CheckpointWriteError",
    "odd": "CheckpointMismatchError",
    "unpicklable": "CheckpointCorruptError",
    "foreign": "CheckpointError",
}
TEXTS = {
    "write": "disk is full",
    "odd": "this and that",
    "unpicklable": "('broken', <unlocked _thread.lock",
    "foreign": "ZeroDivisionError: by zero",
}


def agree_in_turn(rank: int, failing: list[tuple[str, list[int]]]) -> list[Any]:
    group = ControlGroup()
    found = []
    for kind, ranks in failing:
        found.append(caught(lambda k=kind, r=ranks: group.agree(lambda: fail(k) if rank in r else None)))
    assert group.agree(lambda: rank * 10) == rank * 10, "the group is out of step"
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_an_error_of_any_kind_on_any_rank_reaches_every_rank(world_size: int) -> None:
    cases = [(kind, [rank]) for kind in KINDS for rank in range(world_size)]
    results = run_ranks(agree_in_turn, world_size, cases)
    for (kind, (failed,)), *seen in zip(cases, *results, strict=True):
        assert all(result == seen[0] for result in seen), "ranks raised different errors"
        name, text, number, filename = seen[0]
        assert name == KINDS[kind]
        assert text.startswith(f"rank {failed}: {TEXTS.get(kind, 'it went wrong')}")
        if kind == "write":
            assert (number, filename) == (errno.ENOSPC, "/data/file")


def wait_alone(rank: int) -> bool:
    if rank == 0:
        ControlGroup.of_one().barrier()
    return True


def test_a_rank_that_acts_alone_waits_for_nobody() -> None:
    assert run_ranks(wait_alone, 2, timeout_s=20.0) == [True, True]


def test_several_failures_are_counted() -> None:
    cases = [("base", [1, 2]), ("corrupt", [0, 1, 2])]
    (first, second), *others = run_ranks(agree_in_turn, 3, cases)
    assert all(other == [first, second] for other in others)
    assert first[1] == "rank 1: it went wrong (1 more ranks failed)"
    assert second[1] == "rank 0: it went wrong (2 more ranks failed)"


def decide_in_turn(rank: int, kinds: list[str]) -> list[Any]:
    group = ControlGroup()
    ran = []

    def action(kind: str) -> None:
        ran.append(kind)
        fail(kind)

    found = [caught(lambda k=kind: group.decide(lambda: action(k))) for kind in kinds]
    assert ran == (kinds if rank == 0 else [])
    assert group.decide(lambda: ("the coordinator's", rank)) == ("the coordinator's", 0)
    return found


def test_the_coordinators_failure_reaches_every_rank() -> None:
    results = run_ranks(decide_in_turn, 3, list(KINDS))
    assert results[0] == results[1] == results[2]
    for kind, (name, text, _, _) in zip(KINDS, results[0], strict=True):
        assert name == KINDS[kind] and text.startswith("rank 0: ")


def a_failure_elsewhere_comes_first(rank: int) -> Any:
    group = ControlGroup()
    mine = group.attempt(lambda: fail("write") if rank == 1 else rank)
    outcomes = group.gather(mine)
    ran = []
    found = caught(lambda: group.decide(lambda: ran.append(rank), outcomes))
    assert ran == []
    return found


def test_nothing_is_decided_after_a_failure() -> None:
    results = run_ranks(a_failure_elsewhere_comes_first, 2)
    assert (
        results[0]
        == results[1]
        == ("CheckpointWriteError", "rank 1: disk is full", errno.ENOSPC, "/data/file")
    )


def messages(rank: int) -> tuple[list[int], int, bool, bool]:
    group = ControlGroup()
    assert (group.rank, group.global_rank, group.size) == (rank, rank, 3)
    return (
        group.gather(rank * rank),
        group.broadcast(rank + 7),
        group.all_true(True),
        group.all_true(rank != 1),
    )


def test_messages() -> None:
    results = run_ranks(messages, 3)
    assert [gathered for gathered, *_ in results] == [[0, 1, 4], [], []]
    assert [rest for _, *rest in results] == [[7, True, False]] * 3


def in_a_subgroup(rank: int) -> Any:
    process_group = dist.new_group([1, 2])
    if rank == 0:
        return None
    group = ControlGroup(process_group)
    assert (group.rank, group.global_rank, group.size) == (rank - 1, rank, 2)
    assert group.is_coordinator == (rank == 1)
    assert group.gather(rank) == ([1, 2] if rank == 1 else [])
    assert group.broadcast(rank) == 1
    assert group.all_true(True)
    assert group.agree(lambda: rank) == rank
    return caught(lambda: group.agree(lambda: fail("corrupt") if rank == 2 else None))


def test_subgroup_names_global_ranks() -> None:
    _, first, second = run_ranks(in_a_subgroup, 3)
    assert first == second == ("CheckpointCorruptError", "rank 2: it went wrong", None, None)


def test_without_torch_distributed() -> None:
    group = ControlGroup()
    assert (group.rank, group.size, group.is_coordinator) == (0, 1, True)
    assert group.gather("x") == ["x"] and group.broadcast("x") == "x"
    assert group.all_true(True) and not group.all_true(False)
    assert group.decide(lambda: 5) == group.agree(lambda: 5) == 5
    for kind, name in KINDS.items():
        found, text, *_ = caught(lambda k=kind: group.agree(lambda: fail(k)))
        assert found == name and text.startswith("rank 0: ")


def test_the_first_cause_is_kept() -> None:
    with pytest.raises(CheckpointError) as raised:
        ControlGroup().agree(lambda: fail("foreign"))
    causes = []
    error: BaseException | None = raised.value
    while error is not None:
        causes.append(type(error))
        error = error.__cause__
    assert causes[-1] is ZeroDivisionError


def test_interrupts_are_not_outcomes() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ControlGroup().attempt(interrupt)


def exchange(rank: int, lengths: list[int], width: int) -> tuple[list[bytes], bytes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("_LEAST_ROUND", width), ("_MOST_BROADCAST", width), ("_MOST_GATHERED", 0)):
            patch.setattr(module, name, value)
        group = ControlGroup()
        content = bytes([rank + 1]) * lengths[rank]
        return group.gather_bytes(content), group.broadcast_bytes(content)


@pytest.mark.parametrize("width", [1 << 20, 7, 1])
@pytest.mark.parametrize("lengths", [[5, 0, 23], [0, 14, 7], [0, 0, 0]])
def test_bytes_of_different_lengths(lengths: list[int], width: int) -> None:
    """They arrive whole, however many rounds they take, and at the coordinator only."""
    found = run_ranks(exchange, 3, lengths, width)
    assert found[0][0] == [bytes([rank + 1]) * length for rank, length in enumerate(lengths)]
    assert [gathered for gathered, _ in found[1:]] == [[], []]
    assert [each for _, each in found] == [b"\1" * lengths[0]] * 3
