# SPDX-License-Identifier: Apache-2.0
"""One damage after the other, each through every reader.

A reader may refuse a checkpoint with an error that says why, or load what was saved. Nothing else: no other
value, no other error, no crash, no hang, no memory beyond what the files justify. What loads cannot check, as
in files of other libraries, a deep verification must call damaged. Whole items of another save of the same
structure are beyond both there; such damage is done only to checkpoints that name their save.
"""

from __future__ import annotations

import contextlib
import copy
import random
import resource
import shutil
import signal
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

import ckpt_fast
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.names import SIDECAR_FILE
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from tests.fuzz.checkpoints import KINDS, state_of
from tests.fuzz.mutations import MUTATIONS
from tests.pipeline.layouts import same

# Of what the files, a few kilobytes, justify.
MOST_MEMORY = 300 << 20
_LONGEST_S = 20.0
_SLICE = ((40, 24), (16, 16))  # offsets and sizes: parts of all pieces


class Problem(NamedTuple):
    """A promise that was not kept."""

    kind: str
    case: int
    damage: str
    what: str


class Tally(NamedTuple):
    """Outcomes of a campaign: how often which reader refused, loaded or found what, and the problems."""

    outcomes: Counter[str]
    problems: list[Problem]


class TooLong(BaseException):
    """A reader took longer than it may; no reader's own handler catches this."""


def run(
    kind: str, directory: Path, cases: range, seed: int, begun: Callable[[int], None] = lambda case: None
) -> Tally:
    """Damage a checkpoint of a kind in many ways. Case and seed decide the damage.

    Args:
        kind: a name in ``KINDS``.
        directory: an empty one, for the checkpoints.
        cases: their numbers.
        seed: of all of them.
        begun: called with the number of each case before anything is damaged.
    """
    place, other = directory / "checkpoint", directory / "other"
    expected = state_of(1)
    # Two that differ, and the same ones in every run: so a case can be looked at again.
    ids = random.Random(0)
    with (
        patch("secrets.token_hex", lambda nbytes: ids.randbytes(nbytes).hex()),
        patch("uuid.uuid4", lambda: uuid.UUID(int=ids.getrandbits(128))),
    ):
        KINDS[kind].save(expected, place)
        KINDS[kind].save(state_of(2), other)
    files = {path.name: path.read_bytes() for path in sorted(place.iterdir())}
    is_verified = KINDS[kind].is_verified
    replaced = {path.name: path.read_bytes() for path in other.iterdir()} if is_verified else {}
    shutil.rmtree(other)
    tally = Tally(Counter(), [])
    fine = Tally(Counter(), [])
    _examine(
        kind,
        place,
        expected,
        False,
        False,
        fine,
        lambda what: fine.problems.append(Problem(kind, -1, "none", what)),
    )
    assert not fine.problems and not any("refused" in outcome for outcome in fine.outcomes), fine
    for case in cases:
        begun(case)
        chosen = random.Random(f"{kind} {case} {seed}")
        name = chosen.choice(sorted(files))
        damage, content = _damaged(chosen, name, files, replaced)
        if content == files[name]:
            continue
        if content is None:
            (place / name).unlink()
        else:
            (place / name).write_bytes(content)

        def note(what: str, case: int = case, damage: str = f"{name}: {damage}") -> None:
            tally.problems.append(Problem(kind, case, damage, what))

        # The sidecar has no checksum of its own, and may say less than it did.
        must_be_seen = is_verified and name != SIDECAR_FILE
        _examine(kind, place, expected, True, must_be_seen, tally, note)
        tally.outcomes["cases"] += 1
        (place / name).write_bytes(files[name])
    return tally


def _damaged(
    chosen: random.Random, name: str, files: dict[str, bytes], replaced: dict[str, bytes]
) -> tuple[str, bytes | None]:
    if name != SIDECAR_FILE and not chosen.randrange(200):  # without it, it is one of stock torch DCP
        return "removed", None
    content = files[name]
    others = [files[each] for each in files if each != name]
    if name in replaced:
        others.append(replaced[name])
    mutation = chosen.choice(MUTATIONS)
    described = mutation.__name__
    if content:
        content = mutation(chosen, content, others)
    else:
        content, described = b"\0", "extend"
    if content and not chosen.randrange(8):
        second = chosen.choice(MUTATIONS)
        content, described = second(chosen, content, others), f"{described}, {second.__name__}"
    return described, content


