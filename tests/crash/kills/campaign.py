# SPDX-License-Identifier: Apache-2.0
"""Kills runs with SIGKILL, and checks what each kill has left.

All choices follow from a seed: what is killed, during which save, how far into it, and the settings of every
start. How far that is in milliseconds depends on the machine. The disk as the last kill left it is copied to
``PLACE/killed``.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from tests.crash.kills.run import GROUP_TIMEOUT_S, KINDS, Kind, Ledger, Start, live
from tests.crash.states.saving import ROOT, left_in
from tests.helpers import preloaded_processes

LIMIT_S = 2 * GROUP_TIMEOUT_S
KILLS_OF_A_RUN = 20
LAST_SAVES = 8  # of a run, undisturbed, after which nothing of its kills is left
_SHARED_MEMORY = "/dev/shm"


class NoGroupError(Exception):
    """The ranks did not find each other: see ``helpers.run_ranks``."""


def require(condition: object, text: str) -> None:
    if not condition:
        raise AssertionError(text)


@dataclass(frozen=True)
class Choice:
    """One kill.

    Attributes:
        first: the rank that is killed first.
        others_s: how much later the others are killed; None: they are left alone.
        save: during which save since the start; 0: while it resumes.
        part: how far into that, as a part of what it usually takes.
        native, fsync: settings of the run.
    """

    first: int
    others_s: float | None
    save: int
    part: float
    native: bool
    fsync: bool

    @classmethod
    def by(cls, chance: random.Random, ranks: int, kind: Kind) -> Choice:
        choice = cls(
            first=chance.randrange(ranks),
            others_s=chance.choice((None, 0.0, chance.uniform(0, 0.05), chance.uniform(0, 0.5))),
            save=chance.choice((0, 1, 1, 1, 2, 2, 2, 3)),
            part=chance.uniform(0, 1.2),
            native=chance.random() < 0.7,
            fsync=chance.random() < 0.5,
        )
        if kind.makes_groups and choice.save == 0 and choice.others_s is None:
            # torch waits minutes for a rank that does not come to make a group.
            return replace(choice, others_s=0.0)
        return choice

    @property
    def environment(self) -> dict[str, str]:
        return {"CKPT_FAST_NATIVE": str(int(self.native)), "CKPT_FAST_FSYNC": str(int(self.fsync))}


@dataclass
class Rank:
    """A rank's process, as its parent sees it.

    Attributes:
        told: what it has told so far: a word, and values.
    """

    process: Any
    connection: Connection
    told: list[tuple[Any, ...]] = field(default_factory=list)

    def listen(self) -> bool:
        """Take what it has told, the last of which a kill may cut short; return whether there may be more."""
        try:
            while self.connection.poll():
                self.told.append(self.connection.recv())
        except (EOFError, OSError):
            return False
        return True

    def all_told(self, what: str) -> list[tuple[Any, ...]]:
        return [each for each in self.told if each[0] == what]

    @property
    def doing(self) -> str:
        return str(self.told[-1][0]) if self.told else "start"


class Kills:
    """Runs that are killed over and over.

    Args:
        kind: of ``KINDS``.
        ranks: how many.
        place: an empty directory.
        seed: of all choices.

    Attributes:
        counts: what happened, and how often.
    """

    def __init__(self, kind: str, ranks: int, place: str, seed: int) -> None:
        self._kind, self._ranks, self._place = kind, ranks, place
        self._chance = random.Random(f"{kind}, {ranks}, {seed}")
        self._usual_s: dict[tuple[str, bool, bool], float] = {}
        self._processes: set[str] = set()
        self.counts: Counter[str] = Counter()

    def run(self, kills: int) -> Counter[str]:
        """Kill runs so often in all, each up to ``KILLS_OF_A_RUN`` times; return the counts.

        Raises:
            AssertionError: what was lost or left, and after which kill.
        """
        for first in range(0, kills, KILLS_OF_A_RUN):
            directory = os.path.join(self._place, str(first))
            for name in ("disk", "ledger", "temporary"):
                os.makedirs(os.path.join(directory, name))
            self._processes.clear()
            for number in range(first, min(first + KILLS_OF_A_RUN, kills)):
                choice = Choice.by(self._chance, self._ranks, KINDS[self._kind])
                try:
                    self._kill_once(directory, choice)
                except AssertionError as error:
                    raise AssertionError(f"{self._kind}, kill {number}, {choice}: {error}") from error
            self._end(directory)
            left = self._left(directory)
            require(not left, f"{self._kind}, after the run of kill {first}: {left} are left")
            shutil.rmtree(directory)
        return self.counts

    def _kill_once(self, directory: str, choice: Choice) -> None:
        try:
            self._kill(directory, choice)
        except NoGroupError:
            self._kill(directory, choice)

    def _kill(self, directory: str, choice: Choice) -> None:
        with self._started(directory, choice.environment) as ranks:
            first = ranks[choice.first]
            others = [each for each in ranks if each is not first]
            doing = ("save", choice.save) if choice.save else ("resume", 1)
            self._wait(ranks, lambda: len(first.all_told(doing[0])) >= doing[1])
            usual_s = self._usual_s.get((doing[0], choice.native, choice.fsync), 0.1)
            time.sleep(choice.part * usual_s)
            first.process.kill()
            if choice.others_s is not None:
                time.sleep(choice.others_s)
                for each in others:
                    each.process.kill()
            self._wait_for_ends(ranks)
            self._judge(ranks, first, [] if choice.others_s is not None else others)
        killed = os.path.join(self._place, "killed")
        shutil.rmtree(killed, ignore_errors=True)
        shutil.copytree(os.path.join(directory, "disk"), killed)
        self._measure(ranks, choice)
        self.counts["kills"] += 1
        self.counts[f"while it was at {first.doing!r}"] += 1
        if others:
            self.counts["of one rank" if choice.others_s is None else "of both ranks"] += 1

    def _end(self, directory: str) -> None:
        """Let the run resume, save undisturbed, and end."""
        with self._started(directory, {}, saves=LAST_SAVES) as ranks:
            self._wait_for_ends(ranks)
            failed = [text for each in ranks for _, *text in each.all_told("failed")]
            ended = [each.process.exitcode for each in ranks]
            require(
                ended == [0] * len(ranks), f"{self._kind}, the run that was left alone: {ended}, {failed}"
            )

    @contextmanager
    def _started(
        self, directory: str, environment: dict[str, str], saves: int | None = None
    ) -> Iterator[list[Rank]]:
        """Yield new ranks; none of them is left."""
        ledger = Ledger(os.path.join(directory, "ledger"))
        environment = {**environment, "TMPDIR": os.path.join(directory, "temporary")}
        start = Start(self._kind, self._ranks, directory, environment, ledger.lowest, ledger.highest, saves)
        context = preloaded_processes()
        with tempfile.TemporaryDirectory(prefix="ranks_") as meeting:
            ranks = []
            for rank in range(self._ranks):
                ours, theirs = context.Pipe()
                arguments = (rank, start, os.path.join(meeting, "rendezvous"), theirs)
                process = context.Process(target=live, args=arguments)
                process.start()
                self._processes.add(str(process.pid))
                theirs.close()
                ranks.append(Rank(process, ours))
            try:
                yield ranks
            finally:
                for each in ranks:
                    each.process.kill()
                    each.process.join()
                    each.connection.close()

    @staticmethod
    def _wait(ranks: list[Rank], condition: Callable[[], bool]) -> None:
        """Wait until the ranks have told something, which all of them are alive for."""
        deadline = time.monotonic() + LIMIT_S
        while True:
            alive = [each for each in ranks if each.listen()]
            if condition():
                return
            if any(each.all_told("no group") for each in ranks):
                raise NoGroupError
            require(time.monotonic() < deadline, f"the run hangs: {[each.doing for each in ranks]}")
            require(alive == ranks, f"the run ended by itself: {[each.told[-1:] for each in ranks]}")
            wait([each.connection for each in alive], timeout=1.0)

    @staticmethod
    def _wait_for_ends(ranks: list[Rank]) -> None:
        deadline = time.monotonic() + LIMIT_S
        running = list(ranks)
        while running:
            running = [each for each in running if each.listen()]
            require(time.monotonic() < deadline, f"a rank hangs at {[each.doing for each in running]}")
            wait([each.connection for each in running], timeout=1.0)
        for each in ranks:
            each.process.join()

    def _judge(self, ranks: list[Rank], first: Rank, left: list[Rank]) -> None:
        """Check what the ranks had resumed from, and how those ended that the kill was to leave alone."""
        versions = {version for each in ranks for _, _, version in each.all_told("resumed")}
        require(len(versions) < 2, f"the ranks have resumed from different saves: {versions}")
        for each in ranks:
            for _, doing, kind, text in each.all_told("failed"):
                require(
                    each is not first and kind != "AssertionError", f"it failed at {doing!r}: {kind}: {text}"
                )
                is_told = kind == "ours" or doing in ("start", "train")
                require(is_told, f"the other rank is told, at {doing!r}: {kind}: {text}")
                self.counts[f"the other rank was told at {doing!r}"] += each in left
        for each in left:
            require(
                each.all_told("failed"),
                f"the other rank ended with {each.process.exitcode} at {each.doing!r}",
            )

    def _measure(self, ranks: list[Rank], choice: Choice) -> None:
        for told, doing in (("saved", "save"), ("resumed", "resume")):
            for each in ranks:
                for _, seconds, *_ in each.all_told(told):
                    self._usual_s[doing, choice.native, choice.fsync] = seconds

    def _left(self, directory: str) -> list[str]:
        """Return what should not be left after undisturbed saves."""
        kind, disk = KINDS[self._kind], os.path.join(directory, "disk")
        left = os.listdir(os.path.join(directory, "temporary"))
        # Other runs on this machine have theirs.
        left += [each for each in os.listdir(_SHARED_MEMORY) if self._processes.intersection(each.split("-"))]
        return left + left_in(disk) + too_many(kind, disk, self._ranks)


def too_many(kind: Kind, disk: str, ranks: int) -> list[str]:
    """Return directories that have more checkpoints than they should, and checkpoints that are not sealed."""
    root, wrong, checkpoints = os.path.join(disk, ROOT), [], 0
    for place in (root, os.path.join(root, "non_persistent")):
        found = iterations_in(place)
        checkpoints += len(found)
        if kind.keeps is not None and len(found) > kind.keeps:
            wrong.append(f"{place}: {found}")
        wrong += [path for path in found if not os.path.exists(os.path.join(place, path, "metadata.json"))]
    states = iterations_in(os.path.join(root, "energon"))
    if len(states) > checkpoints + 2:
        wrong.append(f"positions in the data: {states}")
    local = [path for path, _, names in os.walk(os.path.join(disk, "local")) if ".metadata" in names]
    if len(local) > (ranks * ranks if kind.makes_groups else ranks):
        wrong.append(f"local: {local}")
    return wrong


def iterations_in(directory: str) -> list[str]:
    """Return the names of the directories for iterations, in order."""
    with suppress(FileNotFoundError):
        return sorted(name for name in os.listdir(directory) if name.startswith("iter_"))
    return []
