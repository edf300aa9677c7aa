# SPDX-License-Identifier: Apache-2.0
"""RNG state: what is collected, in which shape, and that restoring it repeats the numbers."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core import parallel_state

from ckpt_fast import compat
from ckpt_fast.compat import SoloGroup, get_pg_collection
from ckpt_fast.trainer.contents.rng import get_rng_state, restore_rng_state
from tests.helpers import install_cpu_rng_tracker, run_ranks, uninstall_rng_tracker

STATES = {
    "random_rng_state",
    "np_rng_state",
    "torch_rng_state",
    "cuda_rng_state",
    "rng_tracker_states",
}


@pytest.fixture(autouse=True)
def tracker() -> Iterator[None]:
    install_cpu_rng_tracker()
    yield
    uninstall_rng_tracker()


def seed(value: int) -> None:
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)


def draw() -> tuple[float, ...]:
    """Draw one number from each generator, which advances them."""
    with compat.get_cuda_rng_tracker().fork():
        forked = torch.rand(1).item()
    return random.random(), float(np.random.rand()), torch.rand(1).item(), forked


def restore(state: Any, ckpt_format: str, data_parallel_random_init: bool = False) -> None:
    restore_rng_state(
        {"rng_state": state},
        ckpt_format=ckpt_format,
        data_parallel_random_init=data_parallel_random_init,
        pg_collection=get_pg_collection([]),
    )


@pytest.mark.parametrize("ckpt_format", ["torch_dist", "fsdp_dtensor", "torch"])
def test_the_same_numbers_follow(ckpt_format: str) -> None:
    seed(1)
    draw()
    state = get_rng_state(False, ckpt_format, pg_collection=get_pg_collection([]))
    expected = [draw() for _ in range(3)]
    seed(2)
    install_cpu_rng_tracker(seed=99)
    restore(state.data if ckpt_format == "torch_dist" else state, ckpt_format)
    assert [draw() for _ in range(3)] == expected


def test_shapes_of_one_process() -> None:
    groups = get_pg_collection([])
    sharded = get_rng_state(False, pg_collection=groups)
    assert isinstance(sharded, compat.ShardedObject)
    assert (sharded.key, sharded.replica_id) == ("rng_state", 0)
    assert (sharded.global_shape, sharded.global_offset) == ((1, 1), (0, 0))
    assert set(sharded.data[0]) == STATES
    named = get_rng_state(False, pg_collection=groups, module_name="vision")
    assert named.key == "rng_state.vision"
    assert list(get_rng_state(False, "fsdp_dtensor", pg_collection=groups)) == ["(0, 0)"]
    assert set(get_rng_state(False, "torch", pg_collection=groups)[0]) == STATES


def test_a_group_without_expert_parallelism_may_be_none() -> None:
    groups: Any = compat.ProcessGroupCollection(tp=SoloGroup(), pp=SoloGroup(), dp_cp=SoloGroup(), ep=None)
    assert get_rng_state(False, pg_collection=groups).global_shape == (1, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_a_cpu_state_is_one_a_gpu_accepts() -> None:
    torch.manual_seed(77)
    (state,) = get_rng_state(False, "torch", pg_collection=get_pg_collection([]))
    cuda = state["cuda_rng_state"]
    assert (cuda.dtype, cuda.tolist()) == (torch.uint8, [77] + [0] * 15)


@pytest.mark.gpu
def test_a_state_made_without_a_gpu_seeds_one() -> None:
    from ckpt_fast.trainer.contents import rng

    torch.manual_seed(77)
    expected = torch.rand(8, device="cuda")
    on_cpu = torch.tensor([77] + [0] * 15, dtype=torch.uint8)
    state = rng._collect() | {"cuda_rng_state": on_cpu}
    torch.rand(8, device="cuda")
    restore([state], "torch")
    assert torch.equal(torch.rand(8, device="cuda"), expected)


def test_later_draws_do_not_reach_into_a_collected_state() -> None:
    """A background save pickles the state while training keeps drawing."""
    (state,) = get_rng_state(False, "torch", pg_collection=get_pg_collection([]))
    before = io.BytesIO()
    torch.save(state, before)
    tracked = compat.get_cuda_rng_tracker().get_states()["model-parallel-rng"]
    tracked.zero_()
    torch.rand(1)
    after = io.BytesIO()
    torch.save(state, after)
    assert before.getvalue() == after.getvalue()


def test_five_states_at_top_level_are_the_oldest_form() -> None:
    seed(3)
    (state,) = get_rng_state(False, "torch", pg_collection=get_pg_collection([]))
    expected = draw()
    restore_rng_state(
        {"model": {}, **state},
        ckpt_format="torch_dist",
        data_parallel_random_init=False,
        pg_collection=get_pg_collection([]),
    )
    assert draw() == expected


@pytest.mark.parametrize("missing", sorted(STATES))
def test_a_missing_state_changes_nothing(missing: str) -> None:
    seed(4)
    (state,) = get_rng_state(False, "torch", pg_collection=get_pg_collection([]))
    del state[missing]
    seed(5)
    (before,) = get_rng_state(False, "torch", pg_collection=get_pg_collection([]))
    with pytest.raises(KeyError, match=missing):
        restore([state], "torch")
    (after,) = get_rng_state(False, "torch", pg_collection=get_pg_collection([]))
    assert torch.equal(before["torch_rng_state"], after["torch_rng_state"])
    assert before["random_rng_state"] == after["random_rng_state"]


def test_no_state_at_all() -> None:
    with pytest.raises(KeyError):
        restore([], "torch")
    with pytest.raises(KeyError):
        restore_rng_state(
            {},
            ckpt_format="torch",
            data_parallel_random_init=False,
            pg_collection=get_pg_collection([]),
        )


def test_an_empty_tracker_state_is_missing_only_where_streams_are_in_use() -> None:
    (state,) = get_rng_state(False, "torch", pg_collection=get_pg_collection([]))
    state["rng_tracker_states"] = {}
    with pytest.raises(KeyError, match="rng_tracker_states"):
        restore([state], "torch")
    uninstall_rng_tracker()
    restore([state], "torch")


def test_fsdp_falls_back_to_another_ranks_state(caplog: pytest.LogCaptureFixture) -> None:
    seed(6)
    state = get_rng_state(False, "fsdp_dtensor", pg_collection=get_pg_collection([]))
    expected = draw()
    restore({"(3, 0)": state["(0, 0)"]}, "fsdp_dtensor")
    assert draw() == expected
    assert "(0, 0)" in caplog.text


# --- On two ranks ----------------------------------------------------------------------------------------


def layout(rank: int, sizes: dict[str, int]) -> tuple[Any, ...]:
    parallel_state.initialize_model_parallel(**sizes)
    state = get_rng_state(False, pg_collection=get_pg_collection([]))
    return state.global_shape, state.global_offset, state.replica_id


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({}, [((1, 1), (0, 0), 0), ((1, 1), (0, 0), 1)]),
        ({"tensor_model_parallel_size": 2}, [((1, 2), (0, 0), 0), ((1, 2), (0, 1), 0)]),
        ({"pipeline_model_parallel_size": 2}, [((2, 1), (0, 0), 0), ((2, 1), (1, 0), 0)]),
        ({"context_parallel_size": 2}, [((1, 1), (0, 0), 0), ((1, 1), (0, 0), 1)]),
        ({"expert_model_parallel_size": 2}, [((1, 1, 2), (0, 0, 0), 0), ((1, 1, 2), (0, 0, 1), 0)]),
    ],
)
def test_layout(sizes: dict[str, int], expected: list[Any]) -> None:
    assert run_ranks(layout, 2, sizes) == expected


def resume_with_own_state(rank: int, sizes: dict[str, int]) -> bool:
    parallel_state.initialize_model_parallel(**sizes)
    install_cpu_rng_tracker(seed=rank)
    seed(10 + rank)
    state = get_rng_state(True, pg_collection=get_pg_collection([]))
    assert len(state.data) == 2
    expected = draw()
    seed(0)
    restore(state.data, "torch_dist", data_parallel_random_init=True)
    return draw() == expected


@pytest.mark.parametrize("sizes", [{}, {"context_parallel_size": 2}, {"expert_model_parallel_size": 2}])
def test_differently_seeded_ranks_get_their_own_state_back(sizes: dict[str, int]) -> None:
    """With context parallelism, both ranks are rank 0 of their data-parallel groups."""
    assert run_ranks(resume_with_own_state, 2, sizes) == [True, True]


def resume_with_more_ranks(rank: int) -> tuple[bool, bool]:
    parallel_state.initialize_model_parallel()
    install_cpu_rng_tracker()
    seed(42)
    saved_by_one = get_rng_state(False, pg_collection=get_pg_collection([])).data
    saved = draw()
    install_cpu_rng_tracker()
    seed(100 + rank)
    own = draw()
    install_cpu_rng_tracker()
    seed(100 + rank)
    restore(saved_by_one, "torch_dist", data_parallel_random_init=True)
    following = draw()
    return following == saved, following == own


def test_ranks_the_checkpoint_knows_nothing_of_keep_their_seed() -> None:
    assert run_ranks(resume_with_more_ranks, 2) == [(True, False), (False, True)]
