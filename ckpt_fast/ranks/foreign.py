# SPDX-License-Identifier: Apache-2.0
"""Running what has collectives of its own, and may fail between them on one rank only."""

from __future__ import annotations

import contextvars
import logging
import threading
import time
import uuid
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from ckpt_fast import settings
from ckpt_fast.errors import CheckpointError
from ckpt_fast.ranks.devices import on_this_gpu
from ckpt_fast.ranks.group import ControlGroup

logger = logging.getLogger(__name__)

# Once one rank has failed: time for the others to come back from what they are doing.
_GRACE_S = 60.0
_LONGEST_PAUSE_S = 0.5


def run_on_all_ranks(action: Callable[[], None], what: str) -> None:
    """Let every rank run ``action``, in which ranks wait for each other. Collective.

    A rank that fails leaves the others waiting for it. Therefore ``action`` runs in a thread, and ranks learn
    of each other's failures through the store of their process group, for which nobody has to be free.

    Args:
        action: may use any process group; it sees the caller's CUDA device, gradient mode and context.
        what: what it is, for messages.

    Raises:
        CheckpointError: on every rank, naming the one that failed; all have come back from ``action``.
        RuntimeError: on every rank, naming the one that failed; another did not come back within a minute, or
            within CKPT_FAST_TIMEOUT if that is less, or has ended. Process groups are out of step for good.
    """
    group = ControlGroup()
    if group.size == 1:
        group.agree(action)
        return
    store = PrefixStore(group.broadcast(uuid.uuid4().hex), _get_default_store())
    errors: list[Exception] = []
    thread = _start(action, errors)
    lost = False
    noticed: float | None = None
    pause = 0.001
    while thread.is_alive() and not lost:
        thread.join(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
        if thread.is_alive() and store.check(["failed"]):
            noticed = noticed or time.monotonic()
            lost = time.monotonic() - noticed > min(_GRACE_S, settings.timeout_s())
    if errors:
        store.set("failed", f"rank {group.rank}: {what}: {type(errors[0]).__name__}: {errors[0]}")
    store.add("lost", int(lost))
    store.add("back", 1)
    have_come_back = _wait_for_all(store, group.size)
    if not store.check(["failed"]):
        return
    reason = store.get("failed").decode()
    if store.add("lost", 0) or not have_come_back:
        raise RuntimeError(
            f"{reason}. Other ranks still wait for it there, or have ended, and the process groups cannot be "
            "used any more: end this job and resume from the newest checkpoint"
        )
    raise CheckpointError(reason) from (errors[0] if errors else None)


def _start(action: Callable[[], None], errors: list[Exception]) -> threading.Thread:
    with_gradients = torch.is_grad_enabled()

    def run() -> None:
        try:
            with torch.set_grad_enabled(with_gradients):
                action()
        except Exception as error:
            logger.exception("rank %d failed", dist.get_rank())
            errors.append(error)

    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(on_this_gpu(run),), daemon=True)
    thread.start()
    return thread


def _wait_for_all(store: Store, ranks: int) -> bool:
    """Wait until every rank has come back, or has given up waiting for itself.

    Returns:
        False if one has failed and another does neither: its process has ended.
    """
    pause = 0.001
    noticed: float | None = None
    while store.add("back", 0) < ranks:
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)
        if store.check(["failed"]):
            noticed = noticed or time.monotonic()
            # Twice, since the others may have noticed later.
            if time.monotonic() - noticed > 2 * min(_GRACE_S, settings.timeout_s()):
                return False
    return True
