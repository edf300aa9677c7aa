# SPDX-License-Identifier: Apache-2.0
"""Our checkpoints and stock megatron-core's, each read by the other, bit for bit."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tests.helpers import run_ranks
from tests.interop import saved
from tests.models import Setup, identical

LAYOUTS = {
    "1-rank": (1, Setup()),
    "1-rank-distributed": (1, Setup(distributed=True, bf16=True)),
    "dp2": (2, Setup(bf16=True)),
    "dp2-distributed": (2, Setup(distributed=True, bf16=True)),
    "dp2-reshardable": (2, Setup(distributed=True, reshardable=True, parallel_save=False)),
    "pp2-distributed": (2, Setup(pp=2, layers=2, distributed=True, bf16=True)),
    "tp2": (2, Setup(tp=2, parallel_save=False)),
    "tp2-distributed": (2, Setup(tp=2, distributed=True)),
    "moe-ep2-distributed": (2, Setup(experts=4, ep=2, distributed=True, bf16=True)),
    "dp2-tp2-distributed": (4, Setup(tp=2, distributed=True, bf16=True)),
    "tp2-reshardable": (2, Setup(tp=2, distributed=True, reshardable=True, bf16=True)),
}


class Saved(NamedTuple):
    """Arguments for the functions of ``saved``, in their order after the rank."""

    ranks: int
    setup: Setup
    root: str


# The others take most of the time.
QUICK = ("dp2-distributed", "tp2")


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in QUICK else pytest.mark.long) for name in LAYOUTS],
)
def checkpoints(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Save the same state with every writer, in every layout."""
    ranks, setup = LAYOUTS[request.param]
    root = str(tmp_path_factory.mktemp(request.param))
    run_ranks(saved.save_with_all, ranks, setup, root)
    return Saved(ranks, setup, root)


def test_every_reader_gets_every_bit_from_every_writer(checkpoints: Saved) -> None:
    expected = {(writer, reader): [] for writer in saved.WRITERS for reader in saved.READERS}
    assert run_ranks(saved.read_all, *checkpoints) == [expected] * checkpoints.ranks


def test_load_checkpoint_resumes_from_every_writer(checkpoints: Saved) -> None:
    expected = {writer: [] for writer in saved.WRITERS}
    assert run_ranks(saved.resume_all, *checkpoints) == [expected] * checkpoints.ranks


@pytest.mark.parametrize("writer", ["ours", "strategy"])
def test_plain_dcp_reads_the_same_from_all(checkpoints: Saved, writer: str) -> None:
    expected = saved.read_with_dcp(saved.iteration(checkpoints.root, "stock"))
    found = saved.read_with_dcp(saved.iteration(checkpoints.root, writer))

    assert len(expected) > 10
    assert expected.keys() == found.keys()
    assert [key for key in expected if not identical(expected[key], found[key])] == []


def test_plain_dcp_sees_all_parts_of_the_optimizer(checkpoints: Saved) -> None:
    """The comparisons above cover what they claim to: weights, both moments and master weights."""
    _, setup, root = checkpoints
    state = saved.read_with_dcp(saved.iteration(root, "ours"))
    name = "decoder.layers.self_attention.linear_proj.weight"
    assert state[name].dtype is setup.dtype
    if setup.distributed and not setup.reshardable:
        return  # by bucket, not by name
    for part in ("exp_avg", "exp_avg_sq", *(("param",) if setup.distributed else ())):
        moment = state[f"optimizer.state.{part}.{name}"]
        assert (moment.dtype, moment.shape) == (torch.float32, state[name].shape)
        assert moment.count_nonzero() > 0
