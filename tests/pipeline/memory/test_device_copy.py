# SPDX-License-Identifier: Apache-2.0
"""Snapshots of GPU tensors: the values at the time of the call, whatever training and the GPU do later."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast.jobs import background
from ckpt_fast.jobs.background import SaveHandle, SaveQueue
from ckpt_fast.pipeline.memory import device_copy
from ckpt_fast.pipeline.memory.device_copy import StagingPolicy
from ckpt_fast.pipeline.memory.host_buffer import HostBufferPool
from ckpt_fast.pipeline.save import stage as stage_module
from ckpt_fast.pipeline.save.plan import plan_save
from ckpt_fast.pipeline.save.stage import Staged, stage
from tests.pipeline.layouts import raw_bytes, same, whole
from tests.pipeline.memory.simulated_gpu import SimulatedGpu, install
from tests.pipeline.save.test_save import FILES, loaded
from tests.pipeline.save.test_stage import staged_bytes
from tests.saves import new_save

LARGE = 1030
MODES = ["blocking", "overlapped", "device", "auto"]


@pytest.fixture(scope="module", autouse=True)
def small_is_4_kib() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        # Some tests leave theirs unfinished.
        patch.setattr(stage_module, "host_buffers", HostBufferPool())
        patch.setattr(device_copy, "SMALL_NBYTES", 4096)
        yield


def tensors_of(sizes: list[int]) -> dict[str, torch.Tensor]:
    tensors = {f"w{i}": torch.full((size,), float(i)) for i, size in enumerate(sizes)}
    tensors["transposed"] = torch.arange(12.0).view(3, 4).t()
    return tensors


def staged_on(
    gpu: SimulatedGpu, tensors: dict[str, torch.Tensor], policy: StagingPolicy
) -> Callable[[], dict]:
    """Stage; the result waits and returns each tensor's bytes."""
    with pytest.MonkeyPatch.context() as patch:
        install(patch, gpu)
        files = plan_save([whole(fqn, tensor) for fqn, tensor in tensors.items()], "__0_", 1)
        staged = stage(files, snapshot=True, policy=policy)
    items = [item for file in files for item in file.items]

    def finish() -> dict[str, bytes]:
        staged.wait()
        found = staged_bytes(staged, [], items)
        staged.release()
        return found

    finish.staged = staged  # type: ignore[attr-defined]
    return finish


