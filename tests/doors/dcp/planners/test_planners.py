# SPDX-License-Identifier: Apache-2.0
"""FastSavePlanner and FastLoadPlanner write and load what torch's planners do."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import WriteItem

from ckpt_fast import FastLoadPlanner, FastSavePlanner, FastStorageReader, FastStorageWriter
from ckpt_fast.doors.dcp.planning import columns as column_plans
from ckpt_fast.pipeline.load.index import CheckpointIndex
from tests.doors.dcp import reads as dcp_reads
from tests.doors.dcp.functions.test_round_trips import names_of, states
from tests.doors.dcp.planners import ranks as planner_ranks
from tests.doors.dcp.ranks import FSDP2_ON_CPU
from tests.doors.dcp.reads import edit, lose
from tests.doors.dcp.states import blank, differences, odd_tensors, training_state
from tests.doors.dcp.test_ranks import needs_modes
from tests.helpers import run_ranks
from tests.manifests import manifest_lies

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:Detected an existing checkpoint"),
]

READERS: dict[str, Callable[[Any, Path], None]] = {
    "planned": lambda state, path: load(path, state),
    "ours": lambda state, path: dcp.load(state, storage_reader=FastStorageReader(path)),
    "stock": lambda state, path: dcp.load(state, storage_reader=dcp.FileSystemReader(path)),
}


@pytest.fixture(autouse=True)
def forget() -> None:
    column_plans.forget()


def save(path: Path, state: dict[str, Any], planner: Any = None, **options: Any) -> Metadata:
    writer = FastStorageWriter(path, **options)
    return dcp.save(state, storage_writer=writer, planner=planner or FastSavePlanner())


def load(path: Path, state: dict[str, Any], planner: Any = None) -> dict[str, Any]:
    dcp.load(state, storage_reader=FastStorageReader(path), planner=planner or FastLoadPlanner())
    return state


def state_of(seed: int) -> dict[str, Any]:
    return {**training_state(seed), "odd": odd_tensors(seed)}


@pytest.mark.parametrize("reader", READERS)
def test_a_state_comes_back(reader: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        save(tmp_path / str(seed), state_of(seed))
    for seed in (0, 1):
        found = blank(state_of(seed))
        READERS[reader](found, tmp_path / str(seed))
        assert differences(state_of(seed), found) == []
        assert manifest_lies(tmp_path / str(seed)) == []


def described(entry: Any) -> Any:
    """Return what an entry of torch's table of contents says, without what tensors are trained for."""
    if not hasattr(entry, "chunks"):
        return type(entry)
    return entry.size, entry.chunks, entry.properties.dtype


@given(state=states().filter(names_of))
@settings(max_examples=40, deadline=None)
def test_what_torch_would_say_of_it(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("state")
    told = save(root / "ours", state)
    stock = dcp.save(state, storage_writer=dcp.FileSystemWriter(root / "stock"))
    stored = CheckpointIndex(str(root / "ours")).metadata
    for metadata in (told, stored, pickle.loads(pickle.dumps(told))):
        assert metadata.planner_data == stock.planner_data
        # Whether a tensor requires a gradient is not recorded.
        assert list(map(described, metadata.state_dict_metadata.values())) == list(
            map(described, (stock.state_dict_metadata[name] for name in metadata.state_dict_metadata))
        )
        assert metadata.storage_data.keys() == stock.storage_data.keys()
    found = blank(state)
    load(root / "stock", found)
    assert differences(state, found) == []


def test_no_plan_is_made_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "0", state_of(0))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("planned again")

    for module, name in ((column_plans, "choose"), (column_plans, "describe_state")):
        monkeypatch.setattr(module, name, refuse)
    writer = FastStorageWriter(tmp_path / "1")
    dcp.save(state_of(1), storage_writer=writer, planner=FastSavePlanner())
    assert writer.report is not None and "plan" not in writer.report.steps
    found = blank(state_of(1))
    READERS["stock"](found, tmp_path / "1")
    assert differences(state_of(1), found) == []


