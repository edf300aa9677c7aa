# SPDX-License-Identifier: Apache-2.0
"""The report of a verification: of each file and each item, what it is found to be."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

Kind = Literal["torch_dist", "fsdp_dtensor", "torch_dcp", "local", "run", "unknown"]


class State(str, Enum):
    """What a file or an item is found to be."""

    SOUND = "sound"
    """All of it was read, and is what was written."""
    UNREAD = "unread"
    """It has the right length and place. Its bytes are looked at with ``deep`` only, or have no checksum."""
    UNDECODED = "undecoded"
    """Its checksums are right; its content is of classes that are not decoded here."""
    EXTRA = "extra"
    """Nothing of the checkpoint refers to it."""
    MISSING = "missing"
    """It is not there, or a part of a tensor is not."""
    TRUNCATED = "truncated"
    """It is shorter than what was written."""
    SWAPPED = "swapped"
    """It is whole by its own checksums, or longer: another file or item than the one that was written."""
    FLIPPED = "flipped"
    """Bytes of it are not those that were written."""
    UNCHECKED = "unchecked"
    """It could not be read, or nothing is known that it could be compared with."""

    @property
    def is_damage(self) -> bool:
        """Whether a load that needs it would fail, or get something else than what was saved."""
        return self in (State.MISSING, State.TRUNCATED, State.SWAPPED, State.FLIPPED)


class Verdict(str, Enum):
    """The state of a checkpoint, or of a run as a whole."""

    SOUND = "sound"
    DAMAGED = "damaged"
    UNCHECKED = "unchecked"
    """Nothing damaged was found, but not all of it could be checked."""
    INCOMPLETE = "incomplete"
    """A save that has not ended, or was interrupted: no tracker names it."""


@dataclass(frozen=True)
class FileReport:
    """A file.

    Attributes:
        path: relative to the checkpoint, or to the run.
        state: what it is found to be.
        nbytes: its length; None if it is missing.
        detail: what is wrong with it; empty if nothing is.
    """

    path: str
    state: State
    nbytes: int | None = None
    detail: str = ""


@dataclass(frozen=True)
class ItemReport:
    """A piece of a tensor, or an object.

    Attributes:
        name: of the tensor or object.
        offsets: where the piece begins in the tensor; None for an object, or a tensor as a whole.
        state: what it is found to be.
        path: the file that it is in; "" if that is not known.
        offset, nbytes: where in the file.
        detail: what is wrong with it; empty if nothing is.
    """

    name: str
    offsets: tuple[int, ...] | None
    state: State
    path: str = ""
    offset: int = 0
    nbytes: int = 0
    detail: str = ""


@dataclass(frozen=True)
class VerifyReport:
    """What was found out about a checkpoint, or about all checkpoints of a run.

    Attributes:
        path: the checkpoint, or the directory of the run.
        kind: "torch_dist", "fsdp_dtensor" and "torch_dcp" for the formats of Megatron and torch, "local" for
            the local checkpoint of a rank, "run" for a directory of checkpoints.
        deep: whether every byte was read. Otherwise lengths, structure, ``.metadata`` and small files were.
        is_own: whether ckpt_fast wrote it; its files then have checksums.
        is_complete: whether all files and items that it consists of are there. Of a run, whether the
            checkpoint that the trackers select is.
        is_selected: whether the trackers of its run select it.
        is_published: False for a save of a run that no tracker has named yet.
        files: its files; those of a run are the trackers.
        items: its pieces of tensors, and its objects.
        problem: why it could not be checked at all; empty if it could.
        notes: what is worth knowing and no defect.
        checkpoints: those of a run, oldest first.
    """

    path: str
    kind: Kind
    deep: bool
    is_own: bool = False
    is_complete: bool = True
    is_selected: bool = False
    is_published: bool = True
    files: tuple[FileReport, ...] = ()
    items: tuple[ItemReport, ...] = ()
    problem: str = ""
    notes: tuple[str, ...] = ()
    checkpoints: tuple[VerifyReport, ...] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """The overall state. A save that nothing names does not make a run damaged."""
        if not self.is_published and not self.is_complete:
            return Verdict.INCOMPLETE
        below = {each.verdict for each in self.checkpoints}
        own = {each.state for each in self.files} | {each.state for each in self.items}
        if Verdict.DAMAGED in below or any(state.is_damage for state in own):
            return Verdict.DAMAGED
        if self.problem or Verdict.UNCHECKED in below or State.UNCHECKED in own:
            return Verdict.UNCHECKED
        if below == {Verdict.INCOMPLETE}:
            return Verdict.UNCHECKED
        return Verdict.SOUND

    @property
    def is_sound(self) -> bool:
        """Whether everything that was asked for was checked, and no defect was found."""
        return self.verdict is Verdict.SOUND

    @property
    def damages(self) -> tuple[str, ...]:
        """One line for each defect, of the checkpoints of a run too."""
        own = self._lines(lambda state: state.is_damage)
        told = (each for each in self.checkpoints if each.verdict is not Verdict.INCOMPLETE)
        return (*own, *(line for each in told for line in each.damages))

    @property
    def unchecked(self) -> tuple[str, ...]:
        """One line for whatever could not be checked, or not be decoded; of the checkpoints of a run too."""
        own = self._lines(lambda state: state in (State.UNCHECKED, State.UNDECODED))
        problem = (self.problem,) if self.problem else ()
        return (*problem, *own, *(line for each in self.checkpoints for line in each.unchecked))

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON has it, with its verdicts."""
        fields = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {
            **fields,
            "verdict": self.verdict.value,
            "sound": self.is_sound,
            "damages": list(self.damages),
            "unchecked": list(self.unchecked),
            "files": [dataclasses.asdict(each) for each in self.files],
            "items": [dataclasses.asdict(each) for each in self.items],
            "checkpoints": [each.as_dict() for each in self.checkpoints],
        }

    def _lines(self, is_meant: Callable[[State], bool]) -> tuple[str, ...]:
        files = (each for each in self.files if is_meant(each.state))
        lines = [f"{self._join(each.path)} {each.detail or each.state.value}" for each in files]
        lines += [self._line(each) for each in self.items if is_meant(each.state)]
        return tuple(lines)

    def _line(self, item: ItemReport) -> str:
        piece = f" at {item.offsets}" if item.offsets else ""
        where = f"{self._join(item.path)} at {item.offset}" if item.path else self.path
        return f"{item.name}{piece} in {where}: {item.detail or item.state.value}"

    def _join(self, name: str) -> str:
        return f"{self.path}/{name}" if name else self.path


