# SPDX-License-Identifier: Apache-2.0
"""What the Megatron-Core door refuses, as strictly as Megatron-Core, and as which kind of error."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.core import CheckpointingException
from torch.distributed.checkpoint.api import CheckpointException

import ckpt_fast
from ckpt_fast import compat
from ckpt_fast.compat import MCoreAsyncCallsQueue
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.errors import CheckpointError
from tests.helpers import run_ranks
from tests.models import megatron_on_cpu


def tensor(key: str, value: float = 0.0, size: int = 4, **options: Any) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.full((size,), value), **options)


def half(key: str, number: int, value: float = 0.0) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets(key, torch.full((2,), value), (0, number, 2))


def replicated(key: str, value: float = 0.0, **options: Any) -> ShardedTensor:
    return tensor(key, value, replica_id=dist.get_rank(), **options)


def item(key: str, value: Any = None) -> ShardedObject:
    return ShardedObject(key, value, (1,), (0,))


def save(state: dict[str, Any], directory: str, **options: Any) -> Any:
    if dist.get_rank() == 0:
        os.makedirs(directory)
    dist.barrier()
    return dist_checkpointing.save(state, directory, **options)


def kinds_of(action: Callable[[], Any]) -> tuple[str, bool, bool, str]:
    """Return the name of our error, whether callers of Megatron-Core and torch's catch it, and its text."""
    try:
        action()
    except CheckpointError as error:
        catchable = isinstance(error, CheckpointingException), isinstance(error, CheckpointException)
        return type(error).__name__, *catchable, str(error)
    return "none", False, False, ""


# --- the kinds of error ------------------------------------------------------------------------------------


