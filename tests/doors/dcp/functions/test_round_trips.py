# SPDX-License-Identifier: Apache-2.0
"""What one process saves, loaded by us and by torch, and the other way round."""

from __future__ import annotations

import copy
import io
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import ckpt_fast
from ckpt_fast.doors.dcp.direct.local_state import Flattened
from ckpt_fast.errors import CheckpointMismatchError, CheckpointWriteError
from ckpt_fast.pipeline.load.index import CheckpointIndex
from tests.doors.dcp.states import blank, differences, odd_tensors, training_state
from tests.manifests import manifest_lies
from tests.pipeline.layouts import PLAIN_DTYPES, random_tensor
from tests.pipeline.save.test_stage import Wrapper

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

KEYS = st.text("ab.0", min_size=1, max_size=3)
PLAIN = st.one_of(
    st.none(), st.integers(), st.floats(allow_nan=False), st.text(max_size=3), st.tuples(st.integers())
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Draw a tensor of any dtype: empty, without dimensions, transposed, or a part of another."""
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    tensor = random_tensor(shape, draw(st.sampled_from(PLAIN_DTYPES)), draw(st.integers(0, 9)))
    view = draw(st.sampled_from(["whole", "transposed", "rows", "parameter"]))
    if view == "transposed":
        return tensor.mT if tensor.dim() > 1 else tensor
    if view == "rows" and tensor.dim():
        return tensor[::2]
    is_real = tensor.dtype in (torch.float32, torch.float64)
    return nn.Parameter(tensor) if view == "parameter" and is_real else tensor


def states(keys: st.SearchStrategy[Any] = KEYS) -> st.SearchStrategy[dict[Any, Any]]:
    """Draw nested state dicts."""
    values = st.recursive(
        st.one_of(tensors(), PLAIN),
        lambda inner: st.one_of(st.dictionaries(keys, inner, max_size=3), st.lists(inner, max_size=3)),
        max_leaves=8,
    )
    return st.dictionaries(keys, values, max_size=4)


def names_of(state: dict[Any, Any]) -> list[str] | None:
    try:
        return list(flatten_state_dict(state)[0])
    except ValueError:
        return None


@given(state=states(st.one_of(KEYS, st.integers(0, 2))))
@settings(max_examples=200, deadline=None)
def test_flattened_as_torch_does(state: dict[Any, Any]) -> None:
    flat = Flattened(state)
    if names_of(state) is None:
        with pytest.raises(CheckpointMismatchError, match="joined by dots"):
            flat.require_unique()
        return
    flat.require_unique()
    values, paths = flatten_state_dict(state)
    assert (flat.names, flat.paths()) == (list(values), paths)
    assert all(a is b for a, b in zip(flat.values, values.values(), strict=True))
    for parent, key, value in zip(flat.parents, flat.keys, flat.values, strict=True):
        assert parent.container[key] is value


@given(state=states().filter(names_of))
@settings(max_examples=40, deadline=None)
def test_each_side_reads_the_other(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("state")
    ckpt_fast.save(state, root / "ours")
    dcp.save(state, storage_writer=dcp.FileSystemWriter(root / "stock"))
    ours, stock = (CheckpointIndex(str(root / name)).metadata for name in ("ours", "stock"))
    assert ours.planner_data == stock.planner_data
    assert ours.state_dict_metadata.keys() == stock.state_dict_metadata.keys()
    for directory in (root / "ours", root / "stock"):
        found = blank(state)
        ckpt_fast.load(found, directory)
        assert differences(state, found) == []
    assert stock_finds(state, root / "ours") == stock_finds(state, root / "stock")


def stock_finds(state: dict[str, Any], directory: Path) -> list[str] | str:
    """Load with torch, which does not find everything that it has saved; return differences, or the error."""
    found = blank(state)
    try:
        dcp.load(found, storage_reader=dcp.FileSystemReader(directory))
    except CheckpointException as error:
        return str(error).splitlines()[-1]
    return differences(state, found)


def test_state_of_a_run(tmp_path: Path) -> None:
    state = {**training_state(), "odd": odd_tensors()}
    report = ckpt_fast.save(state, tmp_path)
    assert (report.directory, report.files) == (str(tmp_path), 1)
    assert manifest_lies(tmp_path) == []
    for load in (
        ckpt_fast.load,
        lambda found, path: dcp.load(found, storage_reader=dcp.FileSystemReader(path)),
    ):
        found = blank(state)
        load(found, tmp_path)
        assert differences(state, found) == []


def test_tools_of_torch_nest_it_again(tmp_path: Path) -> None:
    state = training_state()
    ckpt_fast.save(state, tmp_path / "checkpoint")
    dcp_to_torch_save(tmp_path / "checkpoint", tmp_path / "file.pt")
    found = torch.load(tmp_path / "file.pt", weights_only=True)
    # torch's tools make strings of all keys.
    state["optimizer"]["state"] = {str(key): value for key, value in state["optimizer"]["state"].items()}
    assert differences(state, found) == []


def test_tensors_are_filled_where_they_are(tmp_path: Path) -> None:
    expected = odd_tensors()
    ckpt_fast.save(expected, tmp_path)
    del expected["expanded"]
    found = odd_tensors(1)
    del found["expanded"]
    before = dict(found)
    ckpt_fast.load(found, tmp_path)
    assert differences(expected, found) == []
    assert all(found[name] is before[name] for name in before)


def test_values_are_converted_to_the_dtype_wanted(tmp_path: Path) -> None:
    saved = torch.randn(40, 30)
    ckpt_fast.save({"w": saved}, tmp_path)
    found = {"w": torch.zeros(40, 30, dtype=torch.bfloat16)}
    ckpt_fast.load(found, tmp_path)
    assert torch.equal(found["w"], saved.bfloat16())


def test_keys_that_are_numbers_keep_their_values(tmp_path: Path) -> None:
    state = {"state": {0: {"step": 3, "m": torch.ones(2)}, 1: [{"x": "y"}, torch.ones(3)]}}
    ckpt_fast.save(state, tmp_path)
    found = {"state": {0: {"step": 0, "m": torch.zeros(2)}, 1: [{"x": ""}, torch.zeros(3)]}}
    ckpt_fast.load(found, tmp_path)
    assert differences(state, found) == []


def test_sparse_and_quantized_tensors(tmp_path: Path) -> None:
    def state(number: float) -> dict[str, torch.Tensor]:
        return {
            "q": torch.quantize_per_tensor(torch.full((50,), number), 0.1, 3, torch.qint8),
            "w": torch.full((3,), number),
        }

    for number in (1.0, 2.0):
        ckpt_fast.save({**state(number), "s": torch.eye(3).to_sparse() * number}, tmp_path)
        found = state(0.0)
        ckpt_fast.load(found, tmp_path)
        assert torch.equal(found["q"].int_repr(), state(number)["q"].int_repr())
        assert torch.equal(found["w"], state(number)["w"])


def test_tensors_that_wrap_others_are_stored_by_torch(tmp_path: Path) -> None:
    def stored(directory: Path) -> Any:
        metadata = CheckpointIndex(str(directory)).metadata
        info = next(info for index, info in metadata.storage_data.items() if index.fqn == "a.wrapper")
        content = (directory / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
        return torch.load(io.BytesIO(content), weights_only=False)

    for number in range(2):
        state = {"a": {"wrapper": Wrapper(torch.arange(6.0) + number)}, "w": torch.ones(3)}
        ckpt_fast.save(state, tmp_path / "a")
        future = ckpt_fast.async_save(state, tmp_path / "b")
        state["a"]["wrapper"].inner.zero_()
        future.result()
        for directory in (tmp_path / "a", tmp_path / "b"):
            assert type(stored(directory)) is Wrapper
            assert torch.equal(stored(directory).inner, torch.arange(6.0) + number)


class Counter:
    """What torch calls Stateful."""

    def __init__(self, count: int) -> None:
        self.count, self.weights = count, torch.full((4,), float(count))
        self.calls: list[str] = []

    def state_dict(self) -> dict[str, Any]:
        self.calls.append("state_dict")
        return {"count": self.count, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls.append("load_state_dict")
        self.count = state["count"]


@pytest.mark.parametrize("ours", itertools.product([True, False], repeat=2))
def test_stateful_objects(ours: tuple[bool, bool], tmp_path: Path) -> None:
    saved: dict[str, Any] = {"counter": Counter(5), "model": nn.Linear(3, 2), "step": 7}
    found: dict[str, Any] = {"counter": Counter(1), "model": nn.Linear(3, 2), "step": 0}
    if ours[0]:
        ckpt_fast.save(saved, tmp_path)
    else:
        dcp.save(saved, storage_writer=dcp.FileSystemWriter(tmp_path))
    if ours[1]:
        ckpt_fast.load(found, tmp_path)
    else:
        dcp.load(found, storage_reader=dcp.FileSystemReader(tmp_path))
    counter = found["counter"]
    assert saved["counter"].calls == ["state_dict"]
    assert counter.calls == ["state_dict", "load_state_dict"]
    assert (counter.count, counter.weights.tolist(), found["step"]) == (5, [5.0] * 4, 7)
    assert differences(saved["model"].state_dict(), found["model"].state_dict()) == []


def test_meta_tensors(tmp_path: Path) -> None:
    ckpt_fast.save({"a": {"w": torch.arange(6.0)}, "v": torch.ones(2)}, tmp_path)
    with pytest.raises(CheckpointMismatchError, match="w is on the meta device"):
        ckpt_fast.save({"w": torch.empty(6, device="meta")}, tmp_path)
    found = {"a": {"w": torch.empty(6, device="meta")}, "v": torch.zeros(2)}
    ckpt_fast.load(found, tmp_path)
    assert torch.equal(found["a"]["w"], torch.arange(6.0)) and torch.equal(found["v"], torch.ones(2))


def test_nothing(tmp_path: Path) -> None:
    ckpt_fast.save({}, tmp_path)
    ckpt_fast.load({}, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".metadata"]


def test_overwriting(tmp_path: Path) -> None:
    directory = tmp_path / "checkpoint"
    ckpt_fast.save({"w": torch.zeros(5), "gone": torch.ones(7000)}, directory)
    with pytest.raises(CheckpointWriteError, match="overwrite is False"):
        ckpt_fast.save({"w": torch.ones(5)}, directory, overwrite=False)
    with pytest.raises(CheckpointWriteError, match="overwrite is False"):
        ckpt_fast.async_save({"w": torch.ones(5)}, directory, overwrite=False)

    class Unpicklable:
        def __reduce__(self) -> Any:
            raise RuntimeError("cannot be pickled")

    with pytest.raises(Exception, match="cannot be pickled"):
        ckpt_fast.save({"w": torch.ones(5), "object": Unpicklable()}, directory)
    found = {"w": torch.ones(5)}
    ckpt_fast.load(found, directory)
    assert torch.equal(found["w"], torch.zeros(5))
    ckpt_fast.save({"w": torch.full((5,), 2.0)}, directory, thread_count=1)
    ckpt_fast.load(found, directory)
    assert torch.equal(found["w"], torch.full((5,), 2.0))
    assert manifest_lies(directory) == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_names_that_collide_are_refused(tmp_path: Path) -> None:
    state = {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}
    for action in (ckpt_fast.save, ckpt_fast.async_save):
        with pytest.raises(CheckpointMismatchError, match=r"a\.b"):
            action(state, tmp_path)
    ckpt_fast.save({"a.b": torch.ones(1)}, tmp_path)
    with pytest.raises(CheckpointMismatchError, match=r"a\.b"):
        ckpt_fast.load(copy.deepcopy(state), tmp_path)


def test_urls_are_refused() -> None:
    with pytest.raises(CheckpointWriteError, match="URL"):
        ckpt_fast.save({"w": torch.ones(1)}, "msc://bucket/path")
    with pytest.raises(CheckpointMismatchError, match="URL"):
        ckpt_fast.load({"w": torch.ones(1)}, "msc://bucket/path")
