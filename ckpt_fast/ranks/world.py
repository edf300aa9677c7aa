# SPDX-License-Identifier: Apache-2.0
"""This process's rank and world, and the few collectives that need no tensors.

Every function works in a process that never initialised torch.distributed: it is then the only rank,
unless a launcher (RANK, SLURM_PROCID) says otherwise.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from typing import TypeVar

import torch

from ckpt_fast.ranks.group import ControlGroup

T = TypeVar("T")

# The one that is documented; those of the modules are below it.
logger = logging.getLogger("ckpt_fast")


def is_distributed() -> bool:
    """Whether torch.distributed has a default process group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def get_rank_safe() -> int:
    """The global rank: of the process group, else as the launcher says, else 0."""
    return torch.distributed.get_rank() if is_distributed() else _from_environment("RANK", "SLURM_PROCID", 0)


def get_world_size_safe() -> int:
    """The number of ranks: of the process group, else as the launcher says, else 1."""
    if is_distributed():
        return torch.distributed.get_world_size()
    return _from_environment("WORLD_SIZE", "SLURM_NTASKS", 1)


def is_last_rank() -> bool:
    """Whether this is the rank that reports to experiment loggers."""
    return get_rank_safe() == get_world_size_safe() - 1


def print_rank_0(message: str) -> None:
    """Rank 0 says what users wait for: one line per save, and one per load. Level INFO.

    A program that has not configured logging sees it as well, on standard output: so it is documented.
    """
    if get_rank_safe() == 0:
        _emit(logging.INFO, message)


def note_rank_0(message: str) -> None:
    """Rank 0 says what only those want to know who look for something. Level DEBUG."""
    if get_rank_safe() == 0:
        _emit(logging.DEBUG, message)


def warn_rank_0(message: str, level: int = logging.WARNING) -> None:
    """Rank 0 warns. Printed like the lines of ``print_rank_0`` if logging is not configured."""
    if get_rank_safe() == 0:
        _emit(level, message)


def warn_rank_last(message: str) -> None:
    """The last rank warns: the one with the experiment loggers."""
    if is_last_rank():
        _emit(logging.WARNING, message)


def _emit(level: int, message: str) -> None:
    if logger.isEnabledFor(level) and logger.hasHandlers():
        logger.log(level, "%s", message, stacklevel=3)
    elif level > logging.DEBUG and (logger.isEnabledFor(level) or _is_unconfigured()):
        prefix = f"{logging.getLevelName(level)}: " if level > logging.INFO else ""
        # Output to a full disk must not take a rank out of the collectives that follow.
        with contextlib.suppress(OSError):
            print(f"{prefix}{message}", flush=True)  # noqa: T201


def _is_unconfigured() -> bool:
    """Whether nobody has chosen a level: Python's own would hide what users wait for."""
    return logger.level == logging.NOTSET and logging.getLogger().level == logging.WARNING


def barrier_if_distributed(group: torch.distributed.ProcessGroup | None = None) -> None:
    """Wait for all ranks of ``group`` (default: all); nothing without a process group.

    Raises:
        RankLostError: one of them has ended, or does not answer.
    """
    ControlGroup(group).barrier()


def control_device(group: torch.distributed.ProcessGroup | None = None) -> torch.device:
    """The device for tensors of small collectives over ``group``: the CPU if its backend supports it."""
    config = str(torch.distributed.get_backend_config(group)) if is_distributed() else "cpu"
    devices = [entry.partition(":")[0] for entry in config.split(",")]
    if "cpu" in devices:
        return torch.device("cpu")
    return torch.device(devices[0], torch.get_device_module(devices[0]).current_device())


def on_rank_0(decide: Callable[[], T]) -> T:
    """Let rank 0 alone look at the disk, and give every rank its answer, or its exception as it is.

    Ranks that each look for themselves may see a shared file system differently, and then no longer call
    the same collectives. Collective: all ranks call it. The answer must be picklable; rank 0 gets the very
    object, the others a copy.

    Raises:
        Exception: whatever ``decide`` raised on rank 0, on every rank.
    """
    return ControlGroup().decide(decide, keep_kind=True)


def on_all_ranks(action: Callable[[], T]) -> T:
    """Let every rank do its own part, and continue only if all succeeded. Collective: all ranks call it.

    Without it the healthy ranks would wait, in the next collective, for the one that failed.

    Returns:
        This rank's own result.

    Raises:
        Exception: what ``action`` raised on the first rank where it did, on every rank. A CheckpointError
            names that rank.
    """
    return ControlGroup().agree(action, keep_kind=True)


def _from_environment(launcher: str, slurm: str, default: int) -> int:
    return int(os.environ.get(launcher) or os.environ.get(slurm) or default)
