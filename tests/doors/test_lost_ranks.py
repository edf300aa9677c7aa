# SPDX-License-Identifier: Apache-2.0
"""Another rank ends: whatever this one was waiting for, it says so, at every collective of every door.

The transport's error is simulated: from one collective on, all of them fail on every rank, with gloo's text.
``tests.crash.kills`` kills ranks.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import ckpt_fast
from ckpt_fast import CheckpointManager, compat
from ckpt_fast.checkpointing import init_checkpointing_context, maybe_finalize_async_save
from ckpt_fast.errors import CheckpointError
from tests.helpers import run_ranks
from tests.manager.ranks import state
from tests.models import Run, Setup, megatron_on_cpu

SETUP = Setup(distributed=True, bf16=True)
GLOO = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4711: Connection reset"
)
_COLLECTIVES = [
    name
    for name in (
        *("allreduce", "allreduce_coalesced", "allgather", "_allgather_base", "allgather_coalesced"),
        *("broadcast", "gather", "scatter", "reduce", "reduce_scatter", "alltoall", "alltoall_base"),
        *("send", "recv", "recv_anysource", "barrier", "monitored_barrier"),
    )
    if hasattr(dist.ProcessGroup, name)
]


class Transport:
    """From collective number ``broken_from`` of this thread on, those of all threads fail.

    Attributes:
        is_broken: whether it has come so far.
    """

    def __init__(self, broken_from: int) -> None:
        self._count = 0
        self._broken_from = broken_from
        self._thread = threading.get_ident()
        self.is_broken = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[Transport]:
        with pytest.MonkeyPatch.context() as patch:
            for name in _COLLECTIVES:
                patch.setattr(dist.ProcessGroup, name, self._watched(getattr(dist.ProcessGroup, name)))
            yield self

    def _watched(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._thread:
                self._count += 1
                self.is_broken |= self._count == self._broken_from
            if self.is_broken:
                raise RuntimeError(GLOO)
            return original(*args, **kwargs)

        return call


Door = Callable[[str], contextlib.AbstractContextManager[Callable[[str], Any]]]


@contextlib.contextmanager
def saving_run(_: str, setup: Setup = SETUP, **config: Any) -> Iterator[Callable[[str], Any]]:
    with Run(setup, **config) as run, megatron_on_cpu():
        run.train()
        context: dict[str, Any] = {}

        def save(root: str) -> None:
            run.checkpoint.save, run.checkpoint.non_persistent_local_ckpt_dir = root, f"{root}/local"
            context.update(init_checkpointing_context(run.checkpoint))
            is_local = run.checkpoint.non_persistent_ckpt_type == "local"
            run.save(checkpointing_context=context, non_persistent_ckpt=is_local)
            maybe_finalize_async_save(run.state, run.checkpoint, blocking=True)

        yield save


@contextlib.contextmanager
def loading_run(saved: str, setup: Setup = SETUP, **config: Any) -> Iterator[Callable[[str], Any]]:
    config["non_persistent_local_ckpt_dir"] = f"{saved}/local"
    with Run(setup, save=saved, load=saved, **config) as run, megatron_on_cpu():
        run.train()
        context = init_checkpointing_context(run.checkpoint)
        run.save(
            checkpointing_context=context,
            non_persistent_ckpt=config.get("non_persistent_ckpt_type") == "local",
        )

        def load(_: str) -> None:
            if run.load(checkpointing_context=context)[0] != 1:
                raise AssertionError("nothing was loaded")

        yield load


@contextlib.contextmanager
def saving(_: str, in_background: bool = False) -> Iterator[Callable[[str], Any]]:
    mine = state(1)
    if in_background:
        yield lambda root: ckpt_fast.async_save(mine, root).result()
    else:
        yield lambda root: ckpt_fast.save(mine, root)


@contextlib.contextmanager
def loading(saved: str) -> Iterator[Callable[[str], Any]]:
    mine = state(1)
    ckpt_fast.save(mine, saved)
    yield lambda _: ckpt_fast.load(mine, saved)


@contextlib.contextmanager
def managed(_: str) -> Iterator[Callable[[str], Any]]:
    mine = state(1)

    def save(root: str) -> None:
        with CheckpointManager(root) as manager:
            manager.save(1, mine)

    yield save


@contextlib.contextmanager
def restoring(saved: str) -> Iterator[Callable[[str], Any]]:
    mine = state(1)
    with CheckpointManager(saved) as manager:
        manager.save(1, mine).result()
        yield lambda _: manager.restore(mine)


RESHARDABLE = Setup(distributed=True, reshardable=True, bf16=True)
PLAIN = Setup(parallel_save=False)
BACKGROUND = {"async_save": True, "async_strategy": "mcore"}
LOCAL = {"non_persistent_ckpt_type": "local"}
DOORS: dict[str, Door] = {
    "save_checkpoint": saving_run,
    "save_checkpoint, in the background": partial(saving_run, **BACKGROUND),
    "save_checkpoint, reshardable": partial(saving_run, setup=RESHARDABLE),
    "save_checkpoint, no distributed optimizer": partial(saving_run, setup=PLAIN),
    "save_checkpoint, local": partial(saving_run, **LOCAL),
    "load_checkpoint": loading_run,
    "load_checkpoint, reshardable": partial(loading_run, setup=RESHARDABLE),
    "load_checkpoint, no distributed optimizer": partial(loading_run, setup=PLAIN),
    "load_checkpoint, parallel": partial(loading_run, fully_parallel_load=True),
    "load_checkpoint, local": partial(loading_run, **LOCAL),
    "save": saving,
    "async_save": partial(saving, in_background=True),
    "load": loading,
    "CheckpointManager.save": managed,
    "CheckpointManager.restore": restoring,
}
QUICK = (
    "load_checkpoint",
    "save",
    "async_save",
    "load",
    "CheckpointManager.save",
    "CheckpointManager.restore",
)


def lose_touch(rank: int, name: str, root: str, is_first: bool) -> tuple[int, list[str]]:
    """Break each collective of a door in turn; return their number, and what was raised instead of ours.

    Args:
        is_first: the call is the first of its program, or another one precedes it.
    """
    wrong: list[str] = []
    with contextlib.ExitStack() as stack:
        act = None
        for number in count(1):
            if act is None or is_first:
                stack.close()
                act = stack.enter_context(DOORS[name](f"{root}/saved/{number}"))
            if not is_first:
                act(f"{root}/before/{number}")
            transport = Transport(number)
            error: BaseException | None = None
            try:
                with transport.watched():
                    act(f"{root}/{number}")
            except Exception as raised:
                error = raised
            if not transport.is_broken:
                return number - 1, wrong
            if not isinstance(error, CheckpointError) or "has lost touch" not in str(error):
                wrong.append(f"{number}: {error!r}, {''.join(traceback.format_exception(error))[-2000:]}")
    raise AssertionError


@pytest.mark.parametrize(
    ("name", "is_first"),
    [
        pytest.param(name, is_first, marks=[] if name in QUICK and not is_first else pytest.mark.long)
        for name in DOORS
        for is_first in (True, False)
        if "load" not in name or not is_first
    ],
)
def test_every_collective_of(tmp_path: Path, name: str, is_first: bool) -> None:
    if "local" in name and not compat.HAVE_RESIL:
        pytest.skip("needs nvidia-resiliency-ext")
    for number, wrong in run_ranks(lose_touch, 2, name, str(tmp_path), is_first):
        assert wrong == [] and number > 1
