# SPDX-License-Identifier: Apache-2.0
"""A run's saves, from the file of JSON lines that ``CKPT_FAST_METRICS`` names."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt_fast.errors import CheckpointError, CheckpointNotFoundError


@dataclass
class LoggedSave:
    """One save, from the lines of its ranks.

    Attributes:
        directory: the checkpoint.
        time: when the last of its lines was written, in seconds since 1970.
        ranks: those that wrote a line.
        nbytes: what they wrote.
        held_up_s: how long training waited; the longest of the ranks.
        durable_s: from the call until the bytes of the slowest rank were durable.
        seconds: from the call until the checkpoint was published.
        error: why it failed, if training went on; None otherwise.
    """

    directory: str
    time: float = 0.0
    ranks: set[int] = field(default_factory=set)
    nbytes: int = 0
    held_up_s: float = 0.0
    durable_s: float = 0.0
    seconds: float = 0.0
    error: str | None = None

    @property
    def gb_per_s(self) -> float:
        """All ranks' bytes over the time until they were durable, in 10^9 bytes per second."""
        return self.nbytes / self.durable_s / 1e9 if self.durable_s else 0.0


@dataclass(frozen=True)
class SavesLog:
    """The saves of a run in the order in which they ended, and how many lines are none of a save."""

    saves: tuple[LoggedSave, ...]
    unreadable: int


def read_saves(path: str | os.PathLike[str]) -> SavesLog:
    """The saves that a file of JSON lines tells of. Lines of one save by several ranks are put together.

    A line that is not whole, as a killed run may leave one, is counted and passed over.

    Args:
        path: what ``CKPT_FAST_METRICS`` named.

    Raises:
        CheckpointNotFoundError: there is no such file.
        CheckpointError: it cannot be read.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return _gathered(file)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise CheckpointNotFoundError(
            f"{os.fspath(path)} is no file of JSON lines; a run writes it if CKPT_FAST_METRICS names it"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{os.fspath(path)} cannot be read ({error.strerror or error})") from error


def _gathered(lines: Iterable[str]) -> SavesLog:
    saves: list[LoggedSave] = []
    latest: dict[str, LoggedSave] = {}
    unreadable = 0
    for line in lines:
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            directory, rank = str(record["directory"]), int(record["rank"])
            save = latest.get(directory)
            if save is None or rank in save.ranks:
                save = latest[directory] = LoggedSave(directory)
                _add(save, rank, record)
                saves.append(save)
            else:
                _add(save, rank, record)
        except (ValueError, KeyError, TypeError, RecursionError):
            unreadable += 1
    return SavesLog(tuple(saves), unreadable)


def _add(save: LoggedSave, rank: int, record: Mapping[str, Any]) -> None:
    moment, nbytes = float(record["time"]), int(record["nbytes"])
    held_up, durable, seconds = (float(record[key]) for key in ("stall_s", "written_s", "seconds"))
    save.ranks.add(rank)
    save.time = max(save.time, moment)
    save.nbytes += nbytes
    save.held_up_s = max(save.held_up_s, held_up)
    save.durable_s = max(save.durable_s, durable)
    save.seconds = max(save.seconds, seconds)
    if record.get("error") is not None:
        save.error = str(record["error"])
