# SPDX-License-Identifier: Apache-2.0
"""Saves of a structure that is promised to stay, after one that failed, and while another is in flight."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from ckpt_fast import native
from ckpt_fast.checkpointing import maybe_finalize_async_save
from ckpt_fast.pipeline.save import seal
from ckpt_fast.trainer.save.collect import Collection
from tests.helpers import run_ranks
from tests.models import Run, Setup
from tests.trainer.save.reuse import mutations
from tests.trainer.save.reuse.twins import Twins, differing

pytestmark = pytest.mark.usefixtures("no_fsync")
SETUP = Setup(layers=2, distributed=True, bf16=True)
ALL = (0, 1)


def broken(owner: Any, name: str, error: BaseException) -> Callable[[Run], Any]:
    return lambda _: mock.patch.object(owner, name, side_effect=error)


@contextlib.contextmanager
def broken_extra_state(run: Run) -> Iterator[None]:
    module = mutations.model_of(run).decoder.layers[0].mlp.linear_fc1
    module.get_extra_state = mock.Mock(side_effect=RuntimeError("no extra state"))
    try:
        yield
    finally:
        del module.get_extra_state


FAULTS: dict[str, tuple[tuple[int, ...], Callable[[Run], Any]]] = {
    "inventory": ((1,), broken(Collection, "inventory", RuntimeError("no inventory"))),
    "extra state": ((0,), broken_extra_state),
    "objects": ((1,), broken(Collection, "objects", RuntimeError("no objects"))),
    "write": ((1,), broken(native.engine(), "write_files", OSError(errno.EIO, "no disk"))),
    "write on the coordinator": ((0,), broken(native.engine(), "write_files", OSError(errno.EIO, "no disk"))),
    "commit": ((0,), broken(seal, "seal", RuntimeError("no seal"))),
    "interrupted": (ALL, broken(seal, "report", KeyboardInterrupt("stop"))),
}


def fail_at_each(rank: int, root: str, names: list[str]) -> dict[str, tuple[str, bool, bool]]:
    """Let a save that collects objects only fail; return its error, and which of the next two do so."""
    results = {}
    with Run(SETUP, async_strategy="mcore") as run:
        twins = Twins(run, root)
        for name in names:
            ranks, fault = FAULTS[name]
            for _ in range(2):
                run.train(1)
                twins.save()
            run.train(1)
            with fault(run) if rank in ranks else contextlib.nullcontext():
                error = twins.fail()
            results[name] = (error, twins.save(), twins.save())
    return results


QUICK = ["extra state", "write", "commit"]


@pytest.mark.parametrize(
    "names",
    [QUICK, pytest.param([name for name in FAULTS if name not in QUICK], marks=pytest.mark.long)],
    ids=["quick", "others"],
)
def test_save_after_one_that_failed(
    tmp_path: Path, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_FAST_RETRIES", "0")
    for results in run_ranks(fail_at_each, 2, str(tmp_path), names):
        assert [*results] == names
        assert [name for name, (error, *_) in results.items() if error == "no error"] == []
        assert [name for name, (_, _, is_reused) in results.items() if not is_reused] == []


def restructure(run: Run) -> None:
    """Give one of the optimizer's tensors other strides, which its program depends on."""
    state = mutations.states_of(run)[0]
    state["exp_avg"] = torch.stack([state["exp_avg"]] * 2, -1)[:, 0]


def fail_where_items_are_left_out(rank: int, root: str) -> tuple[str, list[bool]]:
    with Run(SETUP) as run:
        twins = Twins(run, root)
        for _ in range(2):
            run.train(1)
            twins.save()
        if rank == 1:
            restructure(run)
        with broken(seal, "seal", RuntimeError("no seal"))(run) if rank == 0 else contextlib.nullcontext():
            error = twins.fail()
        return error, [twins.save(), twins.save()]


def test_commit_fails_after_one_rank_alone_left_out_its_items(tmp_path: Path) -> None:
    error, reused = "rank 0: RuntimeError: no seal", [True, True]
    assert run_ranks(fail_where_items_are_left_out, 2, str(tmp_path)) == [(error, reused)] * 2


def change_on_one_rank(rank: int, root: str) -> tuple[str, list[bool]]:
    """The tensors of rank 1 change. Rank 0 has collected objects only, and fails to collect the rest."""
    with Run(Setup(layers=2, pp=2, distributed=True, bf16=True)) as run:
        twins = Twins(run, root)
        for _ in range(2):
            run.train(1)
            twins.save()
        if rank == 1:
            mutations.model_of(run).decoder.final_layernorm.register_buffer("auxiliary", torch.ones(3))
        fault = broken(Collection, "everything", RuntimeError("not now"))
        with fault(run) if rank == 0 else contextlib.nullcontext():
            error = twins.fail()
        return error, [twins.save(), twins.save()]


def test_rank_cannot_collect_what_another_rank_made_necessary(tmp_path: Path) -> None:
    error, reused = "rank 0: RuntimeError: not now", [False, True]
    assert run_ranks(change_on_one_rank, 2, str(tmp_path), timeout_s=40.0) == [(error, reused)] * 2


def fail_while_learning(rank: int, root: str) -> list[bool]:
    """Collecting objects fails after everything has been collected."""
    with Run(SETUP) as run:
        twins = Twins(run, root)
        fault = broken(Collection, "objects", RuntimeError("not twice"))
        with fault(run) if rank == 1 else contextlib.nullcontext():
            reused = [twins.save()]
        return [*reused, twins.save(), twins.save()]


def test_save_does_not_depend_on_what_the_next_could_reuse(tmp_path: Path) -> None:
    found = run_ranks(fail_while_learning, 2, str(tmp_path), timeout_s=40.0)
    assert found == [[False, True, True], [False, False, True]]


def save_with_two_in_flight(rank: int, root: str, known: int) -> list[str]:
    """Start two in the background after ``known`` others; return where they differ from ordinary saves."""
    with Run(SETUP, async_strategy="mcore", on_save_in_progress="queue") as run:
        twins = Twins(run, root)
        for _ in range(known):
            run.train(1)
            twins.save(in_background=True)
        pairs = []
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                run.train(1)
                pairs.append(twins.start(stack))
            run.train(1)
        maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)
        torch.distributed.barrier()
        return [name for pair in pairs for name in differing(*pair)]


@pytest.mark.parametrize("known", [0, pytest.param(1, marks=pytest.mark.long), 2])
def test_two_saves_in_flight(tmp_path: Path, known: int) -> None:
    assert run_ranks(save_with_two_in_flight, 2, str(tmp_path), known) == [[], []]