def _examine(
    kind: str,
    place: Path,
    expected: dict[str, Any],
    is_damaged: bool,
    must_be_seen: bool,
    tally: Tally,
    note: Callable[[str], None],
) -> None:
    before = _memory()
    readers: dict[str, Callable[[], bool]] = {"slice": lambda: _load_a_slice(place, expected)}
    if kind != "pieces":
        readers["load"] = lambda: _load(place, expected)
        readers["dcp.load"] = lambda: _load_through_dcp(place, expected)
    is_right = True
    for name, reader in readers.items():
        outcome = _outcome(reader, name, note)
        tally.outcomes[f"{name} {outcome}"] += 1
        if outcome == "wrong":
            is_right = False
    reports: dict[str, Any] = {}

    def verify() -> bool:
        reports["deep"] = ckpt_fast.verify(place, deep=True)
        return True

    def look() -> bool:
        ckpt_fast.verify(place)
        ckpt_fast.inspect(place)
        return True

    _outcome(look, "a look", note)
    if _outcome(verify, "verify", note) == "right":
        report = reports["deep"]
        tally.outcomes[f"verify {report.verdict.value}"] += 1
        # Another program may write .metadata anew, which leaves the manifest out: seen, and no damage.
        is_noted = any("has no manifest" in line for line in report.notes)
        if report.is_sound and (not is_right or (must_be_seen and not is_noted)):
            note("a deep verification calls it sound")
        if not is_damaged and not report.is_sound:
            note(f"a deep verification calls it damaged: {report.damages}")
    if not is_right and KINDS[kind].loads_are_checked:
        note("a reader loaded other values")
    if _memory() - before > MOST_MEMORY:
        note(f"it takes {(_memory() - before) >> 20} MB more")


def _outcome(reader: Callable[[], bool], name: str, note: Callable[[str], None]) -> str:
    try:
        with _limited():
            return "right" if reader() else "wrong"
    except TooLong:
        note(f"{name} takes longer than {_LONGEST_S:.0f} s")
    except CheckpointError:
        return "refused"
    except CheckpointException as error:  # torch's: one error for each rank
        causes = [cause[0] if isinstance(cause, tuple) else cause for cause in error.failures.values()]
        if all(isinstance(cause, CheckpointError) or _is_of_torch(cause) for cause in causes):
            return "refused"
        note(f"{name} raises {causes!r}")
    except Exception as error:
        note(f"{name} raises {error!r}")
    return "failed"


def _is_of_torch(cause: object) -> bool:
    """Whether torch's own planner says what a checkpoint lacks, or that a tensor has another size."""
    return isinstance(cause, RuntimeError | ValueError) and str(cause).startswith(
        ("Missing key in checkpoint state_dict", "Size mismatch between saved")
    )


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong

    handler = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, _LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def _blank(expected: Any) -> Any:
    if isinstance(expected, torch.Tensor):
        return torch.zeros_like(expected)
    if isinstance(expected, dict):
        return {name: _blank(value) for name, value in expected.items()}
    if isinstance(expected, list):
        return [_blank(value) for value in expected]
    return copy.deepcopy(expected)


def _load(place: Path, expected: dict[str, Any]) -> bool:
    target = _blank(expected)
    target["step"] = 0
    ckpt_fast.load(target, place)
    return _equal(target, expected)


def _load_through_dcp(place: Path, expected: dict[str, Any]) -> bool:
    target = _blank(expected)
    target["step"] = 0
    dcp.load(target, storage_reader=ckpt_fast.FastStorageReader(place))
    return _equal(target, expected)


def _load_a_slice(place: Path, expected: dict[str, Any]) -> bool:
    (offsets, sizes), weight = _SLICE, expected["model"]["weight"]
    target = torch.zeros(sizes)
    load_tensors(CheckpointIndex(str(place)), [TensorRequest("model.weight", target, offsets)])
    return same(target, weight[offsets[0] : offsets[0] + sizes[0], offsets[1] : offsets[1] + sizes[1]])


def _equal(one: Any, other: Any) -> bool:
    if isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and same(one, other)
    if isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in other)
    if isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return type(one) is type(other) and bool(one == other)


def _memory() -> int:
    """The most that this process has taken so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
