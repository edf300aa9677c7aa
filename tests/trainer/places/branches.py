# SPDX-License-Identifier: Apache-2.0
"""Roots of runs that go back, made of manifests with notes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ckpt_fast.config import CheckpointConfig
from ckpt_fast.retention.line import SAVED_AT, Lineage, Origin, line_in
from ckpt_fast.state import TrainState
from ckpt_fast.trainer.places import trackers
from ckpt_fast.trainer.places.catalog import Found
from ckpt_fast.trainer.places.locate import choose_checkpoint, older_checkpoints
from tests.retention.directories import write

RECOVERY = "non_persistent"


class Branches:
    """A root with a recovery root in it, and the runs that save there."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.notes: dict[tuple[str, int], dict[str, Any]] = {}
        self._clock = 1000.0

    def begin(self, origin: int | None = None, name: str = "") -> Lineage:
        """Begin a run, or resume the checkpoint of an iteration in the root or below."""
        if origin is None:
            return Lineage()
        return Lineage(Origin(origin, "id", line_in(self.notes[name, origin])))

    def save(self, run: Lineage | None, iteration: int, name: str = "", *, is_published: bool = True) -> None:
        """Save and, if it ``is_published``, let the trackers name it; without a run, note nothing."""
        notes = run.notes(iteration) if run is not None else {}
        self._clock += 1
        self.notes[name, iteration] = {**notes, **({SAVED_AT: self._clock} if notes else {})}
        write(self.root / name, iteration, self.notes[name, iteration])
        if not is_published:
            return
        state = trackers.snapshot_train_state(TrainState(step=iteration), 0)
        trackers.publish_trackers(str(self.root / name), iteration, state)

    def without_times(self, iteration: int, name: str = "") -> None:
        """Let a checkpoint be of a version that noted lines and no times."""
        notes = {key: each for key, each in self.notes[name, iteration].items() if key != SAVED_AT}
        directory = self.root / name / f"iter_{iteration:07d}"
        for path in directory.iterdir():
            path.unlink()
        directory.rmdir()
        write(self.root / name, iteration, notes)

    def chosen(self, **options: Any) -> tuple[str, int] | None:
        """Return tier and iteration of what a load takes."""
        found = choose_checkpoint(str(self.root), self.config(), options.pop("step", None), None, **options)
        return None if found is None else (found.tier, found.iteration)

    def older(self, found: Found) -> list[tuple[str, int]]:
        """Return what a load falls back to."""
        older = older_checkpoints(str(self.root), self.config(), found, None)
        return [(each.tier, each.iteration) for each in older]

    def config(self) -> CheckpointConfig:
        return CheckpointConfig(
            save=str(self.root), non_persistent_ckpt_type="global", ckpt_format="fsdp_dtensor"
        )
