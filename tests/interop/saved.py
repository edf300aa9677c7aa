# SPDX-License-Identifier: Apache-2.0
"""One run saved by every writer, and what each reader loads from it. These functions run on the ranks."""

from __future__ import annotations

import inspect
import io
import itertools
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.metadata import TensorProperties, TensorStorageMetadata

from ckpt_fast import compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.trainer.places.trackers import publish_trackers, snapshot_train_state, write_train_state
from tests.models import FLOPS, Run, Setup, differences, identical, megatron_on_cpu, other

STEP = 2
# Which code wrote a checkpoint: save_checkpoint, stock dist_checkpointing, stock with FastSaveStrategy.
WRITERS = ("ours", "stock", "strategy")

needs_stock_lists = pytest.mark.skipif(
    hasattr(TensorProperties(), "strides"),
    reason="Megatron-Core passes all that torch notes of a tensor to torch.empty, and 2.15 notes strides",
)


def iteration(root: str | Path, writer: str) -> str:
    """Return the directory of the only checkpoint that ``writer`` wrote."""
    return os.path.join(root, writer, f"iter_{STEP:07d}")


def save_with_all(rank: int, setup: Setup, root: str, writers: tuple[str, ...] = WRITERS) -> None:
    """Train and save the same state with each writer, and store beside it what readers must find."""
    with Run(setup, save=os.path.join(root, "ours")) as run:
        run.train(STEP)
        run.state.train_state.floating_point_operations_so_far = float(FLOPS)
        with megatron_on_cpu():
            values = values_of(run.sharded_state_dict())
        torch.save({"values": values, "run": run.fingerprint()}, os.path.join(root, f"expected_{rank}.pt"))
        if "ours" in writers:
            run.save()
        if "stock" in writers:
            save_with_stock(run, os.path.join(root, "stock"), None)
        if "strategy" in writers:
            save_with_stock(run, os.path.join(root, "strategy"), torch_dist.FastSaveStrategy())


def save_with_stock(run: Run, root: str, strategy: Any) -> None:
    """Do what a trainer does around ``dist_checkpointing.save``; ``strategy`` None is the stock one."""
    directory = os.path.join(root, f"iter_{run.state.train_state.step:07d}")
    os.makedirs(directory, exist_ok=True)
    torch.distributed.barrier()
    strategy = strategy or compat.TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=1)
    if run.setup.parallel_save:
        group = compat.get_pg_collection(run.model).dp_cp
        strategy = compat.FullyParallelSaveStrategyWrapper(strategy, group)
    with megatron_on_cpu():
        dist_checkpointing.save(
            run.sharded_state_dict(), directory, strategy, content_metadata=run.content_metadata() or None
        )
    if torch.distributed.get_rank() == 0:
        run.state.cfg.to_yaml(os.path.join(directory, "run_config.yaml"))
        train_state = snapshot_train_state(run.state.train_state, FLOPS)
        write_train_state(os.path.join(directory, "train_state.pt"), train_state)
        publish_trackers(root, run.state.train_state.step, train_state)
    torch.distributed.barrier()


def read_all(
    rank: int, setup: Setup, root: str, skipped: Collection[tuple[str, str]] = ()
) -> dict[tuple[str, str], list[str]]:
    """Load each writer's checkpoint with each reader into another run; (writer, reader) to differences.

    Nothing in megatron-core or torch is patched while loading.
    """
    expected = _expected(rank, root)["values"]
    wrong = {}
    for writer, (reader, load) in itertools.product(WRITERS, READERS.items()):
        if (writer, reader) in skipped:
            continue
        with Run(other(setup)) as run:
            run.train(1)
            with megatron_on_cpu():
                scaffold = run.sharded_state_dict(is_loading=True)
            assert not torch.overrides._get_current_function_mode_stack()
            wrong[writer, reader] = wrong_values(expected, load(scaffold, iteration(root, writer)))
    return wrong


READERS: dict[str, Callable[[dict[str, Any], str], dict[str, Any]]] = {
    "stock": dist_checkpointing.load,
    "strategy": lambda scaffold, path: dist_checkpointing.load(scaffold, path, torch_dist.FastLoadStrategy()),
    "door": torch_dist.load,
}


def resume_all(rank: int, setup: Setup, root: str) -> dict[str, list[str]]:
    """Resume another run with ``load_checkpoint`` from each writer's checkpoint; writer to differences."""
    expected = _expected(rank, root)["run"]
    wrong = {}
    with Run(other(setup)) as run:
        for writer in WRITERS:
            run.train(1)
            run.checkpoint.load = os.path.join(root, writer)
            assert run.load() == (STEP, FLOPS)
            wrong[writer] = differences(expected, run.fingerprint())
    return wrong


def _expected(rank: int, root: str) -> dict[str, Any]:
    # Our own file, just written: RNG states are tuples and arrays.
    return torch.load(os.path.join(root, f"expected_{rank}.pt"), weights_only=False)  # type: ignore[no-any-return]


class NotSaved:
    """Stands in for a value that is not in the checkpoint: each run keeps its own."""


def values_of(sharded_state_dict: Any) -> Any:
    """Return the plain values of a sharded state dict, as loading must return them."""
    if isinstance(sharded_state_dict, dict):
        return {key: values_of(value) for key, value in sharded_state_dict.items()}
    if isinstance(sharded_state_dict, list):
        return [values_of(value) for value in sharded_state_dict]
    if isinstance(sharded_state_dict, compat.LocalNonpersistentObject):
        return NotSaved
    if isinstance(sharded_state_dict, (compat.ShardedBase, compat.ShardedTensorFactory)):
        data = sharded_state_dict.data
        return data.detach().clone() if isinstance(data, torch.Tensor) else data
    return sharded_state_dict


def wrong_values(expected: Any, found: Any, name: str = "") -> list[str]:
    """Return the names in ``expected`` that ``found`` lacks or has with other values."""
    if isinstance(expected, (dict, list)) and type(expected) is type(found):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        if isinstance(expected, dict) or len(expected) == len(found):
            return [
                wrong
                for key in keys
                for wrong in wrong_values(expected[key], _item(found, key), f"{name}.{key}")
            ]
    return [] if expected is NotSaved or identical(expected, found) else [name]


def _item(container: Any, key: Any) -> Any:
    return container.get(key, NotSaved) if isinstance(container, dict) else container[key]


def read_with_dcp(directory: str) -> dict[str, Any]:
    """Load every tensor and object with torch alone, except the common state, which is stored elsewhere."""
    reader = dcp.FileSystemReader(directory)
    state: dict[str, Any] = {}
    for fqn, entry in reader.read_metadata().state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            state[fqn] = torch.empty(entry.size, dtype=entry.properties.dtype)
        elif not fqn.startswith("common_state"):
            state[fqn] = io.BytesIO()
    # torch 2.6 has no such option; there, a load in a process group is collective.
    alone = {"no_dist": True} if "no_dist" in inspect.signature(dcp.load).parameters else {}
    dcp.load(state, storage_reader=reader, **alone)
    return state