def test_a_changed_structure_is_planned_anew(tmp_path: Path) -> None:
    state = state_of(0)
    save(tmp_path / "0", state)
    changes: list[Callable[[dict[str, Any]], Any]] = [
        lambda s: s["model"].update({"new": torch.ones(3)}),
        lambda s: s["model"].update({"new": torch.ones(4)}),
        lambda s: s["model"].update({"new": torch.ones(4, dtype=torch.bfloat16)}),
        lambda s: s["odd"].update(large=s["odd"]["large"].t()),
        lambda s: s["trainer"].update(name="x" * 100_000),
        lambda s: s.pop("optimizer"),
    ]
    for number, change in enumerate(changes):
        change(state)
        expected = copy.deepcopy(state)
        save(tmp_path / f"changed{number}", state)
        found = blank(expected)
        READERS["stock"](found, tmp_path / f"changed{number}")
        assert differences(expected, found) == []


def test_overwriting_and_several_files(tmp_path: Path) -> None:
    for seed in range(3):
        save(tmp_path, state_of(seed), thread_count=3)
        found = load(tmp_path, blank(state_of(seed)))
        assert differences(state_of(seed), found) == []
        assert manifest_lies(tmp_path) == []
    assert len(list(tmp_path.glob("*.distcp"))) == 3


def test_with_other_storage_it_is_torchs_planner(tmp_path: Path) -> None:
    expected = training_state()
    dcp.save(expected, storage_writer=dcp.FileSystemWriter(tmp_path), planner=FastSavePlanner())
    for reader in (dcp.FileSystemReader(tmp_path), FastStorageReader(tmp_path)):
        found = blank(expected)
        dcp.load(found, storage_reader=reader, planner=FastLoadPlanner())
        assert differences(expected, found) == []


@pytest.mark.parametrize(
    "options",
    [{"flatten_state_dict": False}, {"dedup_save_to_lowest_rank": True}, {"enable_plan_caching": True}],
)
def test_arguments_of_torchs_planner(options: dict[str, bool], tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.randn(50), "v": torch.randn(4, 5).t()}
    for number in range(2):
        save(tmp_path / str(number), state, FastSavePlanner(**options))
        found: dict[str, Any] = {"w": torch.zeros(50), "v": torch.zeros(5, 4)}
        flatten = options.get("flatten_state_dict", True)
        load(tmp_path / str(number), found, FastLoadPlanner(flatten_state_dict=flatten))
        assert differences(state, found) == []


def test_a_subclass_that_looks_data_up_is_asked(tmp_path: Path) -> None:
    class Doubling(FastSavePlanner):
        def transform_object(self, write_item: WriteItem, object: Any) -> Any:
            value = super().transform_object(write_item, object)
            return value * 2 if isinstance(value, torch.Tensor) else value

    class Halving(FastLoadPlanner):
        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            tensor.div_(2)

    state = {"w": torch.randn(50)}
    save(tmp_path, state, Doubling())
    assert torch.equal(load(tmp_path, {"w": torch.zeros(50)})["w"], state["w"] * 2)
    assert torch.equal(load(tmp_path, {"w": torch.zeros(50)}, Halving())["w"], state["w"])


class Watching(FastLoadPlanner):
    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        pass


@pytest.mark.parametrize("planner", [FastLoadPlanner, Watching])
def test_a_part_that_is_missing_is_named(planner: type[FastLoadPlanner], tmp_path: Path) -> None:
    run_ranks(dcp_reads.save_stock, 2, str(tmp_path))
    edit(str(tmp_path), lambda metadata: lose(metadata, "columns", 0))
    with pytest.raises(CheckpointException, match="only 9 of the 18 elements of columns"):
        load(tmp_path, {"columns": torch.full((3, 6), -7.0)}, planner())


