# SPDX-License-Identifier: Apache-2.0
"""Where the memory of many tensors is, and what form it has: in columns, by one call for all of them."""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import torch

from ckpt_fast import native

# What state mostly consists of, told by its type alone.
PLAIN_TENSORS = frozenset((torch.Tensor, torch.nn.Parameter))
_QUANTIZED = frozenset((torch.quint8, torch.qint8, torch.qint32, torch.quint4x2, torch.quint2x4))


def has_own_memory(tensor: torch.Tensor) -> bool:
    """Whether the elements of a tensor are in a storage of its own, each where its strides say.

    Others are sparse, or of a subclass that handles operators itself and stands for tensors inside it, as
    DTensor does.
    """
    return tensor.layout == torch.strided and _has_own_memory(type(tensor))


class Form(NamedTuple):
    """Everything about the memory of a strided tensor but its address and its values.

    Attributes:
        dtype, shape, stride: see torch.
        device: its number; -1 for the CPU and other devices without numbers.
        is_cpu, is_meta: whether it is on this device.
        is_lazy: whether values differ from what memory holds, by a conjugate or negative bit.
        has_storage: whether the storage has all elements: it may have been freed, or cut short.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    device: int
    is_cpu: bool
    is_meta: bool
    is_lazy: bool
    has_storage: bool

    @property
    def is_contiguous(self) -> bool:
        """Whether the elements lie in row-major order without a gap."""
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size == 0:
                return True
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    @property
    def is_quantized(self) -> bool:
        """Whether elements mean something only together with a scale."""
        return self.dtype in _QUANTIZED

    def key(self) -> tuple[Any, ...]:
        """The form in plain values, of this process only."""
        return (id(self.dtype), *self[1:])


class Described(NamedTuple):
    """Values, some of which are tensors with memory of their own.

    Attributes:
        forms: int64 [values]: number of each one's form; -1 if it is no such tensor.
        addresses: int64 [values]: of the first element; 0 if there is none.
        table: the forms.
    """

    forms: torch.Tensor
    addresses: torch.Tensor
    table: list[Form]

    def keys(self) -> tuple[bytes, list[tuple[Any, ...]]]:
        """The form of each value, in plain values of this process only."""
        return self.forms.numpy().tobytes(), [form.key() for form in self.table]

    def equals(self, other: Described) -> bool:
        """Whether all forms and addresses are the same."""
        return (
            self.table == other.table
            and torch.equal(self.forms, other.forms)
            and torch.equal(self.addresses, other.addresses)
        )


def describe(values: list[Any]) -> Described:
    """Describe those of the values that are tensors with memory of their own (``has_own_memory``)."""
    types = tuple(kind for kind in set(map(type, values)) if _has_own_memory(kind))
    # Modes and subclasses that intercept torch functions have no say in where bytes are.
    with torch._C.DisableTorchFunction():
        forms, addresses, table = native.describe_tensors(values, types, torch.strided)
    return Described(integers(forms), integers(addresses), [Form(*form) for form in table])


def _has_own_memory(kind: type) -> bool:
    return issubclass(kind, torch.Tensor) and kind.__torch_dispatch__ is torch.Tensor.__torch_dispatch__


def integers(column: bytearray | array[int]) -> torch.Tensor:
    """A column of signed 64-bit integers as a tensor, without a copy."""
    return torch.frombuffer(column, dtype=torch.int64) if column else torch.zeros(0, dtype=torch.int64)
