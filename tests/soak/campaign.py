# SPDX-License-Identifier: Apache-2.0
"""What each rank does for minutes or hours: one thing after the other, all at random, all from one seed."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
import torch.distributed as dist

from tests.soak.doors import Doors
from tests.soak.faults import ERRORS, anywhere
from tests.soak.managed import Managed
from tests.soak.resources import Sample, Sampler
from tests.soak.runs import Runs, groups_kept
from tests.soak.state_dicts import StateDicts
from tests.soak.subject import Subject, settings

_SUBJECTS: dict[str, type[Subject]] = {
    "state dicts": StateDicts,
    "manager": Managed,
    "runs": Runs,
    "doors": Doors,
}
_LONGEST_STEP_S = 120
_STOP, _STEP, _SAMPLE = range(3)


@dataclass(frozen=True)
class Plan:
    """What to do.

    Attributes:
        seed: decides everything but the end.
        seconds: how long.
        steps: the end after so many steps instead.
        every_s: seconds from one sample to the next; with ``steps`` given, the steps from one to the next.
    """

    seed: int
    seconds: float = 0.0
    steps: int | None = None
    every_s: float = 30.0


@dataclass
class Outcome:
    """What a rank has seen."""

    steps: int = 0
    samples: list[Sample] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)


def soak(rank: int, directory: str, plan: Plan) -> Outcome:
    """Collective. Save and load below ``directory``, which all ranks have, until the plan is fulfilled."""
    spool = os.path.join(directory, f"temporary_{rank}")
    os.makedirs(spool, exist_ok=True)
    os.environ["CKPT_FAST_SPOOL"] = os.environ["TMPDIR"] = tempfile.tempdir = spool
    with contextlib.ExitStack() as stack:
        told = sys.stdout
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))
        stack.enter_context(warnings.catch_warnings())
        stack.enter_context(groups_kept())
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
        stack.callback(logging.disable, logging.NOTSET)
        stack.callback(faulthandler.cancel_dump_traceback_later)
        return _Campaign(directory, plan, spool, told).run()


class _Campaign:
    def __init__(self, directory: str, plan: Plan, spool: str, told: Any) -> None:
        self._plan, self._told = plan, told
        self._rank, self._ranks = dist.get_rank(), dist.get_world_size()
        checkpoints = os.path.join(directory, "checkpoints")
        self.outcome = Outcome()
        self._sampler = Sampler(checkpoints, spool)
        self._subjects = {
            name: kind(os.path.join(checkpoints, name.replace(" ", "_")), self.outcome.counts)
            for name, kind in _SUBJECTS.items()
        }
        self._begin = self._sampled = time.monotonic()

    def run(self) -> Outcome:
        for name, subject in self._subjects.items():
            subject.begin(self._chance(f"begin {name}"))
        while (order := self._order()) != _STOP:
            self.outcome.steps += 1
            self._step()
            if order == _SAMPLE:
                self._sample()
        for subject in self._subjects.values():
            subject.end()
        return self.outcome

    def _chance(self, what: str) -> Random:
        return Random(f"{self._plan.seed} {self._ranks} {what}")

    def _order(self) -> int:
        """Return what to do next; the first rank says it, because its clock counts."""
        steps, plan = self.outcome.steps, self._plan
        now = time.monotonic()
        if plan.steps is not None:
            order = _STOP if steps >= plan.steps else _STEP
            is_due = (steps + 1) % plan.every_s == 0
        else:
            order = _STOP if now - self._begin > plan.seconds else _STEP
            is_due = now - self._sampled > plan.every_s
        if order == _STEP and is_due:
            order = _SAMPLE
        found = torch.tensor(order)
        dist.broadcast(found, 0)
        if int(found) == _SAMPLE:
            self._sampled = now
        return int(found)

    def _step(self) -> None:
        chance = self._chance(f"step {self.outcome.steps}")
        name = chance.choice(sorted(self._subjects))
        subject, is_fine = self._subjects[name], True
        subject.doing = ""
        faulthandler.dump_traceback_later(_LONGEST_STEP_S, exit=True)
        with settings(chance) as chosen:
            try:
                subject.step(chance)
            except ERRORS:
                is_fine = False
                self._tell(f"PROBLEM {self._where(name)}\nwith {chosen}:\n{traceback.format_exc()}")
            if anywhere(not is_fine):
                self.outcome.problems.append(self._where(name))
                self._renew(subject, chance)
        faulthandler.dump_traceback_later(_LONGEST_STEP_S, exit=True)

    def _where(self, name: str) -> str:
        return (
            f"seed {self._plan.seed}, rank {self._rank} of {self._ranks}, step {self.outcome.steps}, {name}: "
            f"{self._subjects[name].doing}"
        )

    def _renew(self, subject: Subject, chance: Random) -> None:
        with contextlib.suppress(*ERRORS):
            subject.end()
        subject.begin(chance)

    def _sample(self) -> None:
        sample = self._sampler.sample(self.outcome.steps)
        self.outcome.samples.append(sample)
        counts = self.outcome.counts
        if self._rank == 0:
            self._tell(
                f"{sample.seconds / 60:6.1f} min, step {sample.steps}: {counts['saves']} saves, "
                f"{counts['loads']} loads, {sample.rss >> 20} MB, {sample.descriptors} descriptors, "
                f"{sample.threads} threads, {len(self.outcome.problems)} problems"
            )

    def _tell(self, line: str) -> None:
        self._told.write(f"{line}\n")
        self._told.flush()
