# SPDX-License-Identifier: Apache-2.0
"""Saves of tensors that something has happened to in between: they hold what ``torch.save`` would."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

import pytest
import torch

import ckpt_fast
from ckpt_fast.errors import CheckpointError
from ckpt_fast.pipeline.memory.strided import has_storage
from tests.pipeline.in_place import BREAKAGES, MUTATIONS, mutate, some_tensors

pytestmark = pytest.mark.usefixtures("native_impl", "no_fsync")


def saved_by_torch(tensor: torch.Tensor) -> torch.Tensor:
    buffer = io.BytesIO()
    torch.save(tensor.detach(), buffer)
    buffer.seek(0)
    stored: torch.Tensor = torch.load(buffer)
    return stored.resolve_conj().resolve_neg().contiguous()


def require_saved(state: dict[str, torch.Tensor], directory: Path, in_background: bool) -> None:
    expected = {name: saved_by_torch(tensor) for name, tensor in state.items()}
    if in_background:
        future = ckpt_fast.async_save(state, directory, no_dist=True)
        for number, tensor in enumerate(state.values()):
            mutate(tensor, MUTATIONS["values_changed"], number)
        future.result()
    else:
        ckpt_fast.save(state, directory, no_dist=True)
    found = {name: torch.full_like(tensor, 77) for name, tensor in expected.items()}
    ckpt_fast.load(found, directory, no_dist=True)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(bits(found[name]), bits(tensor)), name


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a contiguous tensor: memory that was never written may hold any."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("seed", range(8))
def test_what_happened_in_place_is_saved(seed: int, tmp_path: Path) -> None:
    chance = Random(seed)
    for _ in range(4):
        state = some_tensors(seed)
        for _ in range(5):
            require_saved(state, tmp_path, chance.random() < 0.5)
            for name in chance.sample(sorted(state), 4):
                mutate(state[name], chance.choice(list(MUTATIONS.values())), chance.getrandbits(16))


@pytest.mark.parametrize("name", some_tensors())
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_one_thing_happened(mutation: str, name: str, tmp_path: Path) -> None:
    state = some_tensors()
    require_saved(state, tmp_path, False)
    mutate(state[name], MUTATIONS[mutation], 3)
    require_saved(state, tmp_path, False)


@pytest.mark.parametrize("name", some_tensors())
@pytest.mark.parametrize("breakage", BREAKAGES)
def test_memory_that_is_gone_is_not_read(breakage: str, name: str, tmp_path: Path) -> None:
    state = some_tensors()
    require_saved(state, tmp_path, False)
    nbytes = state[name].untyped_storage().nbytes()
    mutate(state[name], BREAKAGES[breakage], 0)
    assert not all(map(has_storage, state.values()))
    with pytest.raises(CheckpointError, match="its storage has only"):
        ckpt_fast.save(state, tmp_path, no_dist=True)
    state[name].untyped_storage().resize_(nbytes)
    for tensor in state.values():
        mutate(tensor, MUTATIONS["values_changed"], 1)
    require_saved(state, tmp_path, False)
