# SPDX-License-Identifier: Apache-2.0
"""Policies of retention: each names checkpoints that stay. What none of several keeps is deleted."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol


class StoredCheckpoint(Protocol):
    """What a policy can ask of a checkpoint. Anything beyond iteration and path is looked up when asked for.

    Attributes:
        iteration: the training step.
        path: its own directory, or URL.
        nbytes: bytes of its files.
        age_s: seconds since it was completed; None where the storage does not say.
        metrics: what was saved with it, by name: numbers only.
        is_whole: whether all its files are there with their lengths, and the small ones are sound.
    """

    @property
    def iteration(self) -> int: ...
    @property
    def path(self) -> str: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def age_s(self) -> float | None: ...
    @property
    def metrics(self) -> dict[str, float]: ...
    @property
    def is_whole(self) -> bool: ...


@dataclass(frozen=True)
class KeepNewest:
    """Keep the newest checkpoints.

    Args:
        count: how many; only whole ones count.

    Raises:
        ValueError: it is negative.
    """

    count: int

    def __post_init__(self) -> None:
        _require(self.count >= 0, self, "count must not be negative")

    def keeps(self, found: Sequence[StoredCheckpoint]) -> Iterable[StoredCheckpoint]:
        """Those that stay, of ``found``, newest first."""
        return islice((each for each in found if each.is_whole), self.count)


@dataclass(frozen=True)
class KeepEvery:
    """Keep checkpoints whose iteration is a multiple of a number.

    Args:
        iterations: that number.

    Raises:
        ValueError: it is not positive.
    """

    iterations: int

    def __post_init__(self) -> None:
        _require(self.iterations > 0, self, "iterations must be positive")

    def keeps(self, found: Sequence[StoredCheckpoint]) -> Iterable[StoredCheckpoint]:
        """Those that stay, of ``found``, newest first."""
        return (each for each in found if each.iteration % self.iterations == 0)


@dataclass(frozen=True)
class KeepBest:
    """Keep the checkpoints with the best values of a metric that was saved with them.

    Those without the metric, or with NaN, are never among them. If none has it, all stay: nobody can tell
    which is the best. Of equal ones the newer is better.

    Args:
        count: how many; only whole ones count.
        metric: its name.
        highest: the highest value is the best; False: the lowest.

    Raises:
        ValueError: ``count`` is negative.
    """

    count: int
    metric: str = "loss"
    highest: bool = False

    def __post_init__(self) -> None:
        _require(self.count >= 0, self, "count must not be negative")

    def keeps(self, found: Sequence[StoredCheckpoint]) -> Iterable[StoredCheckpoint]:
        """Those that stay, of ``found``, newest first."""
        sign = -1.0 if self.highest else 1.0
        ranked = [
            (sign * each.metrics[self.metric], number)
            for number, each in enumerate(found)
            if self.metric in each.metrics
        ]
        if not ranked:
            return found
        heapq.heapify(ranked)
        best = (found[heapq.heappop(ranked)[1]] for _ in range(len(ranked)))
        return islice((each for each in best if each.is_whole), self.count)


@dataclass(frozen=True)
class KeepFor:
    """Keep checkpoints until they reach an age. Where the storage does not say their age, all stay.

    Args:
        seconds: that age.

    Raises:
        ValueError: it is negative.
    """

    seconds: float

    def __post_init__(self) -> None:
        _require(self.seconds >= 0, self, "seconds must not be negative")

    def keeps(self, found: Sequence[StoredCheckpoint]) -> Iterable[StoredCheckpoint]:
        """Those that stay, of ``found``, newest first."""
        return (each for each in found if each.age_s is None or each.age_s <= self.seconds)


@dataclass(frozen=True)
class KeepIf:
    """Exempt checkpoints: they stay, of abandoned branches and beyond ``MaxBytes`` as well.

    Args:
        predicate: called with a ``StoredCheckpoint``, says whether it stays. If it raises, nothing is
            deleted.
    """

    predicate: Callable[[StoredCheckpoint], bool]

    def keeps(self, found: Sequence[StoredCheckpoint]) -> Iterable[StoredCheckpoint]:
        """Those that stay, of ``found``."""
        return (each for each in found if self.predicate(each))


@dataclass(frozen=True)
class MaxBytes:
    """A limit on what the other policies keep; without others, on all that is whole. The oldest go first.

    The selected checkpoint and those that ``KeepIf`` exempts count, but stay. What is being saved does not
    count.

    Args:
        nbytes: of the files of all checkpoints in the directory.

    Raises:
        ValueError: it is negative.
    """

    nbytes: int

    def __post_init__(self) -> None:
        _require(self.nbytes >= 0, self, "nbytes must not be negative")


Policy = KeepNewest | KeepEvery | KeepBest | KeepFor | KeepIf | MaxBytes


def require_policies(policies: Any) -> list[Policy]:
    """A list of policies as such; empty for None.

    Raises:
        ValueError: it holds something else.
    """
    found = list(policies) if isinstance(policies, Iterable) else [policies]
    for each in () if policies is None else found:
        if not isinstance(each, Policy):
            raise ValueError(
                f"retention={policies!r}: {each!r} is no policy. Use a list of ckpt_fast.KeepNewest, "
                "KeepEvery, KeepBest, KeepFor, KeepIf and MaxBytes"
            )
    return [] if policies is None else found


def _require(condition: bool, policy: Any, message: str) -> None:
    if not condition:
        raise ValueError(f"{policy}: {message}")
