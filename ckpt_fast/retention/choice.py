# SPDX-License-Identifier: Apache-2.0
"""The choice of what is deleted: policies decide about the line of the selected checkpoint.

Whatever they say, these stay: what the trackers name, what is newer than the last published save and may be
in the making, and what the caller protects because a save in flight came from it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ckpt_fast.retention.policies import KeepIf, KeepNewest, MaxBytes, Policy
from ckpt_fast.retention.stored import Stored

S = TypeVar("S", bound=Stored)


@dataclass(frozen=True)
class Choice(Generic[S]):
    """What retention does with the checkpoints of a directory, each list oldest first.

    Attributes:
        removed: those to delete.
        kept: those that stay, but for what is too new to be judged.
        abandoned: those that an abandoned branch has left, whether they are deleted or stay.
    """

    removed: list[S]
    kept: list[S]
    abandoned: list[S]


def choose(
    found: Sequence[S],
    policies: Sequence[Policy],
    selected: int | None,
    *,
    protected: Collection[int] = (),
    with_abandoned: bool = False,
) -> Choice[S]:
    """Local. What stays of the checkpoints in a directory, and what goes.

    Checkpoints of an abandoned branch are not seen by policies other than ``KeepIf``. They go once they are
    older than the selected one, newer ones with ``with_abandoned`` only.

    Args:
        found: all that are there, oldest first.
        policies: a checkpoint stays if one of them keeps it. Without any but limits, all stay.
        selected: the iteration that was published last; newer ones may be in the making. None: nobody knows
            of any.
        protected: iterations that stay in any case.
        with_abandoned: delete newer ones that an abandoned branch has left as well.
    """
    line = next((each.line for each in found if each.iteration == selected), None)
    left: set[S] = set()
    if line is not None and selected is not None:
        left = {
            each
            for each in found
            if each.is_compared and line.has_left(selected, each.iteration, each.line) and each.is_sealed
        }
    old = [each for each in found if selected is None or each.iteration <= selected]
    safe: set[Any] = {each for each in found if each.iteration == selected or each.iteration in protected}
    exempt = [each for each in policies if isinstance(each, KeepIf)]
    sealed = [each for each in found if each.is_sealed] if exempt else []
    for policy in exempt:
        safe.update(policy.keeps(sealed))
    kept = safe | _within(_kept(old, left, policies), safe.intersection(old), policies)
    condemned = left.union(old) if with_abandoned else set(old)
    return Choice(
        [each for each in found if each in condemned and each not in kept],
        [each for each in old if each in kept],
        [each for each in found if each in left],
    )


def _kept(old: Sequence[S], left: Collection[S], policies: Sequence[Policy]) -> set[S]:
    """What the policies keep, before limits."""
    newest_first = [each for each in reversed(old) if each not in left and each.is_sealed]
    keepers = [each for each in policies if not isinstance(each, (KeepIf, MaxBytes))]
    if not keepers:
        return set(newest_first)
    kept: set[S] = set()
    for policy in keepers:
        chosen: set[Any] = set(policy.keeps(newest_first))
        if not chosen and isinstance(policy, KeepNewest):
            # There is nothing to compare with: the newest may be of a kind that is not known here.
            chosen.update(old[max(0, len(old) - policy.count) :])
        kept |= chosen
    return kept


def _within(kept: set[S], safe: Collection[S], policies: Sequence[Policy]) -> set[S]:
    """The newest of ``kept`` that fit into the limits beside ``safe``."""
    limits = [each.nbytes for each in policies if isinstance(each, MaxBytes)]
    if not limits:
        return kept
    room = min(limits) - sum(each.nbytes for each in safe)
    fitting: set[S] = set()
    for each in sorted(kept - set(safe), key=lambda each: each.iteration, reverse=True):
        room -= each.nbytes
        if room < 0:
            break
        fitting.add(each)
    return fitting
