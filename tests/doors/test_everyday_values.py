# SPDX-License-Identifier: Apache-2.0
"""Everyday values through every door: what is saved can be loaded, by us and by the stock readers."""

from __future__ import annotations

import io
import itertools
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor

from ckpt_fast import FastLoadStrategy, FastSaveStrategy, FastStorageReader, FastStorageWriter, allow_class
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.format.inert import classes
from tests.everyday import REFUSED, VALUES, Custom, same
from tests.helpers import run_ranks
from tests.models import megatron_on_cpu

pytestmark = [pytest.mark.usefixtures("no_fsync"), pytest.mark.filterwarnings("ignore")]

STOCK, OURS = "stock", "ours"
PAIRS = [(OURS, OURS), (OURS, STOCK), (STOCK, OURS)]


# torch DCP.


def save_dcp(writer: str, value: Any, directory: Path) -> None:
    state = {"value": value, "w": torch.ones(2)}
    options = (
        {"storage_writer": FastStorageWriter(directory)} if writer == OURS else {"checkpoint_id": directory}
    )
    dcp.save(state, **options)  # type: ignore[arg-type]


def load_dcp(reader: str, value: Any, directory: Path) -> Any:
    # What DCP saves by its parts, it loads into containers that are there.
    state = {"value": value if isinstance(value, (dict, list, tuple)) else "blank", "w": torch.zeros(2)}
    options = (
        {"storage_reader": FastStorageReader(directory)} if reader == OURS else {"checkpoint_id": directory}
    )
    dcp.load(state, **options)  # type: ignore[arg-type]
    return state["value"]


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
@pytest.mark.parametrize("name", VALUES)
def test_dcp(tmp_path: Path, name: str, writer: str, reader: str) -> None:
    save_dcp(writer, VALUES[name](), tmp_path)
    assert same(load_dcp(reader, VALUES[name](), tmp_path), VALUES[name]())


@pytest.mark.parametrize("name", REFUSED)
def test_dcp_refuses(tmp_path: Path, name: str) -> None:
    make, reason = REFUSED[name]
    save_dcp(OURS, VALUES["int"](), tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(
        BaseException, match=rf"(?s)value.* cannot be saved.*{reason}.*ckpt_fast\.allow_class"
    ):
        save_dcp(OURS, make(), tmp_path)
    assert sorted(os.listdir(tmp_path)) == before
    assert load_dcp(OURS, 0, tmp_path) == VALUES["int"]()


def test_dcp_saves_what_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CKPT_FAST_ON_UNLOADABLE", "warn")
    save_dcp(OURS, Custom(3), tmp_path)
    assert "value cannot be saved" in caplog.text
    assert load_dcp(STOCK, None, tmp_path) == Custom(3)


def test_dcp_with_a_class_that_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "_allowed", set())
    allow_class(Custom)
    save_dcp(OURS, Custom(3), tmp_path)
    assert load_dcp(OURS, None, tmp_path) == Custom(3)
    monkeypatch.setattr(classes, "_allowed", set())
    with torch.serialization.safe_globals([Custom]):
        assert load_dcp(OURS, None, tmp_path) == Custom(3)
    with pytest.raises(BaseException, match=r"tests\.everyday\.Custom.*allow_class"):
        load_dcp(OURS, None, tmp_path)


# Megatron-Core: objects and the common state.


def finish(job: Any) -> None:
    job.write()
    job.commit()


SAVERS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    STOCK: dist_checkpointing.save,
    "strategy": lambda state, directory: dist_checkpointing.save(state, directory, FastSaveStrategy()),
    "door": lambda state, directory: finish(torch_dist.start_save(state, directory, FastSaveStrategy())),
}
LOADERS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    STOCK: dist_checkpointing.load,
    "strategy": lambda state, directory: dist_checkpointing.load(state, directory, FastLoadStrategy()),
    "door": torch_dist.load,
}
# Place of the values, name of one, writer, reader; whether it is the same.
Outcomes = dict[tuple[str, str, str, str], bool]