def load_what_does_not_fit(rank: int, root: str) -> list[tuple[str, bool, bool, str]]:
    with ckpt_fast.install(), megatron_on_cpu():
        save({"a": replicated("a"), "o": item("o", 5)} if rank == 0 else {"a": replicated("a")}, root)
        requests: list[dict[str, Any]] = [
            {"a": replicated("a", size=5)},
            {"b": replicated("b")},
            {"o": ShardedObject("p", None, (1,), (0,), replica_id=rank)},
        ]
        found = [kinds_of(lambda each=each: dist_checkpointing.load(each, root)) for each in requests]
        dist.barrier()
        if rank == 0:
            os.remove(os.path.join(root, ".metadata"))
        dist.barrier()
        return [*found, kinds_of(lambda: dist_checkpointing.load({"a": replicated("a")}, root))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_loads_raise_what_callers_catch(tmp_path: Path, world_size: int) -> None:
    for found in run_ranks(load_what_does_not_fit, world_size, str(tmp_path / "x")):
        assert [kinds for *kinds, _ in found] == [
            *[["CheckpointMismatchError", True, True]] * 3,
            ["CheckpointNotFoundError", True, True],
        ]
        wrong = ["a has shape (4,)", "has no b.", "has no p/shard_0_1.", "it has no .metadata"]
        assert all(text in message for text, (*_, message) in zip(wrong, found, strict=True))


def save_what_cannot_be_saved(rank: int, root: str) -> list[tuple[str, bool, bool, str]]:
    with ckpt_fast.install(), megatron_on_cpu():
        nothing = {"a": replicated("a").without_data()}
        found = [kinds_of(lambda: save(nothing, os.path.join(root, "sync")))]
        request = save({"a": replicated("a")}, os.path.join(root, "async"), async_sharded_save=True)
        queue = MCoreAsyncCallsQueue()
        request.finalize_fns[0]._handle._job.cancel()
        queue.schedule_async_request(request)
        return [*found, kinds_of(lambda: queue.maybe_finalize_async_calls(blocking=True))]


@pytest.mark.parametrize("world_size", [1, 2])
def test_saves_raise_what_callers_catch(tmp_path: Path, world_size: int) -> None:
    for found in run_ranks(save_what_cannot_be_saved, world_size, str(tmp_path)):
        assert [kinds for *kinds, _ in found] == [
            ["CheckpointMismatchError", True, True],
            ["AsyncSaveError", True, True],
        ]


# --- as strict as Megatron-Core ----------------------------------------------------------------------------


def save_a_part(rank: int, root: str) -> list[str]:
    """Save half of a tensor, on all ranks together, without validation and with it."""
    found = []
    with ckpt_fast.install(), megatron_on_cpu():
        directory = os.path.join(root, "0")
        state = {"a": half("a", 0, 3.0)} if rank == 0 else {}
        found.append(kinds_of(lambda: save(state, directory, validate_access_integrity=False))[0])
        if found == ["none"]:
            loaded = dist_checkpointing.load({"a": half("a", 0)}, directory, validate_access_integrity=False)
            assert loaded["a"].tolist() == [3.0, 3.0]
    return found


def test_what_is_not_validated_may_be_a_part(tmp_path: Path) -> None:
    """torch's planner, which Megatron-Core relies on then, counts elements only of several ranks."""
    (alone, *_), (first, second) = (
        run_ranks(save_a_part, world_size, str(tmp_path / str(world_size)))
        for world_size in (1, 2)
        if not (tmp_path / str(world_size)).mkdir()
    )
    assert (alone, first, second) == (["none"], *[["CheckpointMismatchError"]] * 2)


def start_a_part(rank: int, root: str) -> list[str]:
    state = {"a": half("a", 0, 3.0)}
    found = []
    for validate in (False, True):
        directory = os.path.join(root, str(validate))

        def run(directory: str = directory, validate: bool = validate) -> None:
            job = torch_dist.start_save(
                state, directory, ckpt_fast.FastSaveStrategy(), validate_access_integrity=validate
            )
            job.write()
            job.commit()

        found.append(kinds_of(run)[0])
    return found


def test_the_pipeline_obeys_as_well(tmp_path: Path) -> None:
    assert run_ranks(start_a_part, 1, str(tmp_path)) == [["none", "CheckpointMismatchError"]]


def test_two_objects_of_one_key_without_torch_distributed(tmp_path: Path) -> None:
    state = {"a": item("o", 1), "b": item("o", 2)}
    strategy = ckpt_fast.FastSaveStrategy()
    with pytest.raises(CheckpointError, match=r"2 objects .* have the key 'o/shard_0_1'"):
        torch_dist.start_save(state, str(tmp_path), strategy)


def use_one_name_twice(rank: int, root: str) -> list[tuple[str, bool, bool, str]]:
    with ckpt_fast.install(), megatron_on_cpu():
        state = {"a.b": replicated("x"), "a": {"b": replicated("y")}}
        found = [kinds_of(lambda: save(state, os.path.join(root, "0")))]
        directory = os.path.join(root, "1")
        save({"x": replicated("x"), "y": replicated("y")}, directory)
        found.append(kinds_of(lambda: dist_checkpointing.load(state, directory)))
        numbered = {"a": [replicated("x")], "a.0": replicated("y")}
        return [*found, kinds_of(lambda: dist_checkpointing.load(numbered, directory))]


def test_names_that_flatten_to_the_same_are_refused(tmp_path: Path) -> None:
    (found,) = run_ranks(use_one_name_twice, 1, str(tmp_path))
    assert [kinds for *kinds, _ in found] == [["CheckpointMismatchError", True, True]] * 3
    paths = ["'a.b'", "'a.b'", "'a.0'"]
    assert all(f"have the path {path}" in message for path, (*_, message) in zip(paths, found, strict=True))


# --- a refused load has touched nothing --------------------------------------------------------------------


def load_with_one_wrong_request(rank: int, root: str) -> list[list[float]]:
    """Rank 0's requests fit; on the last rank one has another shape. One tensor may differ in its padding."""
    wrong_rank = dist.get_world_size() - 1
    with ckpt_fast.install(), megatron_on_cpu():
        names = ("padded", "plain", "last")
        save({name: replicated(name, 7.0) for name in names}, root)
        state = {
            "padded": replicated("padded", 1.0, allow_shape_mismatch=True),
            "plain": replicated("plain", 2.0),
            "last": replicated("last", 3.0, size=4 + (rank == wrong_rank)),
        }
        data = [entry.data for entry in state.values()]
        error = kinds_of(lambda: dist_checkpointing.load(state, root, validate_access_integrity=False))
        assert error[0] == "CheckpointMismatchError" and f"rank {wrong_rank}: last has shape" in error[3]
        return [each.unique().tolist() for each in data]


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_refused_load_has_touched_nothing(tmp_path: Path, world_size: int) -> None:
    found = run_ranks(load_with_one_wrong_request, world_size, str(tmp_path / "x"))
    assert found == [[[1.0], [2.0], [3.0]]] * world_size


def refuse_a_common_state(
    rank: int, root: str, is_installed: bool
) -> tuple[tuple[str, bool, bool, str], Any]:
    with contextlib.ExitStack() as stack:
        if is_installed:
            stack.enter_context(ckpt_fast.install())
        stack.enter_context(megatron_on_cpu())
        strategy = None if is_installed else ckpt_fast.FastSaveStrategy()
        save({"a": replicated("a"), "step": 1}, root, sharded_strategy=strategy)
        refused = {"a": replicated("a"), "step": 2, "function": print}
        found = kinds_of(lambda: dist_checkpointing.save(refused, root, strategy))
        return found, torch_dist.load({"a": replicated("a")}, root)["step"]


@pytest.mark.parametrize(
    "is_installed",
    [
        True,
        pytest.param(
            False,
            marks=pytest.mark.skipif(
                compat.TorchCommonSaveStrategy is not None,
                reason="this Megatron-Core replaces common.pt before it asks the strategy",
            ),
        ),
    ],
)
def test_a_refused_common_state_leaves_the_older_checkpoint(tmp_path: Path, is_installed: bool) -> None:
    for (*kinds, message), step in run_ranks(refuse_a_common_state, 2, str(tmp_path / "x"), is_installed):
        assert (kinds, step) == (["UnsafeCheckpointError", True, True], 1), message
        assert "the common state['function']" in message


# --- tensors without values --------------------------------------------------------------------------------


def use_tensors_without_values(rank: int, root: str) -> list[str]:
    with ckpt_fast.install(), megatron_on_cpu():
        empty = {"a": ShardedTensor.from_rank_offsets("a", torch.empty(4, device="meta"))}
        found = [kinds_of(lambda: save(empty, os.path.join(root, "0")))[3]]
        directory = os.path.join(root, "1")
        save({"a": tensor("a", 1.0)}, directory)
        found.append(kinds_of(lambda: dist_checkpointing.load(empty, directory))[3])
        freed = {"a": tensor("a", 1.0)}
        save(freed, os.path.join(root, "2"))
        freed["a"].data.untyped_storage().resize_(0)
        return [*found, kinds_of(lambda: save(freed, os.path.join(root, "3")))[3]]


def test_tensors_without_values_are_refused_by_name(tmp_path: Path) -> None:
    (found,) = run_ranks(use_tensors_without_values, 1, str(tmp_path))
    assert "a is on the meta device and has no values to save" in found[0]
    assert "a cannot be loaded into a tensor on the meta device" in found[1]
    assert "but its storage has only 0 bytes" in found[2]


# --- relative paths ----------------------------------------------------------------------------------------


def save_and_change_directory(rank: int, root: str) -> None:
    home = os.getcwd()
    os.makedirs(os.path.join(root, "elsewhere"))
    os.chdir(root)
    try:
        job = torch_dist.start_save({"a": tensor("a", 1.0)}, "x", ckpt_fast.FastSaveStrategy())
        os.chdir("elsewhere")
        job.write()
        job.commit()
        assert os.listdir(".") == []
    finally:
        os.chdir(home)
    state = torch_dist.load({"a": tensor("a")}, os.path.join(root, "x"))
    assert state["a"].tolist() == [1.0] * 4


def test_a_relative_path_keeps_its_meaning(tmp_path: Path) -> None:
    run_ranks(save_and_change_directory, 1, str(tmp_path))
