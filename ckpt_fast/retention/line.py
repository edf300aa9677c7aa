# SPDX-License-Identifier: Apache-2.0
"""The line of a checkpoint: the saves that it came from, through all resumptions and roll-backs.

What a run saves between two loads is a *leg*. A checkpoint notes the legs that led to it, and how far each of
them was followed. So it is known of any two checkpoints whether one came from the other, whatever else has
been deleted in the meantime.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LINE = "line"
RESUMED_FROM = "resumed_from"
METRICS = "metrics"

# Stands for all that was saved before lines were noted, up to an iteration.
_UNRECORDED = ""
_NOTHING = -1


@dataclass(frozen=True)
class Line:
    """The legs that led to a checkpoint.

    Attributes:
        legs: the name of each, and the last iteration of it that belongs to the line; oldest first. The last
            leg is the one that saved the checkpoint.
    """

    legs: tuple[tuple[str, int], ...]

    def holds(self, iteration: int, other: Line | None) -> bool:
        """Whether a checkpoint is among those that led to this one.

        Args:
            iteration: of that checkpoint.
            other: its line; None if it notes none: it then counts unless it can't have been there.
        """
        last = dict(self.legs)
        unrecorded = last.get(_UNRECORDED)
        if unrecorded is not None and iteration <= unrecorded:
            return True
        if other is None:
            return unrecorded is None
        return iteration <= last.get(other.legs[-1][0], _NOTHING)

    def has_left(self, selected: int, iteration: int, other: Line | None) -> bool:
        """Whether a checkpoint is of a branch that was abandoned: neither before this one, nor after it.

        Args:
            selected: the iteration of the checkpoint whose line this is.
            iteration, other: of the checkpoint asked about.
        """
        if self.holds(iteration, other) or not self._forks_from(other):
            return False
        if iteration <= selected:
            return True
        return other is not None and not other.holds(selected, self)

    def _forks_from(self, other: Line | None) -> bool:
        """Whether two lines, of which this one does not hold the other's end, have a leg in common.

        Without one, nothing says that either came from the other, or that a run has left it: it may be of
        another run, or of this one, after a load that was not noted.
        """
        if other is None:
            return _UNRECORDED in dict(self.legs)
        return not dict(self.legs).keys().isdisjoint(dict(other.legs))


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run was resumed from.

    Attributes:
        iteration: its iteration.
        save_id: of its save; None where there is none.
        line: that it notes; None if it notes none.
    """

    iteration: int
    save_id: str | None = None
    line: Line | None = None


class Lineage:
    """The line of a run, as far as it has come. Local; what the coordinator's says is noted.

    Args:
        origin: what the run was resumed from; None if it begins anew.

    Attributes:
        origin: as given.
    """

    def __init__(self, origin: Origin | None = None) -> None:
        self.origin = origin
        self._before: tuple[tuple[str, int], ...] = ()
        if origin is not None:
            self._before = origin.line.legs if origin.line is not None else ((_UNRECORDED, origin.iteration),)
        self._leg = secrets.token_hex(4)
        self._newest = _NOTHING

    def notes(self, iteration: int) -> dict[str, Any]:
        """What the checkpoint that is saved now, at this iteration, notes of it."""
        if iteration < self._newest:  # the program went back without a load
            followed = (*self._before, (self._leg, iteration - 1))
            self._before = tuple((leg, min(last, iteration - 1)) for leg, last in followed)
            self._leg, self.origin = secrets.token_hex(4), None
        self._newest = iteration
        notes: dict[str, Any] = {LINE: [list(each) for each in (*self._before, (self._leg, iteration))]}
        if self.origin is not None:
            notes[RESUMED_FROM] = {"iteration": self.origin.iteration, "save_id": self.origin.save_id}
        return notes


def line_in(notes: Mapping[str, Any], iteration: int | None = None) -> Line | None:
    """The line that the notes of a checkpoint tell; None if they tell none that makes sense.

    Args:
        notes: of the checkpoint.
        iteration: as its directory is called. Of another one, the notes say nothing: it is a renamed copy.
    """
    legs = notes.get(LINE)
    if not isinstance(legs, list) or not legs:
        return None
    found = []
    for leg in legs:
        if not (isinstance(leg, list) and len(leg) == 2 and isinstance(leg[0], str) and _is_count(leg[1])):
            return None
        found.append((leg[0], leg[1]))
    return Line(tuple(found)) if iteration in (None, found[-1][1]) else None


def resumed_from_in(notes: Mapping[str, Any]) -> int | None:
    """The iteration of the checkpoint that the run was resumed from; None if the notes name none."""
    origin = notes.get(RESUMED_FROM)
    iteration = origin.get("iteration") if isinstance(origin, dict) else None
    return iteration if _is_count(iteration) else None


def metrics_in(notes: Mapping[str, Any]) -> dict[str, float]:
    """The metrics that were saved with a checkpoint, by name, as far as they are finite numbers."""
    metrics = notes.get(METRICS)
    if not isinstance(metrics, dict):
        return {}
    return {
        str(name): float(value)
        for name, value in metrics.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def metrics_note(metrics: Mapping[str, Any] | None) -> dict[str, Any]:
    """The note of metrics: numbers, or tensors of one element each.

    Raises:
        ValueError: a value is neither.
    """
    if not metrics:
        return {}
    try:
        return {METRICS: {str(name): _finite(float(value)) for name, value in metrics.items()}}
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"metrics must be numbers by name, not {metrics!r}: {error}") from error


def _finite(value: float) -> float | None:
    """JSON has neither infinity nor NaN, and neither is ever the best."""
    return value if math.isfinite(value) else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
