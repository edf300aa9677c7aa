# SPDX-License-Identifier: Apache-2.0
"""Lists of whole numbers (shapes, places, extents) in columns: many of them, no object for each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# Products are computed in 64 bits. No memory holds a tensor of so many elements.
LARGEST_PRODUCT = 1 << 62


class Lists:
    """Numbered lists of whole numbers.

    Args:
        lengths: int64 [lists]: how many numbers each has.
        numbers: int64: those of the first list, then of the second, and so on.
    """

    def __init__(self, lengths: Ints, numbers: Ints) -> None:
        self.lengths = lengths
        self.numbers = numbers
        self._starts = np.cumsum(lengths) - lengths

    @classmethod
    def of(cls, lists: Sequence[Sequence[int]]) -> Lists:
        """These lists, in this order."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        numbers = [number for each in lists for number in each]
        return cls(lengths, np.array(numbers, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, number: int) -> tuple[int, ...]:
        start = self._starts[number]
        return tuple(self.numbers[start : start + self.lengths[number]].tolist())

    def matrix(self, which: npt.NDArray[np.integer[Any]], length: int) -> Ints:
        """int64 [which, length]: the numbers of lists that are all of one length."""
        numbers: Ints = self.numbers[self._starts[which][:, None] + np.arange(length)]
        return numbers

    def by_length(self) -> Iterator[tuple[int, Ints, Ints]]:
        """For each length, the lists that have it, and their numbers as of ``matrix``."""
        for length in np.unique(self.lengths).tolist():
            which = np.flatnonzero(self.lengths == length)
            yield length, which, self.matrix(which, length)

    @cached_property
    def products(self) -> Ints:
        """int64 [lists]: the product of each list's numbers, at most ``LARGEST_PRODUCT``."""
        products = np.ones(len(self), np.int64)
        for length, which, matrix in self.by_length():
            if length:
                large = np.prod(matrix.astype(np.float64), axis=1) > LARGEST_PRODUCT
                products[which] = np.where(large, LARGEST_PRODUCT, np.prod(matrix, axis=1))
        return products

    def unique(self) -> tuple[Lists, Ints]:
        """Each list once, the shorter ones first; and for each list, which of these it is."""
        inverse = np.zeros(len(self), np.int64)
        lengths, numbers, count = [], [], 0
        for length, which, matrix in self.by_length():
            first, same = _first_and_same(matrix)
            inverse[which] = same + count
            lengths.append(np.full(len(first), length, np.int64))
            numbers.append(matrix[first].ravel())
            count += len(first)
        return Lists(_joined(lengths), _joined(numbers)), inverse

    def find(self, numbers: Sequence[int]) -> int | None:
        """Which of the lists these numbers are; None if none is, or some of them are equal."""
        known = self._sorted.get(len(numbers))
        if known is None:
            return None
        which, radix, keys = known
        if radix is None or any(
            not 0 <= number < limit for number, limit in zip(numbers, radix, strict=True)
        ):
            return None
        key = 0
        for number, limit in zip(numbers, radix, strict=True):
            key = key * limit + number
        begin, end = np.searchsorted(keys, key), np.searchsorted(keys, key, "right")
        return int(which[begin]) if end - begin == 1 else None

    @cached_property
    def _sorted(self) -> dict[int, tuple[Ints, list[int] | None, Ints]]:
        found = {}
        for length, which, matrix in self.by_length():
            radix = _radix(matrix)
            keys = np.zeros(0, np.int64) if radix is None else _keys(matrix, radix)
            order = np.argsort(keys, kind="stable")
            found[length] = (which[order] if radix is not None else which, radix, keys[order])
        return found


def stable_order(numbers: npt.NDArray[np.integer[Any]]) -> Ints:
    """What sorts numbers and leaves equal ones in their order; in linear time if they are small."""
    if numbers.max(initial=0) < 1 << 16:
        numbers = numbers.astype(np.uint16)
    return numbers.argsort(kind="stable")


def _joined(columns: list[Ints]) -> Ints:
    return np.concatenate(columns) if columns else np.zeros(0, np.int64)


def _first_and_same(matrix: Ints) -> tuple[Ints, Ints]:
    """Where each different row of a matrix stands first; and for each row, which of those it equals."""
    if not matrix.shape[1]:
        return np.zeros(min(1, len(matrix)), np.int64), np.zeros(len(matrix), np.int64)
    radix = _radix(matrix)
    if radix is not None:
        _, first, same = np.unique(_keys(matrix, radix), return_index=True, return_inverse=True)
    else:
        _, first, same = np.unique(matrix, axis=0, return_index=True, return_inverse=True)
    return first, same.reshape(-1)


def _radix(matrix: Ints) -> list[int] | None:
    """For each column more than any number in it, where their product has 63 bits; None otherwise."""
    if not len(matrix) or matrix.min(initial=0) < 0:
        return None
    radix = [number + 1 for number in matrix.max(axis=0).tolist()]
    product = 1
    for each in radix:
        product *= each
    return radix if product <= LARGEST_PRODUCT else None


def _keys(matrix: Ints, radix: list[int]) -> Ints:
    """A number for each row, the same only for equal ones."""
    keys = np.zeros(len(matrix), np.int64)
    for column, limit in enumerate(radix):
        keys *= limit
        keys += matrix[:, column]
    return keys
