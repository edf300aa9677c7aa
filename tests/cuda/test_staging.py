# SPDX-License-Identifier: Apache-2.0
"""Snapshots of GPU tensors: the values at the time of the call, in every mode, for any number and kind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import ckpt_fast
from ckpt_fast import native
from ckpt_fast.format.types import TensorRequest
from ckpt_fast.jobs.background import SaveHandle, SaveQueue
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import load_tensors
from ckpt_fast.pipeline.memory.device_copy import SMALL_NBYTES, StagingPolicy
from ckpt_fast.pipeline.save import ring
from ckpt_fast.pipeline.save.program import ProgramCache
from tests.pipeline.layouts import same, whole
from tests.pipeline.save.test_save import FILES
from tests.saves import new_save, save

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("no_fsync")]


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", generator=generator)

    small = {f"small{i}": random(1 + i % 1000) for i in range(3000)}
    odd = {
        "unaligned": random(1001)[1:],
        "bytes": random(77).to(torch.uint8)[3:],
        "bfloat16": random(333).bfloat16(),
        "transposed": random(300, 500).t(),
        "strided": random(900, 900)[::2, 1::3],
        "conjugate": torch.complex(random(50, 50), random(50, 50)).conj(),
        "scalar": random(1).squeeze(),
        "empty": random(0, 3),
        "at the limit": random(SMALL_NBYTES // 4),
        "large": random(5_000_000),
    }
    return small | odd


def save_and_change(
    directory: Path, state: dict[str, torch.Tensor], policy: StagingPolicy
) -> dict[str, torch.Tensor]:
    """Save in the background, change everything immediately, return what the file contains."""
    queue = SaveQueue()
    # Give the GPU work that the copies must come after, and more.
    for tensor in state.values():
        tensor.mul_(2)
    shards = [whole(fqn, tensor) for fqn, tensor in state.items()]
    job = new_save(shards, str(directory), snapshot=True, staging=policy, **FILES)
    job.stage()
    queue.schedule_async_request(SaveHandle(job))
    if policy.mode == "overlapped":
        ckpt_fast.wait_staged()
    for tensor in state.values():
        tensor.zero_()
    queue.maybe_finalize_async_calls(blocking=True)
    found = {fqn: torch.ones_like(tensor) for fqn, tensor in state.items()}
    load_tensors(
        CheckpointIndex(str(directory)),
        [TensorRequest(fqn, tensor, (0,) * tensor.dim()) for fqn, tensor in found.items()],
    )
    return found


@pytest.mark.parametrize("slab", [128 << 10, 4 << 20])
def test_a_synchronous_save_through_a_ring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slab: int
) -> None:
    """Work that the GPU still has to do when the save begins is in the checkpoint."""
    monkeypatch.setattr(ring, "SLAB_NBYTES", slab)
    monkeypatch.setenv("CKPT_FAST_CHUNK", "64K")
    state, programs = tensors(), ProgramCache()
    for number in range(2):  # planned, and by its program
        for tensor in state.values():
            tensor.mul_(2)
        shards = [whole(fqn, tensor) for fqn, tensor in state.items()]
        report = save(shards, str(tmp_path / str(number)), programs=programs)
        assert report.host_memory_allocated <= 16 << 20 < report.staged_nbytes
        found = {fqn: torch.ones_like(tensor) for fqn, tensor in state.items()}
        load_tensors(
            CheckpointIndex(str(tmp_path / str(number))),
            [TensorRequest(fqn, tensor, (0,) * tensor.dim()) for fqn, tensor in found.items()],
        )
        wrong = [fqn for fqn, tensor in state.items() if not same(found[fqn].cpu(), tensor.cpu())]
        assert not wrong, wrong[:5]


@pytest.mark.parametrize("mode", ["auto", "blocking", "overlapped", "device"])
def test_values_of_the_call(tmp_path: Path, mode: str) -> None:
    state = tensors()
    expected = {fqn: tensor.clone().mul_(2) for fqn, tensor in state.items()}
    for number in range(3):  # into reused memory
        found = save_and_change(tmp_path / str(number), state, StagingPolicy(mode))  # type: ignore[arg-type]
        wrong = [fqn for fqn, tensor in expected.items() if not same(found[fqn].cpu(), tensor.cpu())]
        assert not wrong, wrong[:5]
        for fqn, tensor in expected.items():
            state[fqn].copy_(tensor).div_(2)


def test_the_optimizer_waits_by_itself(tmp_path: Path) -> None:
    from ckpt_fast.trainer.save.staging import staging_policy

    model = torch.nn.Linear(3000, 3000, device="cuda")
    adam = torch.optim.AdamW(model.parameters(), lr=1.0)
    member = type("Member", (), {"optimizer": adam})()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for number in range(5):
        adam.step()
        state = {name: parameter.detach() for name, parameter in model.named_parameters()}
        expected = {name: tensor.clone() for name, tensor in state.items()}
        policy = staging_policy([model], member)
        job = new_save(
            [whole(fqn, tensor) for fqn, tensor in state.items()],
            str(tmp_path / str(number)),
            snapshot=True,
            staging=policy,
            **FILES,
        )
        job.stage()
        queue = SaveQueue()
        queue.schedule_async_request(SaveHandle(job))
        adam.step()
        queue.maybe_finalize_async_calls(blocking=True)
        for fqn, tensor in expected.items():
            into = torch.zeros_like(tensor)
            request = TensorRequest(fqn, into, (0,) * into.dim())
            load_tensors(CheckpointIndex(str(tmp_path / str(number))), [request])
            assert torch.equal(into, tensor), (number, fqn)


def test_memory_that_is_freed_and_used_again_meanwhile(tmp_path: Path) -> None:
    """The last reference to a tensor is dropped while it is being copied; its memory is reused."""
    queue = SaveQueue()
    state = {f"w{i}": torch.full((1_000_000,), float(i), device="cuda") for i in range(20)}
    shards = [whole(fqn, tensor) for fqn, tensor in state.items()]
    job = new_save(shards, str(tmp_path), snapshot=True, staging=StagingPolicy("overlapped"), **FILES)
    job.stage()
    del shards
    state.clear()
    rubbish = [torch.full((1_000_000,), -1.0, device="cuda") for _ in range(40)]
    queue.schedule_async_request(SaveHandle(job))
    queue.maybe_finalize_async_calls(blocking=True)
    for number in range(20):
        into = torch.zeros(1_000_000)
        load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest(f"w{number}", into, (0,))])
        assert torch.equal(into, torch.full_like(into, float(number)))
    assert len(rubbish) == 40


def test_what_cannot_be_copied_is_an_error() -> None:
    from array import array

    kernels = native.cuda()
    assert kernels is not None
    column = array("q", [0])
    for function in (kernels.copy_to_host, kernels.gather):
        with pytest.raises(ValueError, match="differ in length"):
            function(column, column, array("q"), 0, 0)
        with pytest.raises(ValueError, match="copy 0 has a negative size"):
            function(column, column, array("q", [-1]), 0, 0)