_WORDS = {
    Verdict.SOUND: "ok",
    Verdict.DAMAGED: "damaged",
    Verdict.UNCHECKED: "could not be checked",
    Verdict.INCOMPLETE: "incomplete: a save that has not ended, which no tracker names",
}


def lines_of(report: VerifyReport) -> Iterator[str]:
    """A line for each checkpoint, with the one that the trackers select marked; for a run, one more."""
    for each in report.checkpoints:
        yield from lines_of(each)
    yield f"{report.path}: {_summary(report)}"
    for note in report.notes:
        yield f"  {note}"


def _summary(report: VerifyReport) -> str:
    text = _WORDS[report.verdict]
    if report.checkpoints:
        return f"{text}, {_count(len(report.checkpoints), 'checkpoint')}"
    if report.is_selected:
        text += ", selected by the tracker"
    states = Counter(each.state for each in report.items)
    if damaged := sum(count for state, count in states.items() if state.is_damage):
        text += f", {damaged} of {_count(len(report.items), 'item')} affected"
    if unchecked := states[State.UNCHECKED]:
        text += f", {_count(unchecked, 'item')} could not be checked"
    if undecoded := states[State.UNDECODED]:
        text += f", {_count(undecoded, 'item')} of unknown classes were not decoded"
    if not report.deep and report.verdict is Verdict.SOUND:
        text += " (structure and lengths; --deep reads every byte)"
    return text


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
