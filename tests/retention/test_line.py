# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints led to which, whatever has been resumed, rolled back and deleted in the meantime."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from ckpt_fast.retention.line import (
    Line,
    Lineage,
    Noted,
    Origin,
    line_in,
    metrics_in,
    metrics_note,
    newest_of,
    noted_in,
    resumed_from_in,
    without_superseded,
)


def noted(lineage: Lineage, iteration: int) -> Line:
    """Return the line that a checkpoint has noted, as it is read."""
    line = line_in(json.loads(json.dumps(lineage.notes(iteration))))
    assert line is not None
    return line


def resumed(iteration: int, line: Line | None) -> Lineage:
    return Lineage(Origin(iteration, "an id", line))


def test_a_run_that_was_never_interrupted() -> None:
    run = Lineage()
    lines = {iteration: noted(run, iteration) for iteration in (1, 2, 3)}
    assert all(lines[3].holds(iteration, lines[iteration]) for iteration in (1, 2, 3))
    assert not lines[2].holds(3, lines[3])
    assert not lines[2].has_left(2, 3, lines[3]), "the next one is no branch"


def test_after_a_roll_back_what_was_left_is_no_part_of_the_line() -> None:
    first = Lineage()
    lines = {iteration: noted(first, iteration) for iteration in (1, 2, 3, 9)}
    second = resumed(2, lines[2])
    four = noted(second, 4)
    assert [four.holds(iteration, lines[iteration]) for iteration in (1, 2, 3, 9)] == [
        True,
        True,
        False,
        False,
    ]
    assert [four.has_left(4, iteration, lines[iteration]) for iteration in (1, 2, 3, 9)] == [
        False,
        False,
        True,
        True,
    ]
    third = resumed(4, four)
    five = noted(third, 5)
    assert five.holds(4, four) and five.holds(2, lines[2]) and not five.holds(3, lines[3])
    assert not lines[3].has_left(3, 2, lines[2]) and lines[3].has_left(3, 4, four)


def test_two_branches_from_one_checkpoint_are_two() -> None:
    base = noted(Lineage(), 10)
    one, other = (noted(resumed(10, base), 12) for _ in range(2))
    assert one.has_left(12, 12, other) and one.holds(10, base) and other.holds(10, base)


def test_a_save_of_the_iteration_that_was_resumed_is_no_branch() -> None:
    """Nothing was trained in between: it is what was resumed, saved once more."""
    first = Lineage()
    two = noted(first, 2)
    again = noted(resumed(2, two), 2)
    three = noted(resumed(2, two), 3)
    assert again.holds(2, two) and not three.has_left(3, 2, again) and not two.has_left(2, 2, again)
    assert not Noted(2, two).supersedes(Noted(2, again)) and not Noted(2, again).supersedes(Noted(2, two))
    later = noted(resumed(2, again), 4)
    assert later.holds(2, two) and later.holds(2, again) and later.has_left(4, 3, three)
    assert again.has_left(2, 3, three), "what followed before has been left"


def test_what_was_saved_before_lines_were_noted_counts_up_to_where_the_run_was_resumed() -> None:
    run = resumed(20, None)
    line = noted(run, 30)
    assert line.holds(10, None) and line.holds(20, None)
    assert not line.holds(25, None) and line.has_left(30, 25, None)
    assert not line.has_left(30, 40, None), "somebody else may be saving it"
    assert noted(Lineage(), 30).holds(25, None), "nothing says that it was left"


def test_going_back_without_a_load_begins_a_branch() -> None:
    run = Lineage()
    five, three = noted(run, 5), noted(run, 3)
    assert three.has_left(3, 5, five)
    again = noted(run, 3)
    assert again == three, "the same iteration may be saved twice"