def state_of(place: str, values: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = {"w": ShardedTensor.from_rank_offsets("w", torch.ones(2))}
    if place == "objects":
        return state | {name: ShardedObject(name, value, (1,), (0,)) for name, value in values.items()}
    return state | {"values": values}


def for_stock(names: Iterable[str]) -> set[str]:
    """Return the values that Megatron-Core can load from a common state."""
    return {name for name in names if not outcome(lambda: torch_loaded(VALUES[name]()))}  # noqa: B023


def torch_loaded(value: Any) -> None:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    torch.load(buffer, weights_only=True)


def outcome(call: Callable[[], Any]) -> str:
    """Return an error as text; empty without one."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def plain(value: Any) -> Any:
    """Return the value as it comes back from a common state: as a plain number, or a plain dict."""
    if isinstance(value, dict):
        return dict(value)
    is_number = isinstance(value, np.generic) and not isinstance(value, np.datetime64)
    return value.item() if is_number else value


def through_megatron(rank: int, root: str) -> Outcomes:
    """Save and load all values with every pair."""
    os.environ["CKPT_FAST_FSYNC"] = "0"
    found = {}
    with megatron_on_cpu():
        for place, writer in itertools.product(("objects", "for stock", "for us"), SAVERS):
            names = set(VALUES) if place == "objects" else for_stock(VALUES)
            names = set(VALUES) - names if place == "for us" else names
            directory = os.path.join(root, place, writer)
            os.makedirs(directory)
            SAVERS[writer](state_of(place, {name: VALUES[name]() for name in names}), directory)
            for reader in LOADERS if place != "for us" else ("door",):
                blank = dict.fromkeys(names) if place == "objects" else {}
                loaded = LOADERS[reader](state_of(place, blank), directory)
                values = loaded if place == "objects" else loaded["values"]
                for name in names:
                    expected = VALUES[name]()
                    if place != "objects":
                        expected = dict(expected) if isinstance(expected, dict) else expected
                        expected = expected if writer == STOCK else plain(expected)
                    found[place.split()[0], name, writer, reader] = same(values[name], expected)
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    (found,) = run_ranks(through_megatron, 1, str(tmp_path_factory.mktemp("values")))
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", VALUES)
def test_objects_of_megatron_core(outcomes: Outcomes, name: str) -> None:
    for writer, reader in itertools.product(SAVERS, LOADERS):
        assert outcomes["objects", name, writer, reader], (writer, reader)


@pytest.mark.parametrize("name", VALUES)
def test_common_state_of_megatron_core(outcomes: Outcomes, name: str) -> None:
    """Megatron-Core reads it itself, and less of it; from our files it reads what it reads from its own."""
    for writer in SAVERS:
        assert outcomes["for", name, writer, "door"], writer
        assert outcomes.get(("for", name, writer, STOCK), True), writer
        assert outcomes.get(("for", name, writer, "strategy"), True), writer


def numbers_in_common_state(rank: int, root: str) -> list[Any]:
    os.environ["CKPT_FAST_FSYNC"] = "0"
    numbers = {"f": np.float32(2.5), "more": [np.int64(3), (np.bool_(True),)]}
    with megatron_on_cpu():
        for writer in ("strategy", "door"):
            os.makedirs(os.path.join(root, writer))
            SAVERS[writer](state_of("common", numbers), os.path.join(root, writer))
        return [
            LOADERS[reader](state_of("common", {}), os.path.join(root, writer))["values"]
            for writer, reader in itertools.product(("strategy", "door"), LOADERS)
        ]


def test_numbers_in_the_common_state_are_plain(tmp_path: Path) -> None:
    (found,) = run_ranks(numbers_in_common_state, 1, str(tmp_path))
    assert all(same(values, {"f": 2.5, "more": [3, (True,)]}) for values in found), found


def refusals_of_megatron(rank: int, root: str) -> dict[tuple[str, str], tuple[str, bool]]:
    """Save what is refused over a checkpoint; return the errors, and whether the older one is still there."""
    os.environ["CKPT_FAST_FSYNC"] = "0"
    found = {}
    with megatron_on_cpu():
        for place, name in itertools.product(("objects", "common"), REFUSED):
            directory = os.path.join(root, place, name)
            os.makedirs(directory)
            SAVERS["door"](state_of(place, {"o": 3}), directory)
            refused = state_of(place, {"o": REFUSED[name][0]()})
            error = outcome(lambda: SAVERS["door"](refused, directory))  # noqa: B023
            loaded = torch_dist.load(state_of(place, {"o": None} if place == "objects" else {}), directory)
            found[place, name] = error, (loaded if place == "objects" else loaded["values"])["o"] == 3
    return found


def test_megatron_core_refuses(tmp_path: Path) -> None:
    (found,) = run_ranks(refusals_of_megatron, 1, str(tmp_path))
    for (place, name), (error, is_there) in found.items():
        what = "o/shard_0_1" if place == "objects" else r"the common state\['values'\]\['o'\]"
        pattern = rf"(?s){what}.* cannot be saved.*{REFUSED[name][1]}.*ckpt_fast\.allow_class"
        assert re.search(pattern, error), (place, name, error)
        assert is_there, (place, name)


def refused_on_one_rank(rank: int, root: str) -> tuple[str, Any]:
    os.environ["CKPT_FAST_FSYNC"] = "0"
    with megatron_on_cpu():
        for value in (3, Custom(3) if rank else 3):
            state = {"o": ShardedObject("o", value, (2,), (rank,))}
            error = outcome(lambda: SAVERS["door"](state, root))  # noqa: B023
        return error, torch_dist.load({"o": ShardedObject("o", None, (2,), (rank,))}, root)["o"]


def test_one_rank_refuses_for_all(tmp_path: Path) -> None:
    (first, still), (second, _) = run_ranks(refused_on_one_rank, 2, str(tmp_path))
    assert first == second
    assert re.search(r"rank 1.*o/shard_1_2.*tests\.everyday\.Custom", first)
    assert still == 3
