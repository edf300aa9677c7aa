# SPDX-License-Identifier: Apache-2.0
"""Local checkpoints in the background that a rank cannot even announce."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from unittest import mock

import pytest

from ckpt_fast import compat
from ckpt_fast.doors.megatron import stock_queue
from tests.doors.local.test_manager import manager, state_dict_of
from tests.helpers import run_ranks
from tests.models import megatron_on_cpu
from tests.trainer.training import error_of, require

pytestmark = pytest.mark.skipif(not compat.HAVE_RESIL, reason="needs nvidia-resiliency-ext")


def save_without_a_flag(rank: int, root: str) -> tuple[str, str]:
    """Start a save in the background while rank 1 has no room for a flag; return the error."""
    full = mock.patch.object(stock_queue, "FileIO", side_effect=OSError(errno.ENOSPC, "the memory is full"))
    with megatron_on_cpu(), full if rank == 1 else contextlib.nullcontext():
        saver, state = manager(root, replicated=False), state_dict_of({"step": 3})
        return error_of(lambda: saver.save(state, 3, is_async=True))


def test_a_rank_without_room_for_a_flag_fails_the_save_on_all(tmp_path: Path) -> None:
    for error in run_ranks(save_without_a_flag, 2, str(tmp_path), timeout_s=30.0):
        require(error, "CheckpointWriteError", "rank 1: ", "the memory is full")