def test_going_back_further_than_the_origin_leaves_the_legs_in_between() -> None:
    first = Lineage()
    ten = line_in(first.notes(10))
    resumed = Lineage(Origin(10, "id", ten))
    resumed.notes(12)
    five = line_in(resumed.notes(5))
    eleven = line_in(resumed.notes(11))
    assert five is not None and eleven is not None
    assert not eleven.holds(10, ten) and eleven.has_left(11, 10, ten)
    assert eleven.holds(5, five)


def test_resumed_from_is_noted() -> None:
    assert resumed_from_in(Lineage().notes(1)) is None
    notes = resumed(7, None).notes(8)
    assert line_in(notes, 8) is not None and line_in(notes, 9) is None, "a copy of another name"
    assert resumed_from_in(notes) == 7 and notes["resumed_from"]["save_id"] == "an id"


def place(lineage: Lineage, iteration: int, saved_at: float | None = None) -> Noted:
    return Noted(iteration, noted(lineage, iteration), saved_at)


def test_which_of_two_branches_was_begun_later() -> None:
    first = Lineage()
    two, nine = place(first, 2), place(first, 9)
    assert not nine.supersedes(two) and not two.supersedes(nine), "one came from the other"
    four = place(resumed(2, two.line), 4)
    assert four.supersedes(nine) and not nine.supersedes(four), "whatever the iterations"
    three, eight = place(resumed(2, two.line), 3, 30.0), place(resumed(2, two.line), 8, 20.0)
    assert three.supersedes(eight) and not eight.supersedes(three), "of two that left one leg, the later"
    eight = eight._replace(saved_at=None)
    assert eight.supersedes(three) and not three.supersedes(eight), "as if there were no lines"
    other = place(Lineage(), 5, 99.0)
    assert not other.supersedes(nine) and not nine.supersedes(other), "nothing in common"
    assert not Noted(5).supersedes(nine) and not nine.supersedes(Noted(5))
    assert without_superseded([two, nine, four], lambda each: each) == [two, four]
    assert newest_of([nine, four, two], lambda each: each, lambda each: True) == four
    assert newest_of([nine, four, two], lambda each: each, lambda each: each != four) == nine
    assert newest_of([], lambda each: each, lambda each: True) is None


def test_what_a_run_may_be_about_to_select() -> None:
    first = Lineage()
    two, seven, nine = place(first, 2, 1.0), place(first, 7, 2.0), place(first, 9, 3.0)
    four = place(resumed(2, two.line), 4, 4.0)
    assert four.may_succeed(nine) and not nine.may_succeed(four)
    assert not seven.may_succeed(nine), "it is on the line"
    assert not four.may_succeed(Noted(9)) and not Noted(4).may_succeed(nine)
    older = place(resumed(2, None), 4)
    assert older.may_succeed(Noted(9)) and not older.may_succeed(Noted(2)), "of a version that noted none"


@pytest.mark.parametrize("value", [None, "1", True, float("nan"), [1]])
def test_times_that_make_no_sense_are_none(value: Any) -> None:
    assert noted_in({"saved_at": value}, 3) == Noted(3)


@pytest.mark.parametrize(
    "notes",
    [
        {},
        {"line": []},
        {"line": "x"},
        {"line": [["a"]]},
        {"line": [["a", -1]]},
        {"line": [["a", True]]},
        {"line": [[3, 3]]},
        {"resumed_from": 3},
        {"resumed_from": {"iteration": "3"}},
    ],
)
def test_notes_that_make_no_sense_are_none(notes: dict[str, Any]) -> None:
    assert line_in(notes) is None and resumed_from_in(notes) is None


def test_metrics() -> None:
    note = metrics_note({"loss": torch.tensor(1.5), "nan": float("nan"), "count": 3})
    assert metrics_in(json.loads(json.dumps(note))) == {"loss": 1.5, "count": 3.0}
    assert metrics_note(None) == {} and metrics_in({"metrics": [1]}) == {}
    for wrong in ({"loss": "low"}, {"loss": torch.ones(2)}, {"loss": None}):
        with pytest.raises(ValueError, match="metrics must be numbers"):
            metrics_note(wrong)
