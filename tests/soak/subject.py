# SPDX-License-Identifier: Apache-2.0
"""What a campaign saves and loads in turns, each with its own directory and its own expectations."""

from __future__ import annotations

import contextlib
import os
import shutil
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch.distributed as dist

from ckpt_fast import native
from tests.soak.faults import ERRORS, Fault, anywhere, is_refusal
from tests.soak.resources import settle

_SETTINGS: dict[str, tuple[str | None, ...]] = {
    "CKPT_FAST_FSYNC": (None, "0", "0"),
    "CKPT_FAST_DIRECT": (None, None, "0"),
    "CKPT_FAST_THREADS": (None, "1", "4"),
    "CKPT_FAST_CHUNK": (None, "64K"),
    "CKPT_FAST_HOST_BUFFER": (None, None, "1M", "256K"),
    "CKPT_FAST_RETRIES": ("0", None),
}


class Subject(ABC):
    """One way to save and load, with what it has saved.

    Everything that chance decides is the same on all ranks.

    Args:
        root: its directory; nothing else is in it.
        counts: of saves, loads, faults and so on, by name.

    Attributes:
        doing: what it is at, for the report of a problem.
    """

    def __init__(self, root: str, counts: Counter[str]) -> None:
        self.root, self.counts = root, counts
        self.doing = ""

    @abstractmethod
    def step(self, chance: Random) -> None:
        """Save, load, damage or verify something.

        Raises:
            AssertionError: a load is not what was saved, or the like.
            Exception: what should have succeeded has failed.
        """

    @abstractmethod
    def begin(self, chance: Random) -> None:
        """Collective. Start with an empty directory."""

    def end(self) -> None:  # noqa: B027
        """Collective. Let go of everything, whatever has happened before."""

    def empty(self) -> None:
        """Collective. Delete all that was saved."""
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(self.root, ignore_errors=True)
            os.makedirs(self.root)
        dist.barrier()

    def attempt(self, chance: Random, fault: Fault | None, action: Callable[[], object]) -> bool:
        """Collective. Act, with a fault if there is one; return whether that succeeded on all ranks.

        Raises:
            Exception: it failed without a fault, in a way that no fault may have, or on one rank only.
        """
        if fault is None:
            action()
            return True
        self.doing += f", {fault.__name__}"
        refusal: BaseException | None = None
        try:
            if fault(chance, action):
                self.counts[f"fault: {fault.__name__}"] += 1
        except ERRORS as error:
            if not is_refusal(error):
                raise
            refusal = error
            self.counts[f"fault: {fault.__name__}"] += 1
        has_failed = refusal is not None
        everywhere = not anywhere(not has_failed)
        assert everywhere == anywhere(has_failed), f"it fails on one rank only: {refusal!r}"
        if refusal is not None:
            self.counts["refused"] += 1
            settle()
        return not has_failed


@contextlib.contextmanager
def settings(chance: Random) -> Iterator[str]:
    """A block with settings and an implementation at random; yields what they are."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    chosen = {name: chance.choice(values) for name, values in _SETTINGS.items()}
    implementation: Any = chance.choice(("engine", "engine", "fallback"))
    try:
        _set(chosen)
        with native.using(implementation):
            said = [f"{name}={value}" for name, value in chosen.items() if value is not None]
            yield " ".join([implementation, *said])
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
