# SPDX-License-Identifier: Apache-2.0
"""Policies, alone and together, and what stays whatever they say."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import KeepBest, KeepEvery, KeepFor, KeepIf, KeepNewest, MaxBytes
from ckpt_fast.format.manifest import FOOTER_NBYTES, head_of
from ckpt_fast.retention.choice import Choice, choose
from ckpt_fast.retention.line import Lineage, Origin, line_in
from ckpt_fast.retention.policies import Policy, require_policies
from ckpt_fast.retention.stored import Stored, head_at
from tests.retention.directories import found_in, write


def iterations(found: Sequence[Stored]) -> list[int]:
    return [each.iteration for each in found]


def kept(root: Path, *policies: Policy, selected: int | None = None, **options: Any) -> list[int]:
    return iterations(chosen(root, *policies, selected=selected, **options).kept)


def chosen(root: Path, *policies: Policy, selected: int | None = None, **options: Any) -> Choice[Stored]:
    return choose(found_in(root), policies, selected, **options)


@pytest.fixture
def ten(tmp_path: Path) -> Path:
    """Return a directory of iterations 1 to 10, 100 s apart, with losses that are lowest in 4."""
    for iteration in range(1, 11):
        write(
            tmp_path,
            iteration,
            {"metrics": {"loss": abs(iteration - 4)}} if iteration != 9 else {},
            age_s=100.0 * (10 - iteration),
        )
    return tmp_path


def test_each_policy(ten: Path) -> None:
    assert kept(ten, KeepNewest(3)) == [8, 9, 10]
    assert kept(ten, KeepEvery(4)) == [4, 8]
    assert kept(ten, KeepBest(2)) == [4, 5], "of two equal ones the newer"
    assert kept(ten, KeepBest(1, highest=True)) == [10]
    assert kept(ten, KeepBest(2, "accuracy")) == list(range(1, 11)), "nobody noted it: all may be the best"
    assert kept(ten, KeepFor(250)) == [8, 9, 10]
    assert kept(ten, KeepNewest(0), KeepIf(lambda each: each.iteration in (2, 7))) == [2, 7]


def test_policies_together_keep_what_one_of_them_keeps(ten: Path) -> None:
    assert kept(ten, KeepNewest(2), KeepEvery(5), KeepBest(1)) == [4, 5, 9, 10]
    assert kept(ten) == list(range(1, 11)), "none asks for a deletion"


def test_a_limit_deletes_the_oldest_first(ten: Path) -> None:
    size = found_in(ten)[0].nbytes + 20  # some have longer notes
    assert kept(ten, MaxBytes(3 * size)) == [8, 9, 10]
    assert kept(ten, KeepEvery(2), MaxBytes(3 * size)) == [6, 8, 10]
    assert kept(ten, MaxBytes(3 * size), KeepIf(lambda each: each.iteration == 1)) == [1, 9, 10]
    assert kept(ten, MaxBytes(3 * size), MaxBytes(2 * size)) == [9, 10]
    assert kept(ten, MaxBytes(0), selected=10) == [10]


def test_what_stays_whatever_the_policies_say(ten: Path) -> None:
    choice = chosen(ten, KeepNewest(0), selected=7, protected=[3])
    assert iterations(choice.kept) == [3, 7]
    assert iterations(choice.removed) == [1, 2, 4, 5, 6], "newer ones may be in the making"


def test_what_is_not_whole_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, 1, {"metrics": {"loss": 2}})
    write(tmp_path, 2, {"metrics": {"loss": 1}}, whole=False)
    write(tmp_path, 4, sealed=False)
    write(tmp_path, 5)
    assert kept(tmp_path, KeepNewest(2), selected=5) == [1, 5]
    assert kept(tmp_path, KeepBest(1), selected=5) == [1, 5]
    assert kept(tmp_path, KeepEvery(2), selected=5) == [2, 5], "a seal is enough to be a milestone"
    assert kept(tmp_path, selected=5) == [1, 2, 5]


def test_nothing_is_looked_up_that_no_policy_asks_for(ten: Path) -> None:
    class Careful(Stored):
        @property
        def is_whole(self) -> bool:  # type: ignore[override]
            assert self.iteration >= 9, "each costs reading all of .metadata"
            return super().is_whole

        @property
        def nbytes(self) -> int:  # type: ignore[override]
            raise AssertionError("no limit was given")

    found = [Careful(each.iteration, each.path) for each in found_in(ten)]
    assert iterations(choose(found, [KeepNewest(2), KeepEvery(5)], 10).kept) == [5, 9, 10]


@pytest.fixture
def rolled_back(tmp_path: Path) -> Path:
    """Return iterations 1, 2, 3 and 9 of a run, and 4 and 5, which went on from 2."""
    first = Lineage()
    notes = {iteration: first.notes(iteration) for iteration in (1, 2, 3, 9)}
    second = Lineage(Origin(2, "id", line_in(notes[2])))
    notes |= {iteration: second.notes(iteration) for iteration in (4, 5)}
    for iteration, each in notes.items():
        write(tmp_path, iteration, each)
    return tmp_path


def test_policies_follow_the_line(rolled_back: Path) -> None:
    choice = chosen(rolled_back, KeepNewest(2), selected=4)
    assert iterations(choice.kept) == [2, 4]
    assert iterations(choice.removed) == [1, 3]
    assert iterations(choice.abandoned) == [3, 9]
    assert kept(rolled_back, KeepEvery(3), selected=5) == [5]


def test_newer_ones_of_an_abandoned_branch_stay_unless_they_are_meant(rolled_back: Path) -> None:
    assert 9 not in iterations(chosen(rolled_back, KeepNewest(5), selected=5).removed)
    choice = chosen(rolled_back, selected=4, with_abandoned=True)
    assert iterations(choice.removed) == [3, 9], "5 goes on from 4, and may be in the making"
    exempt = chosen(rolled_back, KeepIf(lambda each: each.iteration == 3), selected=4, with_abandoned=True)
    assert iterations(exempt.removed) == [9]


def test_checkpoints_without_notes_are_as_before(tmp_path: Path) -> None:
    for iteration in (1, 2, 3):
        write(tmp_path, iteration)
    assert kept(tmp_path, KeepNewest(2), selected=3) == [2, 3]
    assert chosen(tmp_path, KeepNewest(2), selected=3).abandoned == []


def test_another_line_without_anything_in_common_counts(tmp_path: Path) -> None:
    """It may be of another run, or of this one after a load that was not noted: nothing tells."""
    for lineage, steps in ((Lineage(), (1, 2, 3, 4, 5, 6)), (Lineage(), (7,))):
        for step in steps:
            write(tmp_path, step, lineage.notes(step))
    assert kept(tmp_path, KeepNewest(3), KeepEvery(2), selected=7) == [2, 4, 5, 6, 7]
    assert chosen(tmp_path, KeepNewest(3), selected=7, with_abandoned=True).abandoned == []


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_is_an_error_and_no_reason_to_delete(
    ten: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    original = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if "iter_0000004" in os.fspath(path):
            raise OSError(code, os.strerror(code), path)
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(OSError, match=os.strerror(code)):
        chosen(ten, KeepBest(1), selected=10)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepNewest(-1),
        lambda: KeepEvery(0),
        lambda: KeepBest(-1),
        lambda: KeepFor(-1.0),
        lambda: MaxBytes(-1),
        lambda: require_policies([3]),
        lambda: require_policies(KeepNewest),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"negative|positive|is no policy"):
        make()


def test_the_head_of_a_manifest(tmp_path: Path) -> None:
    directory = write(tmp_path, 1, {"a": [1, 2]})
    head = head_at(str(directory))
    assert head is not None and head.notes == {"a": [1, 2]} and len(head.save_id) == 32
    content = (directory / ".metadata").read_bytes()

    def of(damaged: bytes) -> Any:
        return head_of(lambda offset, nbytes: damaged[offset : offset + nbytes], len(damaged))

    assert of(content) == head
    assert of(b"") is None and of(content[:-1]) is None and of(content[-FOOTER_NBYTES:]) is None
    assert of(content[1:]) is None, "the parts must add up"
    for position in range(len(content)):
        of(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
    assert head_at(str(tmp_path / "nowhere")) is None
