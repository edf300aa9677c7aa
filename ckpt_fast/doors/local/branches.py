# SPDX-License-Identifier: Apache-2.0
"""Which local checkpoints a run has left by going back. Nobody loads them again, and they are in the way.

Each rank's part notes the line of the run, so that the ranks find out without reading the state.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.retention.line import noted_in
from ckpt_fast.retention.stored import head_at

Notes = Mapping[str, Any]


def notes_at(path: str) -> Notes:
    """Local. What the part in a directory notes; nothing if it cannot be read."""
    with contextlib.suppress(OSError):
        head = head_at(path)
        return head.notes if head is not None else {}
    return {}


def gather_notes(own: Iterable[tuple[int, str]]) -> dict[int, Notes]:
    """Collective. What each local checkpoint notes of its run, by iteration; the same on all ranks.

    Nothing where parts are of different lines: a crash has left two saves of one iteration.

    Args:
        own: iteration and directory of every part that this rank has.
    """
    found = [(iteration, dict(notes_at(path))) for iteration, path in own]
    by_iteration: dict[int, Notes] = {}
    for iteration, notes in (each for rank in ControlGroup().all_gather(found) for each in rank):
        first = by_iteration.setdefault(iteration, notes)
        if noted_in(first, iteration).line != noted_in(notes, iteration).line:
            by_iteration[iteration] = {}
    return by_iteration


def is_left(notes: Notes, iteration: int, other: int, other_notes: Notes) -> bool:
    """Whether a local checkpoint is of a branch that the run has left for what it saves now.

    Args:
        notes, iteration: of what it saves.
        other, other_notes: iteration and notes of that checkpoint.
    """
    line = noted_in(notes, iteration).line
    return line is not None and line.has_left(iteration, other, noted_in(other_notes, other).line)


def without_left(
    available: Iterable[Iterable[Any]], notes: Notes, iteration: int, known: Mapping[int, Notes]
) -> list[set[Any]]:
    """Of the ids of each rank's states, those that the run has not left for what it saves now.

    Args:
        available: for each rank the ids (iteration, rank, session) of the states that it has.
        notes, iteration: of what it saves.
        known: notes by iteration.
    """
    return [
        {each for each in ids if not is_left(notes, iteration, each[0], known.get(each[0], {}))}
        for ids in available
    ]
