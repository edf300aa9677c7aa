# SPDX-License-Identifier: Apache-2.0
"""Engine and twin describe the memory of tensors alike, and leave alone what has none of its own."""

from __future__ import annotations

from random import Random
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from ckpt_fast import native
from ckpt_fast.pipeline.memory.forms import describe
from ckpt_fast.pipeline.memory.strided import has_storage
from tests.pipeline.in_place import BREAKAGES, MUTATIONS, mutate, some_tensors


def freed(nbytes: int) -> torch.Tensor:
    tensor = torch.zeros(100)
    tensor.untyped_storage().resize_(nbytes)
    return tensor


class Named(torch.Tensor):
    """Wraps nothing, and changes nothing."""


KINDS = {
    "a matrix": lambda: torch.zeros(3, 4),
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(3, 4)),
    "its transposition": lambda: torch.zeros(3, 4).t(),
    "a slice": lambda: torch.zeros(8, 4)[2:6:2, 1:],
    "expanded": lambda: torch.zeros(1, 4).expand(1000, 4),
    "a number": lambda: torch.tensor(1),
    "empty": lambda: torch.zeros(0, 7),
    "half": lambda: torch.zeros(3, 4, dtype=torch.bfloat16),
    "conjugate": lambda: torch.zeros(3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.zeros(3, dtype=torch.complex64).conj().imag,
    "meta": lambda: torch.zeros(3, device="meta"),
    "freed": lambda: freed(0),
    "cut short": lambda: freed(399),
    "reaching just to the end": lambda: freed(400),
    "zeros without memory": lambda: torch._efficientzerotensor((3,)),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.quint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "a subclass": lambda: torch.zeros(3).as_subclass(Named),
    "no tensor": lambda: "text",
}


@given(st.lists(st.sampled_from(sorted(KINDS)), max_size=12))
def test_engine_and_twin_agree(kinds: list[str]) -> None:
    values = [KINDS[kind]() for kind in kinds]
    found = []
    for implementation in ("engine", "fallback"):
        with native.using(implementation):
            found.append(describe(values))
    assert found[0].equals(found[1])


def facts(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (
        tensor.data_ptr(),
        (tensor.dtype, tuple(tensor.shape), tensor.stride()),
        tensor.is_conj() or tensor.is_neg(),
        has_storage(tensor),
    )


@pytest.mark.parametrize("seed", range(20))
def test_what_happens_in_place_is_seen(seed: int) -> None:
    chance = Random(seed)
    mutations = [*MUTATIONS.values(), *BREAKAGES.values()]
    values = list(some_tensors(seed).values())
    for _ in range(40):
        mutate(chance.choice(values), chance.choice(mutations), chance.getrandbits(16))
        for implementation in ("engine", "fallback"):
            with native.using(implementation):
                described = describe(values)
            for value, form, address in zip(values, described.forms, described.addresses, strict=True):
                found = described.table[int(form)]
                layout = (found.dtype, found.shape, found.stride)
                assert (int(address), layout, found.is_lazy, found.has_storage) == facts(value)


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_is_what_torch_says(kind: str, native_impl: str) -> None:
    value = KINDS[kind]()
    described = describe(["something else", value])
    number, address = int(described.forms[1]), int(described.addresses[1])
    assert (int(described.forms[0]), int(described.addresses[0])) == (-1, 0)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        assert (number, address) == (-1, 0)
        return
    form = described.table[number]
    assert (form.dtype, form.shape, form.stride) == (value.dtype, tuple(value.shape), value.stride())
    assert (form.device, form.is_cpu, form.is_meta) == (-1, not value.is_meta, value.is_meta)
    assert form.is_contiguous == value.is_contiguous()
    assert form.is_quantized == value.is_quantized
    assert form.is_lazy == (kind in {"conjugate", "negative"})
    assert form.has_storage == (kind not in {"freed", "cut short", "zeros without memory"})
    assert address == (0 if value.is_meta else value.data_ptr())


@pytest.mark.gpu
def test_engine_and_twin_agree_on_a_gpu() -> None:
    matrix = torch.zeros(3, 4, device="cuda")
    values = [matrix, matrix.t(), torch.nn.Parameter(matrix.half()), torch.zeros(3, 4)]
    with native.using("fallback"):
        expected = describe(values)
    with native.using("engine"):
        assert describe(values).equals(expected)
    assert [(form.device, form.is_cpu) for form in expected.table] == [(0, False)] * 3 + [(-1, True)]


def test_equal_forms_have_one_number() -> None:
    values = [torch.zeros(3, 4), torch.zeros(4, 3), torch.ones(3, 4), torch.zeros(3, 4).to(torch.half)]
    assert describe(values).forms.tolist() == [0, 1, 0, 2]


def test_what_cannot_be_asked_is_not_described(native_impl: str) -> None:
    class Broken(torch.nn.Parameter):
        @property
        def dtype(self) -> object:
            raise RuntimeError("no dtype")

    broken = torch.Tensor._make_subclass(Broken, torch.zeros(2))
    forms, addresses, table = native.describe_tensors([broken], (Broken,), torch.strided)
    assert (forms, addresses, table) == (bytearray(b"\xff" * 8), bytearray(8), [])
