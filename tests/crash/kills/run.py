# SPDX-License-Identifier: Apache-2.0
"""A run that saves without end, until it is killed: what its ranks do.

Every save has a version, counted across kills. Before a rank saves, it notes in a ledger beside the disk what
the checkpoint is to contain; after the call has returned, it notes that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

from ckpt_fast import last_report
from ckpt_fast.errors import CheckpointError
from tests.crash.states.saving import BACKGROUND, BOUND, Scenario, Training, job_of, wait_for_deletions

GROUP_TIMEOUT_S = 30.0
_REMEMBERED = 12  # versions whose contents a rank compares with what it finds


@dataclass(frozen=True)
class Kind:
    """How a run saves.

    Attributes:
        config: fields of CheckpointConfig.
        times: how often each iteration is saved.
        persistent: one save in this many is persistent; the others are for recovery only.
        least_ranks: how many ranks it needs.
    """

    config: dict[str, Any] = field(default_factory=dict)
    times: int = 1
    persistent: int = 1
    least_ranks: int = 1

    @property
    def keeps(self) -> int | None:
        """Return how many persistent checkpoints are kept; None for all."""
        return self.config.get("most_recent_k")

    @property
    def is_local(self) -> bool:
        return self.config.get("non_persistent_ckpt_type") == "local"

    @property
    def makes_groups(self) -> bool:
        """Return whether ranks make process groups before they resume, for replicas."""
        return bool(self.config.get("replication"))


KINDS = {
    "synchronous": Kind(),
    "background": Kind({"most_recent_k": 3, **BACKGROUND}),
    "overwriting": Kind({"most_recent_k": 3}, times=2),
    "overwriting in the background": Kind({"most_recent_k": 1, **BACKGROUND}, times=2),
    "retention": Kind({"most_recent_k": 1}),
    "recovery": Kind({"most_recent_k": 2, "non_persistent_ckpt_type": "global"}, persistent=4),
    "recovery in the background": Kind(
        {"most_recent_k": 2, "non_persistent_ckpt_type": "global", **BACKGROUND}, persistent=4
    ),
    "local": Kind({"most_recent_k": 2, "non_persistent_ckpt_type": "local"}, persistent=4),
    "local in the background": Kind(
        {"most_recent_k": 2, "non_persistent_ckpt_type": "local", **BACKGROUND}, persistent=4
    ),
    "local with replicas": Kind(
        {
            "most_recent_k": 2,
            "non_persistent_ckpt_type": "local",
            "replication": True,
            "replication_jump": 1,
            **BACKGROUND,
        },
        persistent=4,
        least_ranks=2,
    ),
    "bounded memory": Kind({"most_recent_k": 3, "host_buffer_bytes": BOUND, **BACKGROUND}),
    "constant structure": Kind({"most_recent_k": 3, "ckpt_assume_constant_structure": True, **BACKGROUND}),
    "several files": Kind({"most_recent_k": 3, "storage_writers_per_rank": 3}, times=2),
}


class Ledger:
    """What was to be saved, and which saves returned. It outlives a kill."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, exist_ok=True)

    def begin(self, version: int, rank: int, expected: dict[str, Any]) -> None:
        """Note what a rank is about to save."""
        path = os.path.join(self._directory, f"{version}.{rank}")
        torch.save(expected, f"{path}.new")
        os.rename(f"{path}.new", f"{path}.begun")

    def end(self, version: int) -> None:
        """Note that the call has returned on a rank, or that the version was loaded."""
        with open(os.path.join(self._directory, f"{version}.returned"), "w"):
            pass

    def begun(self, rank: int) -> dict[int, dict[str, Any]]:
        """Return what the last versions were to contain on a rank."""
        versions = sorted(self._versions(rf"([0-9]+)\.{rank}\.begun"))[-_REMEMBERED:]
        paths = {each: os.path.join(self._directory, f"{each}.{rank}.begun") for each in versions}
        return {each: torch.load(path, weights_only=False) for each, path in paths.items()}

    @property
    def lowest(self) -> int:
        """Return the version that must be there at least; 0 for none."""
        return max(self._versions(r"([0-9]+)\.returned"), default=0)

    @property
    def highest(self) -> int:
        """Return the last version that any rank has begun; 0 for none."""
        return max(self._versions(r"([0-9]+)\.[0-9]+\.begun"), default=0)

    def _versions(self, pattern: str) -> Iterator[int]:
        return (
            int(match[1]) for name in os.listdir(self._directory) if (match := re.fullmatch(pattern, name))
        )


