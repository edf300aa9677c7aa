# SPDX-License-Identifier: Apache-2.0
"""A kill or a power loss interrupts a save: what is left is the previous checkpoint or the new one.

The promise covers everything in a checkpoint besides the tensors too: trackers, train state, configuration,
tokenizer, the data position, and old checkpoints that are being deleted.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ckpt_fast import compat
from tests.crash.preloading import Ranks, ranks_with
from tests.crash.states import recording
from tests.crash.states.disk import Call, Disk
from tests.crash.states.saving import SCENARIOS

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="a C compiler makes the recorder")

# One of each kind; test_all_states has all of them.
ONE_RANK = ["first", "local", "again", "dcp-again"]
TWO_RANKS = ["background", "dcp"]
LONG_ONE_RANK = ["tokenizer", "recovery", "dcp-made"]
LONG_TWO_RANKS = ["later"]
MOST = 8


def cases(names_of: dict[int, Iterable[str]], marks: Any = ()) -> list[Any]:
    """Return scenarios with their numbers of ranks."""
    return [
        pytest.param(name, world_size, marks=marks)
        for world_size, names in names_of.items()
        for name in names
    ]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Yield ``run_ranks`` with the recorder preloaded."""
    with ranks_with(Path(__file__).with_name("recorder.c"), tmp_path_factory.mktemp("recorder")) as run:
        yield run


def look_at(
    ranks: Ranks,
    place: Path,
    name: str,
    world_size: int,
    seeds: int,
    most: int | None = None,
    timeout_s: float = 100,
) -> recording.Findings:
    if SCENARIOS[name].is_local and not compat.HAVE_RESIL:
        pytest.skip("needs nvidia-resiliency-ext")
    (place / "disk").mkdir()
    ranks(recording.record, world_size, name, str(place))
    lookers = world_size if SCENARIOS[name].is_local else 1
    found: recording.Findings = ranks(
        recording.look, lookers, name, str(place), world_size, seeds, most, timeout_s=timeout_s
    )[0]
    sys.stdout.write(
        f"{name}, {world_size} ranks: {found.checked} of {found.states} states, {found.versions}\n"
    )
    return found


@pytest.mark.parametrize(
    ("name", "world_size"),
    cases({1: ONE_RANK, 2: TWO_RANKS}) + cases({1: LONG_ONE_RANK, 2: LONG_TWO_RANKS}, pytest.mark.long),
)
def test_some_states(ranks: Ranks, tmp_path: Path, name: str, world_size: int) -> None:
    most = None if SCENARIOS[name].is_dcp else MOST  # the fast ones
    found = look_at(ranks, tmp_path, name, world_size, seeds=1, most=most)
    assert found.failures == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "world_size"), cases({1: SCENARIOS, 2: SCENARIOS}))
def test_all_states(ranks: Ranks, tmp_path: Path, name: str, world_size: int) -> None:
    found = look_at(ranks, tmp_path, name, world_size, seeds=80, timeout_s=3500)
    assert found.failures == []


def test_a_sync_that_is_missing_is_noticed(ranks: Ranks, tmp_path: Path) -> None:
    """The tests above would be worthless if they passed without the syncs."""
    (tmp_path / "disk").mkdir()
    ranks(recording.record, 1, "dcp", str(tmp_path))
    (found,) = ranks(recording.syncs, 1, "dcp", str(tmp_path), 1, 2)
    needed = [path for path, failure in found if failure]
    for name in ("__0_0.distcp", ".metadata"):
        assert any(f"/.{name}." in path for path in needed), f"nobody misses the sync of {name}"
    assert {".", "of", "of/a", "of/a/run"} <= set(needed)


def disk_after(*calls: str) -> Disk:
    """Return the disk after calls, each with its arguments. A file's content is its inode number."""
    disk = Disk()
    for line in calls:
        name, *arguments = line.split()
        number = int(arguments.pop()) if arguments[-1].isdigit() else 0
        path, second = (*arguments, "", "")[:2]
        content = str(number).encode() if name in ("content", "sync") and number < 10 else b""
        disk.do(Call(name, number, path, second, content))
    return disk


def test_what_is_not_synced_may_be_lost() -> None:
    file = ("create x 1", "content x 1")
    lost, *others = trees(disk_after(*file))
    assert lost == {} and {"x": b""} in others and {"x": b"1"} in others
    assert trees(disk_after(*file, "sync . 0"))[0] == {"x": b""}
    assert trees(disk_after(*file, "sync x 1"))[0] == {}
    assert all(each == {"x": b"1"} for each in trees(disk_after(*file, "sync x 1", "sync . 0")))


def test_names_change_in_one_go() -> None:
    files = ("create x 1", "sync x 1", "create y 2", "sync y 2", "sync . 0")
    renamed = trees(disk_after(*files, "rename x y"))
    assert {"x": b"1", "y": b"2"} in renamed and {"y": b"1"} in renamed
    assert {"x": b"1"} not in renamed and {} not in renamed
    exchanged = trees(disk_after(*files, "exchange x y"))
    assert [set(each) for each in exchanged] == [{"x", "y"}] * len(exchanged)
    assert {tuple(each.values()) for each in exchanged} == {(b"1", b"2"), (b"2", b"1")}


def test_what_is_deleted_may_come_back_in_parts() -> None:
    files = ("create d/x 1", "sync d/x 1", "create d/y 2", "sync d/y 2")
    synced = ("mkdir d 10", *files, "sync d 10", "sync . 0")
    found = trees(disk_after(*synced, "unlink d/x", "unlink d/y", "unlink d"))
    for left in ({"x": b"1", "y": b"2"}, {"x": b"1"}, {"y": b"2"}, {}):
        assert {"d": left} in found
    assert {} in found


def trees(disk: Disk) -> list[Any]:
    """Return the possible states after a power loss, as dicts; the promised one comes first."""

    def as_dict(tree: Any) -> Any:
        return tree if isinstance(tree, bytes) else {name: as_dict(child) for name, child in tree}

    return [as_dict(tree) for _, tree in disk.after_power_loss(range(20))]
