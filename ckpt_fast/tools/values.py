# SPDX-License-Identifier: Apache-2.0
"""Where two values of a checkpoint differ: objects by their parts, tensors by their elements."""

from __future__ import annotations

import argparse
import ctypes
import io
import math
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ckpt_fast import system

# Elements that are looked at together, in float64.
_CHUNK = 1 << 20
_MOST_SHOWN = 60

_memcmp = system.c_library().memcmp
_memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two contiguous CPU tensors of one dtype and shape have the same bytes."""
    nbytes = one.numel() * one.itemsize
    return bool(_memcmp(one.data_ptr(), other.data_ptr(), nbytes) == 0)


@dataclass
class Distance:
    """How far elements are apart, over all that were added.

    Attributes:
        elements: how many differ in value. NaN is equal to NaN.
        max_abs: the largest difference, in float64; infinite where only one of two is NaN.
        max_rel: the largest difference in relation to the larger magnitude of the two: 0 to 2.
    """

    elements: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Count in two tensors of one shape."""
        one, other = one.flatten(), other.flatten()
        for start in range(0, len(one), _CHUNK):
            self._add(_widened(one[start : start + _CHUNK]), _widened(other[start : start + _CHUNK]))

    def _add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        differs = (one != other) & ~(torch.isnan(one) & torch.isnan(other))
        count = int(differs.sum())
        if not count:
            return
        one, other = one[differs], other[differs]
        apart = (one - other).abs().nan_to_num(nan=math.inf)
        larger = torch.maximum(one.abs(), other.abs())
        relative = (apart / larger).nan_to_num(nan=math.inf)
        self.elements += count
        self.max_abs = max(self.max_abs, float(apart.max()))
        self.max_rel = max(self.max_rel, float(relative.max()))


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def first_difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two values differ, and how; None if they are equal. NaN is equal to NaN.

    Containers are compared by their parts, in whatever order dicts have theirs. Arrays and tensors are equal
    if dtype, shape and elements are.
    """
    for kind in (torch.Tensor, np.ndarray):
        if isinstance(one, kind) and isinstance(other, kind):
            return _array_difference(one, other, where)
    if isinstance(one, io.BytesIO) and isinstance(other, io.BytesIO):
        one, other = one.getvalue(), other.getvalue()
    parts = _parts(one), _parts(other)
    if parts[0] is None or parts[1] is None:
        return None if _is_equal(one, other) else _told(where, one, other)
    keys = [dict(each) for each in parts if each is not None]
    for key in keys[0].keys() | keys[1].keys():
        inner = f"{where}[{key!r}]"
        if key not in keys[0] or key not in keys[1]:
            return f"{inner} is in {'B' if key not in keys[0] else 'A'} only"
    for key, value in keys[0].items():
        found = first_difference(value, keys[1][key], f"{where}[{key!r}]")
        if found is not None:
            return found
    return None


def _parts(value: Any) -> Iterable[tuple[Any, Any]] | None:
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if isinstance(value, (argparse.Namespace, types.SimpleNamespace)):
        return vars(value).items()
    return None


def _array_difference(one: Any, other: Any, where: str) -> str | None:
    for what in ("dtype", "shape"):
        a, b = getattr(one, what), getattr(other, what)
        if a != b:
            return f"{where} has {what} {a} in A and {b} in B"
    if _is_equal(one, other):
        return None
    return f"{where} differs"


def _is_equal(one: Any, other: Any) -> bool:
    try:
        if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
            return math.isnan(other)
        if not isinstance(one, (np.ndarray, torch.Tensor)):
            return bool(one == other)
        return bool(((one == other) | (_nans(one) & _nans(other))).all())
    except (TypeError, ValueError, RuntimeError):
        return False


def _nans(array: Any) -> Any:
    if isinstance(array, torch.Tensor):
        return torch.isnan(array)
    return np.isnan(array) if array.dtype.kind in "fc" else np.False_


def _told(where: str, one: Any, other: Any) -> str:
    a, b = (_short(value) for value in (one, other))
    return f"{where} is {a} in A and {b} in B"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def pairs(names: Iterable[str], others: Iterable[str]) -> Iterator[tuple[str, bool, bool]]:
    """(name, whether it is in the first, whether it is in the second), in the order of the names."""
    first, second = set(names), set(others)
    for name in sorted(first | second):
        yield name, name in first, name in second
