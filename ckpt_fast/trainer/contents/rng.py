# SPDX-License-Identifier: Apache-2.0
"""The random number generators of a rank: collected for a checkpoint, and put back."""

from __future__ import annotations

import logging
import random
import struct
from typing import Any

import numpy as np
import torch

from ckpt_fast import compat
from ckpt_fast.ranks.group import ControlGroup
from ckpt_fast.ranks.world import is_distributed, warn_rank_0

logger = logging.getLogger(__name__)

RNG_KEY = "rng_state"


def get_rng_state(
    data_parallel_random_init: bool,
    ckpt_format: str = "torch_dist",
    *,
    pg_collection: Any,
    module_name: str | None = None,
) -> Any:
    """The states of random, numpy, torch, CUDA and Megatron's RNG tracker, in the shape a format stores.

    Args:
        data_parallel_random_init: data-parallel ranks were seeded differently, so the states of all of them
            are collected (collective over ``pg_collection.dp_cp``); otherwise one state stands for all.
        ckpt_format: "torch_dist", "fsdp_dtensor", or any other for the bare list.
        pg_collection: process groups; pp, tp, dp_cp, and ep (which may be None).
        module_name: namespace of the key in a multi-module (MIMO) model.

    Returns:
        torch_dist: a ShardedObject over (pp, tp), replicated over dp_cp; with expert parallelism over
        (pp, tp, dp_cp), because expert ranks have states of their own.
        fsdp_dtensor: {"(pp, tp)": list of states}.
    """
    states = _gather_states(data_parallel_random_init, pg_collection.dp_cp)
    pp, tp, dp_cp = pg_collection.pp, pg_collection.tp, pg_collection.dp_cp
    if ckpt_format == "fsdp_dtensor":
        return {_coordinates(pg_collection): states}
    if ckpt_format != "torch_dist":
        return states
    axes, replica = [pp, tp], dp_cp.rank()
    if compat.get_pg_size(getattr(pg_collection, "ep", None)) > 1:
        axes, replica = [pp, tp, dp_cp], 0
    return compat.ShardedObject(
        f"{RNG_KEY}.{module_name}" if module_name else RNG_KEY,
        states,
        global_shape=tuple(axis.size() for axis in axes),
        global_offset=tuple(axis.rank() for axis in axes),
        replica_id=replica,
    )


def has_rng_state(state_dict: dict[str, Any]) -> bool:
    """Whether there are states in it in one of the forms that ``restore_rng_state`` takes."""
    return bool(state_dict.get(RNG_KEY)) or "random_rng_state" in state_dict


def restore_rng_state(
    state_dict: dict[str, Any],
    *,
    ckpt_format: str,
    data_parallel_random_init: bool,
    pg_collection: Any,
) -> None:
    """Put back the states a checkpoint holds; what follows is the same random sequence as after the save.

    Args:
        state_dict: the loaded checkpoint: "rng_state" as ``get_rng_state`` shaped it (torch_dist: the list
            itself), or without it the five states at top level, as the oldest checkpoints have them.
        ckpt_format: as of ``get_rng_state``.
        data_parallel_random_init: each data-parallel rank takes its own state. Ranks that the checkpoint
            has no state of (it was saved with fewer) keep the state they were seeded with.
        pg_collection: process groups.

    Raises:
        KeyError: a state is missing.
    """
    states = state_dict.get(RNG_KEY)
    if states is None:
        _restore(state_dict)
        return
    if ckpt_format == "fsdp_dtensor":
        states = _of_model_rank(states, _coordinates(pg_collection))
    # Gathered over dp_cp, so indexed by it: the rank in dp alone is another one with context parallelism.
    index = pg_collection.dp_cp.rank() if data_parallel_random_init else 0
    if not states:
        raise KeyError(RNG_KEY)
    if data_parallel_random_init and len(states) != pg_collection.dp_cp.size():
        warn_rank_0(
            f"the checkpoint has RNG states of {len(states)} data-parallel ranks, this run has "
            f"{pg_collection.dp_cp.size()}. Ranks without a state of their own keep the one they were "
            "seeded with; the random sequence is not that of the saved run."
        )
    if index < len(states):
        _restore(states[index])


def _gather_states(data_parallel_random_init: bool, group: Any) -> list[dict[str, Any]]:
    mine = _collect()
    if not (data_parallel_random_init and is_distributed() and group.size() > 1):
        return [mine]
    return ControlGroup(group).all_gather(mine)


def _collect() -> dict[str, Any]:
    tracker = compat.get_cuda_rng_tracker()
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": _cuda_rng_state(),
        "rng_tracker_states": {
            # A copy: the tracker hands out its own tensors, and a background save reads them later.
            name: compat.convert_cuda_rng_state(state, to_graphable=False).clone()
            for name, state in tracker.get_states().items()
        },
    }


def _cuda_rng_state() -> torch.Tensor:
    """The current device's state; without a device, that of one freshly seeded like the CPU generator.

    A checkpoint made on a CPU can so be resumed on a GPU, also by readers that insist on this state. Its 16
    bytes are seed and offset of the Philox generator.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_rng_state()
    seed_and_offset = struct.pack("<QQ", torch.initial_seed() & (1 << 64) - 1, 0)
    return torch.frombuffer(bytearray(seed_and_offset), dtype=torch.uint8)


def _restore(rng_state: dict[str, Any]) -> None:
    # All five are looked up first: a checkpoint that lacks one must not leave a mixture behind.
    python, numpy = rng_state["random_rng_state"], rng_state["np_rng_state"]
    cpu, cuda = rng_state["torch_rng_state"], rng_state["cuda_rng_state"]
    saved = rng_state["rng_tracker_states"]
    tracker = compat.get_cuda_rng_tracker()
    if not saved and tracker.get_states():
        raise KeyError("rng_tracker_states")

    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    if saved:
        graph_safe = compat.is_graph_safe_cuda_rng_tracker(tracker)
        tracker.set_states(
            {
                name: compat.convert_cuda_rng_state(state, to_graphable=graph_safe)
                for name, state in saved.items()
            }
        )


def _coordinates(pg_collection: Any) -> str:
    """The key of a model-parallel rank in fsdp_dtensor checkpoints, e.g. "(0, 1)"."""
    return str((pg_collection.pp.rank(), pg_collection.tp.rank()))


def _of_model_rank(states: dict[str, list[dict[str, Any]]], coordinates: str) -> list[dict[str, Any]]:
    if coordinates in states:
        return states[coordinates]
    key, first = next(iter(states.items()))
    logger.warning(
        "the checkpoint has no RNG state of (pipeline, tensor) rank %s; that of %s is used", coordinates, key
    )
    return first