@given(
    sizes=st.lists(st.sampled_from([0, 1, 7, 1000, LARGE, LARGE + 1]), max_size=6),
    mode=st.sampled_from(MODES),
    protected=st.booleans(),
    memory=st.sampled_from([0, 1 << 20, 1 << 40]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_what_training_does_after_the_call_never_reaches_the_checkpoint(
    sizes: list[int], mode: str, protected: bool, memory: int, seed: int
) -> None:
    gpu, tensors = SimulatedGpu(seed, memory), tensors_of(sizes)
    # Training work still in progress when the save is requested belongs in the checkpoint.
    for tensor in tensors.values():
        gpu.compute(lambda tensor=tensor: tensor.add_(1))
    expected = {fqn: raw_bytes(tensor + 1) for fqn, tensor in tensors.items()}
    policy = StagingPolicy(mode, (lambda tensor: tensor.numel() % 2 == 0) if protected else None)
    finish = staged_on(gpu, tensors, policy)

    promised = protected or mode == "overlapped"
    if promised:
        # Unprotected tensors change at once, the others after their owner has requested ordering.
        for tensor in tensors.values():
            if policy.is_protected is not None and not policy.is_protected(tensor):
                gpu.compute(lambda tensor=tensor: tensor.fill_(-1))
        finish.staged.device_copies.order_behind()
    for tensor in tensors.values():
        gpu.compute(lambda tensor=tensor: tensor.fill_(-1))
    assert finish() == expected
    gpu.finish()


def test_without_the_promise_kept_the_simulation_would_show_it() -> None:
    """The test above can fail: a protected tensor that changes without ordering reaches the checkpoint."""
    torn = 0
    for seed in range(30):
        gpu, tensors = SimulatedGpu(seed), {"w": torch.zeros(LARGE)}
        expected = {"w": raw_bytes(tensors["w"])}
        finish = staged_on(gpu, tensors, StagingPolicy("overlapped"))
        gpu.compute(lambda tensor=tensors["w"]: tensor.fill_(-1))
        torn += finish() != expected
    assert torn


@pytest.mark.parametrize("mode", MODES)
def test_only_blocking_makes_the_host_wait(mode: str) -> None:
    gpu = SimulatedGpu()
    staged_on(gpu, {"w": torch.zeros(LARGE), "b": torch.zeros(3)}, StagingPolicy(mode))
    assert bool(gpu.side.work) == (mode != "blocking")


def test_thousands_of_small_tensors_are_one_transfer() -> None:
    gpu = SimulatedGpu()
    tensors = {f"w{i}": torch.full((100 + i % 7,), float(i)) for i in range(2000)} | {
        "large": torch.ones(LARGE)
    }
    expected = {fqn: raw_bytes(tensor) for fqn, tensor in tensors.items()}
    assert staged_on(gpu, tensors, StagingPolicy("blocking"))() == expected
    assert gpu.launches == ["gather 2000", "copy", "copy"]


def test_the_block_for_gathering_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_copy, "_BLOCK_NBYTES", 1000)
    gpu, tensors = SimulatedGpu(), {f"w{i}": torch.full((100,), float(i)) for i in range(5)}
    expected = {fqn: raw_bytes(tensor) for fqn, tensor in tensors.items()}
    assert staged_on(gpu, tensors, StagingPolicy("blocking"))() == expected
    assert gpu.launches == ["gather 2", "copy", "copy", "copy", "copy"]


@pytest.mark.parametrize(("memory", "mode"), [(1 << 40, "device"), (1 << 35, "blocking")])
def test_auto_takes_device_memory_only_where_a_tenth_stays_free(memory: int, mode: str) -> None:
    gpu = SimulatedGpu(free_nbytes=memory)
    assert device_copy._decide(StagingPolicy(), gpu, [torch.zeros(LARGE)]) == mode  # type: ignore[arg-type]
    assert device_copy._decide(StagingPolicy("auto", lambda _: True), gpu, []) == "overlapped"  # type: ignore[arg-type]


def test_a_failed_staging_gives_its_memory_back_only_when_nothing_writes_to_it() -> None:
    class Broken(SimulatedGpu):
        def clone(self, tensors: object) -> list[torch.Tensor]:
            raise RuntimeError("CUDA error")

    gpu = Broken()
    with pytest.raises(RuntimeError, match="CUDA error"):
        staged_on(gpu, {"w": torch.zeros(LARGE), "b": torch.zeros(3)}, StagingPolicy("device"))
    assert not gpu.side.work, "the gathered block is still to be copied into memory that others may have now"


@pytest.mark.parametrize("asked", [True, False])
def test_a_save_holds_the_state_at_the_call(tmp_path: Path, no_fsync: None, asked: bool) -> None:
    """From the call to the file. Without the promised ordering, the checkpoint would be torn."""
    gpu, tensor, queue = SimulatedGpu(seed=3), torch.arange(float(LARGE)), SaveQueue()
    expected = tensor.clone()
    with pytest.MonkeyPatch.context() as patch:
        install(patch, gpu)
        # The GPU is slow: it begins after training has changed the tensor.
        begin = threading.Event()
        patch.setattr(Staged, "wait", lambda staged: (begin.wait(), staged.device_copies.wait()))
        policy = StagingPolicy("auto", lambda tensor: True)
        job = new_save([whole("w", tensor)], str(tmp_path), snapshot=True, staging=policy, **FILES)
        job.stage()
        queue.schedule_async_request(SaveHandle(job))
        if asked:
            background.wait_staged()
        gpu.compute(lambda: tensor.fill_(-1))
        begin.set()
        queue.maybe_finalize_async_calls(blocking=True)
    assert same(loaded(tmp_path, "w", torch.zeros_like(tensor)), expected) == asked
