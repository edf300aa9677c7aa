# SPDX-License-Identifier: Apache-2.0
"""Which errors mean that another rank is lost. ``tests/doors/test_lost_ranks.py`` has where they arise."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from ckpt_fast.errors import AsyncSaveError, RankLostError
from ckpt_fast.ranks.lost import in_touch
from tests.helpers import run_ranks

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:4711: reset"
OTHERS = (
    RuntimeError("Parent directory /scratch/gloo/run1 does not exist."),
    RuntimeError("[rank 0] /scratch/gloo/pair.cc:1] is no file"),
    dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1, ncclInvalidUsage. Duplicate GPU detected"),
    dist.DistError("anything"),
    AsyncSaveError(GLOO),
    ValueError(GLOO),
)
LOST = (
    RuntimeError(GLOO),
    dist.DistNetworkError("Connection was closed by remote peer"),
    dist.DistBackendError("NCCL error in: NCCLUtils.cpp:1, ncclRemoteError: remote process exited"),
)


def passed(rank: int) -> list[bool]:
    found = []
    for error in OTHERS:
        with pytest.raises(type(error)) as caught, in_touch():
            raise error
        found.append(caught.value is error)
    return found


def test_other_errors_pass() -> None:
    assert run_ranks(passed, 2) == [[True] * len(OTHERS)] * 2


@pytest.mark.parametrize("error", LOST, ids=range(len(LOST)))
def test_without_a_process_group_no_rank_is_lost(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, in_touch():
        raise error
    assert caught.value is error


def translated(rank: int) -> list[str]:
    found = []
    for error in LOST:
        with pytest.raises(RankLostError) as caught, in_touch():
            raise error
        assert caught.value.__cause__ is error
        found.append(str(caught.value))
    return found


def test_errors_of_the_transport() -> None:
    for rank, found in enumerate(run_ranks(translated, 2)):
        for text, error in zip(found, LOST, strict=True):
            assert text.startswith(f"rank {rank} has lost touch with the other 1 ranks")
            assert str(error) in text
