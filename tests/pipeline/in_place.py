# SPDX-License-Identifier: Apache-2.0
"""What may happen to the memory of a tensor while it stays the same object."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from random import Random

import torch

from ckpt_fast.pipeline.memory.strided import has_storage

Mutation = Callable[[torch.Tensor, Random], None]


def random_like(tensor: torch.Tensor, shape: tuple[int, ...], chance: Random) -> torch.Tensor:
    """Return a contiguous tensor of the other's dtype, with small whole numbers in it."""
    generator = torch.Generator().manual_seed(chance.getrandbits(32))
    return torch.randint(1, 100, shape, generator=generator).to(tensor.dtype)


def any_shape(chance: Random) -> tuple[int, ...]:
    return tuple(chance.randrange(0, 6) for _ in range(chance.randrange(0, 4)))


def values_changed(tensor: torch.Tensor, chance: Random) -> None:
    tensor.copy_(random_like(tensor, tuple(tensor.shape), chance))


def transposed(tensor: torch.Tensor, _: Random) -> None:
    tensor.t_()


def resized(tensor: torch.Tensor, chance: Random) -> None:
    """Leave the memory that is new undefined, and then define it."""
    tensor.resize_(any_shape(chance))
    values_changed(tensor, chance)


def strided_otherwise(tensor: torch.Tensor, chance: Random) -> None:
    size = tensor.numel()
    tensor.as_strided_((size // 2, 2), chance.choice([(1, 1), (2, 1), (1, 0), (1, size // 2)]))


def flattened(tensor: torch.Tensor, _: Random) -> None:
    tensor.as_strided_((tensor.numel(),), (1,))


def set_to_another(tensor: torch.Tensor, chance: Random) -> None:
    tensor.set_(random_like(tensor, any_shape(chance), chance))  # type: ignore[call-overload]


def set_to_a_part(tensor: torch.Tensor, chance: Random) -> None:
    tensor.set_(tensor.detach()[chance.randrange(2) :])  # type: ignore[call-overload]


def data_exchanged(tensor: torch.Tensor, chance: Random) -> None:
    tensor.data = random_like(tensor, tuple(tensor.shape), chance)


def data_of_another_shape(tensor: torch.Tensor, chance: Random) -> None:
    tensor.data = random_like(tensor, any_shape(chance), chance)


def data_of_another_dtype(tensor: torch.Tensor, chance: Random) -> None:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.complex64)
    tensor.data = tensor.detach().to(chance.choice(dtypes))


def data_of_the_same_bytes(tensor: torch.Tensor, _: Random) -> None:
    """Show the same memory as another dtype of the same size."""
    dtypes = {torch.float32: torch.int32, torch.int32: torch.float32, torch.bfloat16: torch.float16}
    tensor.data = tensor.detach().view(dtypes[tensor.dtype])


def data_conjugate(tensor: torch.Tensor, _: Random) -> None:
    """Show the same memory, of complex numbers, as their conjugates."""
    tensor.data = tensor.detach().conj()


def data_negative(tensor: torch.Tensor, _: Random) -> None:
    """Show the same memory with the other sign."""
    tensor.data = tensor.detach()._neg_view()


def data_in_columns(tensor: torch.Tensor, chance: Random) -> None:
    tensor.data = random_like(tensor, (5, 700), chance)[:, 1:600]


def data_expanded(tensor: torch.Tensor, chance: Random) -> None:
    tensor.data = random_like(tensor, (1, 4), chance).expand(3, 4)


def exchanged_as_a_whole(tensor: torch.Tensor, chance: Random) -> None:
    torch.utils.swap_tensors(tensor, random_like(tensor, tuple(tensor.shape), chance))


def storage_moved(tensor: torch.Tensor, chance: Random) -> None:
    storage = tensor.untyped_storage()
    storage.resize_(storage.nbytes() + chance.choice([16, 1 << 16]))
    values_changed(tensor, chance)


def storage_freed_and_back(tensor: torch.Tensor, chance: Random) -> None:
    """Let it get the same memory, or another."""
    storage = tensor.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(nbytes)
    values_changed(tensor, chance)


def storage_freed(tensor: torch.Tensor, _: Random) -> None:
    tensor.untyped_storage().resize_(0)


def storage_cut_short(tensor: torch.Tensor, chance: Random) -> None:
    """Leave less than there was, perhaps in the same place."""
    storage = tensor.untyped_storage()
    nbytes = storage.nbytes()
    if chance.randrange(2):
        storage.resize_(0)
    storage.resize_(nbytes - 1)


# What leaves a tensor that has values.
MUTATIONS: dict[str, Mutation] = {
    function.__name__: function
    for function in (
        values_changed,
        transposed,
        resized,
        strided_otherwise,
        flattened,
        set_to_another,
        set_to_a_part,
        data_exchanged,
        data_of_another_shape,
        data_of_another_dtype,
        data_of_the_same_bytes,
        data_conjugate,
        data_negative,
        data_in_columns,
        data_expanded,
        exchanged_as_a_whole,
        storage_moved,
        storage_freed_and_back,
    )
}
# What leaves one without.
BREAKAGES: dict[str, Mutation] = {
    function.__name__: function for function in (storage_freed, storage_cut_short)
}


def mutate(tensor: torch.Tensor, mutation: Mutation, seed: int) -> None:
    """Do it, if torch can do it with this tensor; it does not look whether there is memory."""
    if not has_storage(tensor):
        return
    with contextlib.suppress(RuntimeError, TypeError, IndexError, KeyError), torch.no_grad():
        mutation(tensor, Random(seed))


def some_tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return tensors of many kinds, some of which share memory."""
    chance = Random(seed)
    single, half, whole, imaginary = (
        torch.zeros(0, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.int32, torch.complex64)
    )
    buffer = random_like(single, (60,), chance)
    return {
        "matrix": random_like(single, (4, 4), chance),
        "parameter": torch.nn.Parameter(random_like(single, (3, 4), chance)),
        "frozen": torch.nn.Parameter(random_like(half, (2, 9), chance), requires_grad=False),
        "first of a buffer": buffer[:24].view(4, 6),
        "last of a buffer": buffer[24:],
        "complex": random_like(imaginary, (2, 3), chance),
        "whole": random_like(whole, (2, 5), chance),
        "number": random_like(half, (), chance),
    }
