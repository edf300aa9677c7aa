# SPDX-License-Identifier: Apache-2.0
"""The verification of a directory of checkpoints, and of the trackers that select one of them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

from ckpt_fast.errors import CheckpointError
from ckpt_fast.verification.checkpoint import verify_directory, verify_local_file
from ckpt_fast.verification.findings import Findings
from ckpt_fast.verification.needed import check_train_state
from ckpt_fast.verification.places import (
    LOCAL_FILE,
    TRAIN_STATE_FILE,
    Tree,
    checkpoints_below,
    iteration_of,
)
from ckpt_fast.verification.report import FileReport, State, VerifyReport

OWN_TRACKER = f"latest_{TRAIN_STATE_FILE}"
MEGATRON_LM_TRACKER = "latest_checkpointed_iteration.txt"
_RELEASE = "release"


class _Root:
    """The trackers of one directory of iterations.

    Attributes:
        selected: the name of the checkpoint that they select; None without a sound tracker.
        newest: the newest iteration that they name; None without a sound tracker.
        is_of_a_run: whether a run of Megatron Bridge or ckpt_fast writes them.
        files: the findings about them, by their names in the tree.
        notes: what is worth knowing.
    """

    def __init__(self, tree: Tree, below: str, deep: bool) -> None:
        self.files: list[FileReport] = []
        self.notes: list[str] = []
        self._prefix = f"{below}/" if below else ""
        sizes = tree.within(below)
        self.is_of_a_run = OWN_TRACKER in sizes
        named: dict[str, str] = {}
        with tree.files(below) as files:
            found = Findings(sizes, files, deep)
            for name, parse in ((OWN_TRACKER, _own_tracker), (MEGATRON_LM_TRACKER, _megatron_lm_tracker)):
                if name in sizes and (target := _read(found, name, parse)) is not None:
                    named[name] = target
            for name, target in named.items():
                if not any(path.startswith(f"{target}/") for path in sizes):
                    found.file(name, State.SWAPPED, f"names {target}, which does not exist")
            self.files = [
                dataclasses.replace(each, path=self._prefix + each.path) for each in found.reports()
            ]
        if len(set(named.values())) > 1:
            self.notes.append(
                f"the trackers differ: {' and '.join(f'{k} names {v}' for k, v in named.items())}"
            )
        first = next(iter(named.values()), None)
        self.selected = self._prefix + first if first is not None else None
        numbers = [number for target in named.values() if (number := iteration_of(target)) is not None]
        self.newest = max(numbers, default=None)

    def settle(self, whole: list[str]) -> None:
        """Without a sound tracker a load takes the newest checkpoint that is whole, given these."""
        if self.selected is not None:
            return
        self.newest = max(
            (number for each in whole if (number := iteration_of(each)) is not None), default=None
        )
        taken = next((each for each in whole if iteration_of(each) == self.newest), None)
        if self.files and taken is not None:
            self.selected = taken
            self.notes.append(
                f"no tracker is sound; {taken} is the newest whole checkpoint, which a load takes"
            )

    def has_published(self, below: str) -> bool:
        """Whether a checkpoint's save came to an end, as far as anything says."""
        number = iteration_of(below)
        if below == self.selected or number is None:
            return True
        return self.newest is not None and number <= self.newest


def verify_run(tree: Tree, deep: bool) -> VerifyReport | None:
    """Look at every checkpoint in a directory; None if there is none, nor a tracker."""
    names = checkpoints_below(tree)
    parents = {os.path.dirname(path) for path in tree.sizes if os.path.basename(path) in _TRACKERS}
    roots = {
        below: _Root(tree, below, deep)
        for below in sorted(parents | {os.path.dirname(each) for each in names})
    }
    if not names and not parents:
        return None
    looked = {name: _verify(tree, name, deep, roots[os.path.dirname(name)].is_of_a_run) for name in names}
    for below, root in roots.items():
        mine = [name for name in names if os.path.dirname(name) == below]
        root.settle([name for name in mine if looked[name].is_complete and not looked[name].problem])
    reports = []
    for name, report in looked.items():
        root = roots[os.path.dirname(name)]
        is_selected, is_published = name == root.selected, root.has_published(name)
        reports.append(dataclasses.replace(report, is_selected=is_selected, is_published=is_published))
    return VerifyReport(
        tree.path,
        "run",
        deep,
        is_own=any(each.is_own for each in reports),
        is_complete=all(each.is_complete for each in reports if each.is_selected),
        files=tuple(each for root in roots.values() for each in root.files),
        notes=tuple(note for root in roots.values() for note in root.notes),
        checkpoints=tuple(reports),
    )


_TRACKERS = (OWN_TRACKER, MEGATRON_LM_TRACKER)


def _verify(tree: Tree, name: str, deep: bool, of_a_run: bool) -> VerifyReport:
    try:
        if LOCAL_FILE.fullmatch(os.path.basename(name)):
            return verify_local_file(tree, name, deep)
        return verify_directory(tree, name, deep, of_a_run=of_a_run)
    except (CheckpointError, OSError) as error:
        return VerifyReport(tree.join(name), "unknown", deep, problem=f"{tree.join(name)}: {error}")


def _read(found: Findings, name: str, parse: Callable[[bytes], str]) -> str | None:
    content = found.read(name)
    if content is None:
        return None
    try:
        target = parse(content)
    except (CheckpointError, ValueError, RuntimeError) as error:
        state = State.FLIPPED if content else State.TRUNCATED
        found.file(name, state, f"is damaged ({error})" if content else "is empty")
        return None
    found.file(name, State.SOUND)
    return target


def _own_tracker(content: bytes) -> str:
    return _directory_of(check_train_state(content))


def _megatron_lm_tracker(content: bytes) -> str:
    text = content.decode(errors="replace").strip()
    if text == _RELEASE:
        return _RELEASE
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"it holds neither an iteration nor 'release': {text[:80]!r}")
    return _directory_of(int(text))


def _directory_of(iteration: int) -> str:
    if iteration <= 0:
        raise ValueError(f"it names iteration {iteration}")
    return f"iter_{iteration:07d}"