def test_what_does_not_fit_touches_nothing(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.randn(50), "v": torch.randn(3)})
    found = {"w": torch.zeros(50), "v": torch.zeros(4)}
    with pytest.raises(CheckpointException, match=r"v is a tensor of shape \(4,\)"):
        load(tmp_path, found)
    with pytest.raises(CheckpointException, match="has no x"):
        load(tmp_path, {**found, "v": torch.zeros(3), "x": torch.zeros(1)})
    assert not found["w"].any()
    partial = {**found, "v": torch.zeros(3), "x": torch.zeros(1)}
    load(tmp_path, partial, FastLoadPlanner(allow_partial_load=True))
    assert partial["w"].all() and not partial["x"].any()


def test_unasked_sections_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, training_state())
    load(tmp_path, {"model": blank(training_state()["model"])})
    assert "optimizer" in caplog.text
    caplog.clear()
    load(tmp_path, blank(training_state()))
    assert "WARNING" not in caplog.text


def test_a_torn_archive_is_found(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.randn(5000)})
    (data,) = tmp_path.glob("*.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointException, match="w in"):
        load(tmp_path, {"w": torch.zeros(5000)})


def test_metadata_that_was_read_can_be_copied(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.randn(5)})
    metadata = FastStorageReader(tmp_path).read_metadata()
    for copied in (copy.deepcopy(metadata), pickle.loads(pickle.dumps(metadata))):
        assert type(copied.storage_meta) is StorageMeta
        assert copied.state_dict_metadata == metadata.state_dict_metadata


@pytest.mark.skipif(not FSDP2_ON_CPU, reason="FSDP2 of this torch needs a GPU")
@pytest.mark.parametrize(
    ("saving", "loading"),
    [(4, 2), pytest.param(2, 4, marks=pytest.mark.long), pytest.param(2, 1, marks=pytest.mark.long)],
)
def test_fsdp2_on_other_ranks(saving: int, loading: int, tmp_path: Path) -> None:
    run_ranks(planner_ranks.by_default, saving, "save_with_all", str(tmp_path))
    for found in run_ranks(planner_ranks.load_by_default, loading, str(tmp_path)):
        assert len(found) == 16
        assert [pair for pair, wrong in found.items() if wrong] == []
    for name in ("ours", "ours-2-files", "async"):
        assert manifest_lies(tmp_path / name) == []


@needs_modes
def test_ranks_without_collectives(tmp_path: Path) -> None:
    run_ranks(planner_ranks.by_default, 2, "without_collectives", str(tmp_path / "apart"))
    seen = run_ranks(planner_ranks.by_default, 2, "modes_in_turn", str(tmp_path / "in turn"))
    assert seen[0][1] == [".metadata", "__0_0.distcp"]


@pytest.mark.parametrize("scenario", ["alone", "objects_of_ranks"])
def test_other_modes(scenario: str, tmp_path: Path) -> None:
    assert run_ranks(planner_ranks.by_default, 2, scenario, str(tmp_path)) == [[], []]


def test_flipped_bits_that_ranks_read_in_halves(tmp_path: Path) -> None:
    refused = run_ranks(planner_ranks.by_default, 2, "flipped_bits_read_in_halves", str(tmp_path))
    assert refused == [10, 10]


def test_a_rank_that_cannot_write_fails_all(tmp_path: Path) -> None:
    for sync, in_background, published, afterwards in run_ranks(
        planner_ranks.by_default, 2, "failing_write", str(tmp_path)
    ):
        for text in (sync, in_background):
            assert f"CheckpointWriteError: open {tmp_path}/file1/below/__1_0.distcp" in text
        assert (published, afterwards) == ("True", "[]")


def test_a_rank_that_cannot_plan_or_load_fails_all(tmp_path: Path) -> None:
    for disagreeing, mixed, pickling, missing, afterwards in run_ranks(
        planner_ranks.failing, 2, str(tmp_path)
    ):
        assert "ranks disagree on w" in disagreeing
        assert "FastSavePlanner" in mixed
        assert "cannot be saved" in pickling
        assert "has no x" in missing
        assert afterwards == "[]"
