# SPDX-License-Identifier: Apache-2.0
"""The line of a checkpoint: the saves that it came from, through all resumptions and roll-backs.

What a run saves between two loads is a *leg*. A checkpoint notes the legs that led to it, and how far each of
them was followed. So it is known of any two checkpoints whether one came from the other, whatever else has
been deleted in the meantime.
"""

from __future__ import annotations

import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

LINE = "line"
RESUMED_FROM = "resumed_from"
SAVED_AT = "saved_at"
METRICS = "metrics"

T = TypeVar("T")

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
        if self.holds(iteration, other) or self._passes(other) or not self._forks_from(other):
            return False
        if iteration <= selected:
            return True
        return other is not None and not other.holds(selected, self)

    def was_left_for(self, other: Line) -> bool:
        """Whether ``other`` is of a leg that began when this one's last leg had ended: a run went back.

        False says nothing: both may have left a leg that they have in common.
        """
        leg, last = self.legs[-1]
        return other.legs[-1][0] != leg and dict(other.legs).get(leg, last) < last

    def _passes(self, other: Line | None) -> bool:
        """Whether this line has been where a checkpoint is that was saved right after a load: nothing was
        trained in between, so it is what was loaded."""
        if other is None:
            return False
        last, end = dict(self.legs), other.legs[-1][1]
        return any(end <= last.get(leg, _NOTHING) for leg, at in other.legs[:-1] if at == end)

    def _forks_from(self, other: Line | None) -> bool:
        """Whether two lines, of which this one does not hold the other's end, have a leg in common.

        Without one, nothing says that either came from the other, or that a run has left it: it may be of
        another run, or of this one, after a load that was not noted.
        """
        if other is None:
            return _UNRECORDED in dict(self.legs)
        return not dict(self.legs).keys().isdisjoint(dict(other.legs))


class Noted(NamedTuple):
    """What a checkpoint notes of its place among others.

    Attributes:
        iteration: its own.
        line: None if it notes none.
        saved_at: when its save was asked for, in seconds of the coordinator's clock (``time.time``); None if
            it does not note that.
    """

    iteration: int
    line: Line | None = None
    saved_at: float | None = None

    def supersedes(self, other: Noted) -> bool:
        """Whether a run has left ``other`` for this one, or for what led to it.

        Where two branches began from one leg, the one that was saved later is the one that the run is on; the
        iteration decides where that is not noted.
        """
        if self.line is None or other.line is None:
            return False
        if not self.line.has_left(self.iteration, other.iteration, other.line):
            return False
        if other.line.was_left_for(self.line):
            return True
        if self.line.was_left_for(other.line):
            return False
        if self.saved_at is None or other.saved_at is None:
            return self.iteration > other.iteration
        return self.saved_at > other.saved_at

    def may_succeed(self, selected: Noted) -> bool:
        """Whether a run may have left ``selected``, which the trackers name, for this one: not if it is on
        its line, or known to be the earlier branch."""
        if self.line is None:
            return False
        if selected.line is None:  # nor does what the run was resumed from, if it left the selected one
            return dict(self.line.legs).get(_UNRECORDED, selected.iteration) < selected.iteration
        if selected.line.holds(self.iteration, self.line) or self.line.was_left_for(selected.line):
            return False
        return self.saved_at is None or selected.saved_at is None or self.saved_at >= selected.saved_at


def without_superseded(found: Iterable[T], noted: Callable[[T], Noted]) -> list[T]:
    """What of ``found`` a run can go on from: all but those that it has left for another of them."""
    each_noted = [(each, noted(each)) for each in found]
    left = [each for each, facts in each_noted if not any(other.supersedes(facts) for _, other in each_noted)]
    # Clocks that are wrong can make a circle.
    return left or [each for each, _ in each_noted]


def newest_of(
    newest_first: Iterable[T], noted: Callable[[T], Noted], is_whole: Callable[[T], bool]
) -> T | None:
    """The newest whole checkpoint, where nothing but the checkpoints themselves says which one is selected.

    An older one is newer if a run went back and left the other for it.

    Args:
        newest_first: checkpoints, by iteration.
        noted: what one notes.
        is_whole: whether one is whole; only asked where it matters.
    """
    best: T | None = None
    for each in newest_first:
        if (best is None or noted(each).supersedes(noted(best))) and is_whole(each):
            best = each
    return best


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
        notes: dict[str, Any] = {
            LINE: [list(each) for each in (*self._before, (self._leg, iteration))],
            SAVED_AT: round(time.time(), 3),
        }
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


def noted_in(notes: Mapping[str, Any], iteration: int) -> Noted:
    """What the notes of the checkpoint of an iteration tell of its place among others."""
    saved_at = notes.get(SAVED_AT)
    if isinstance(saved_at, bool) or not isinstance(saved_at, (int, float)) or not math.isfinite(saved_at):
        saved_at = None
    return Noted(iteration, line_in(notes, iteration), saved_at)


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