@dataclass(frozen=True)
class Start:
    """How the processes of a run start.

    Attributes:
        kind: of ``KINDS``.
        ranks: how many.
        place: has the disk and the ledger.
        environment: variables.
        lowest, highest: the versions that they may resume from; 0 is none.
        saves: after so many, they end; None: never.
    """

    kind: str
    ranks: int
    place: str
    environment: dict[str, str]
    lowest: int
    highest: int
    saves: int | None = None

    @property
    def disk(self) -> str:
        return os.path.join(self.place, "disk")

    @property
    def ledger(self) -> str:
        return os.path.join(self.place, "ledger")


def live(rank: int, start: Start, rendezvous: str, connection: Connection) -> None:
    """Run a rank. It tells the other end of the connection what it does, and why it ends."""
    os.environ.update(start.environment, RANK=str(rank), WORLD_SIZE=str(start.ranks), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=start.ranks,
            timeout=timedelta(seconds=GROUP_TIMEOUT_S),
        )
        dist.barrier()
    except Exception:
        connection.send(("no group",))
        return
    tell = _Told(connection)
    try:
        with job_of(Scenario((), KINDS[start.kind].config, with_data=True), start.disk) as job:
            _go_on(job, rank, start, tell)
    except BaseException as error:
        tell.failed(error)
        raise


class _Told:
    """Tells what a rank does."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._doing = "start"

    def __call__(self, doing: str, *values: float) -> None:
        self._doing = doing
        self._connection.send((doing, *values))

    def failed(self, error: BaseException) -> None:
        with suppress(OSError):
            kind = "ours" if isinstance(error, CheckpointError) else type(error).__name__
            self._connection.send(("failed", self._doing, kind, str(error)))


def _go_on(job: Training, rank: int, start: Start, tell: _Told) -> None:
    """Resume, and compare what is loaded with what was saved; then save on and on."""
    kind, ledger = KINDS[start.kind], Ledger(start.ledger)
    begun = ledger.begun(rank)
    tell("resume")
    began = monotonic()
    version = [0, *begun][job.version_in([*begun.values()])]
    tell("resumed", monotonic() - began, version)
    assert version >= start.lowest, f"version {version} is loaded, although {start.lowest} was there before"
    assert version <= start.highest, f"version {version} is loaded, but {start.highest} was the last"
    if version:
        ledger.end(version)
        job.check_what_lies_beside(version, start.ranks)
    iterations = _iterations(kind, job.iteration if version else 0)
    for number, iteration in enumerate(iterations, start.highest + 1):
        if start.saves is not None and number > start.highest + start.saves:
            break
        tell("train")
        ledger.begin(number, rank, job.prepare(number, iteration))
        tell("save")
        began = monotonic()
        job.write(number, non_persistent=iteration % kind.persistent != 0)
        ledger.end(number)
        tell("saved", monotonic() - began)
        if "host_buffer_bytes" in kind.config:
            assert last_report().waves > 1, "the bound makes no waves"
    wait_for_deletions()
    dist.barrier()
    tell("done")


def _iterations(kind: Kind, resumed: int) -> Iterator[int]:
    """Yield the iterations to save. Where each is saved twice, so is the one that was resumed from."""
    if kind.times > 1 and resumed:
        yield resumed
    iteration = resumed
    while True:
        iteration += 1
        for _ in range(kind.times):
            yield iteration
