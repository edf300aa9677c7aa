# SPDX-License-Identifier: Apache-2.0
"""Checks on what all ranks have written, in columns: they agree, and wrote everything once."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.columns.items import Items
from ckpt_fast.format.columns.lists import Ints, stable_order
from ckpt_fast.format.consistency import Region, require_apart

Flags = npt.NDArray[np.bool_]


class Kept(NamedTuple):
    """The items that ``.metadata`` mentions: all but empty pieces of tensors that have others.

    Attributes:
        first: for each name, its first row.
        is_left_out: for each row, whether it is not mentioned.
        rows: the others, by name, and those of a name in their order.
        begin: where in ``rows`` those of each name begin; then their number.
    """

    first: Ints
    is_left_out: Flags
    rows: Ints
    begin: Ints


def require_complete(items: Items, *, partial: bool = False) -> Kept:
    """Check that together the ranks have written each element of each tensor, and each object, once.

    Args:
        items: of all ranks.
        partial: elements may be missing.

    Raises:
        CheckpointMismatchError: two ranks disagree on a tensor's shape or dtype, or wrote the same piece, or
            the pieces of a tensor do not cover each of its elements once; with ``partial`` at most once.
    """
    kept = _kept(items)
    _require_agreement(items, kept)
    _require_coverage(items, kept, partial)
    return kept


def _kept(items: Items) -> Kept:
    name, count = items.rows["name"], len(items.names)
    numbers = np.arange(len(name))
    first = np.zeros(count, np.int64)
    first[name[::-1]] = numbers[::-1]
    products = items.lists.products
    is_empty = ~items.are_objects & (products[items.rows["sizes"]] == 0)
    # Where there are more ranks than rows, pieces are empty and may share an offset.
    is_left_out = is_empty & ((products[items.rows["shape"]] > 0) | (first[name] != numbers))
    rows = numbers[~is_left_out]
    rows = rows[stable_order(name[rows])]
    return Kept(first, is_left_out, rows, np.searchsorted(name[rows], np.arange(count + 1)))


def _require_agreement(items: Items, kept: Kept) -> None:
    rows = items.rows
    first = kept.first[rows["name"]]
    dtype, shape = rows["dtype"], rows["shape"]
    differs = (dtype != dtype[first]) | ((shape != shape[first]) & (dtype != 0))
    # Sorted by name already, and stable: of two equal places, the earlier row comes first.
    place = rows["place"][kept.rows].astype(np.int64) * len(items.names) + rows["name"][kept.rows]
    order = np.argsort(place, kind="stable")
    is_repeated = place[order][1:] == place[order][:-1]
    repeated = kept.rows[order[1:][is_repeated]]
    originals = kept.rows[order[:-1][is_repeated]]
    disagreeing = np.flatnonzero(differs)
    row = int(min(disagreeing.min(initial=len(rows)), repeated.min(initial=len(rows))))
    if row == len(rows):
        return
    name, path = items.names[rows["name"][row]], items.paths[rows["file"][row]]
    if not differs[row]:
        original = int(originals[np.flatnonzero(repeated == row)[0]])
        raise CheckpointMismatchError(
            f"{name} at {items.lists[rows['place'][row]] or 'no offset'} is written by two ranks, in "
            f"{items.paths[rows['file'][original]]} and {path}. Each piece needs exactly one main "
            "replica: check replica_id of the sharded state dict."
        )
    other = int(first[row])
    if (dtype[row] == 0) != (dtype[other] == 0):
        raise CheckpointMismatchError(
            f"{name} is a tensor on one rank and an object on another (file {path}). "
            "Nothing was published; check that all ranks build the same model."
        )
    one, another = (f"{items.lists[shape[each]]} of {items.dtypes[dtype[each]]}" for each in (other, row))
    raise CheckpointMismatchError(
        f"ranks disagree on {name}: {one} on one, {another} on another (file {path}). "
        "Nothing was published; check that all ranks build the same model."
    )


def _require_coverage(items: Items, kept: Kept, partial: bool) -> None:
    rows, products = items.rows, items.lists.products
    is_tensor = rows["dtype"][kept.first] != 0
    wanted = products[rows["shape"][kept.first]]
    totals = np.concatenate([[0], np.cumsum(products[rows["sizes"][kept.rows]])])
    written = totals[kept.begin[1:]] - totals[kept.begin[:-1]]
    checked = is_tensor & (wanted > 0)
    wrong = checked & ((written > wanted) | ((written < wanted) & (not partial)))
    whole = checked & ~wrong & (written == wanted)
    scattered = _not_tiled(items, kept, np.flatnonzero(whole))
    for number in np.flatnonzero(checked & (written < wanted) & ~wrong).tolist():
        if not _are_apart(items, kept, number):
            scattered[number] = True
    failed = np.flatnonzero(wrong | scattered)
    if not len(failed):
        return
    number = int(failed[0])
    shape = items.lists[rows["shape"][kept.first[number]]]
    what = f"{items.names[number]} {shape}"
    if wrong[number]:
        problem = f"the ranks wrote {written[number]} of the {math.prod(shape)} elements of {what}"
    else:
        problem = f"the pieces that the ranks wrote do not cover {what}: some overlap"
    raise CheckpointMismatchError(
        f"{problem}. Nothing was published; check the sharding that model and optimizer declare for it."
    )


def _are_apart(items: Items, kept: Kept, number: int) -> bool:
    lists, rows = items.lists, items.rows
    regions = [
        Region(lists[rows["place"][row]], lists[rows["sizes"][row]])
        for row in kept.rows[kept.begin[number] : kept.begin[number + 1]]
    ]
    try:
        require_apart(lists[rows["shape"][kept.first[number]]], regions)
    except ValueError:
        return False
    return True


def _not_tiled(items: Items, kept: Kept, names: Ints) -> Flags:
    """For each name, whether it is one of ``names`` and its pieces do not cover the tensor exactly once.

    Args:
        names: of tensors, in ascending order. Their pieces have as many elements as the tensors.
    """
    lists, rows = items.lists, items.rows
    fails = np.zeros(len(items.names), bool)
    dimensions = lists.lengths[rows["shape"][kept.first[names]]]
    for dimension_count in np.unique(dimensions).tolist():
        group = names[dimensions == dimension_count]
        counts = kept.begin[group + 1] - kept.begin[group]
        pieces = kept.rows[_ranges(kept.begin[group], counts)]
        of = np.repeat(np.arange(len(group)), counts)
        place, sizes = rows["place"][pieces], rows["sizes"][pieces]
        fits = (lists.lengths[place] == dimension_count) & (lists.lengths[sizes] == dimension_count)
        if not fits.all():
            fails[group[of[~fits]]] = True
            is_fit = ~fails[group][of]
            pieces, of, place, sizes = pieces[is_fit], of[is_fit], place[is_fit], sizes[is_fit]
        shape = lists.matrix(rows["shape"][kept.first[group]], dimension_count)
        boxes = _Boxes(of, lists.matrix(place, dimension_count), lists.matrix(sizes, dimension_count), shape)
        fails[group[boxes.not_tiling()]] = True
    return fails


def _ranges(begin: Ints, counts: Ints) -> Ints:
    """The numbers from each beginning on, as many as the count says."""
    ends = np.cumsum(counts)
    numbers: Ints = np.arange(counts.sum()) + np.repeat(begin - (ends - counts), counts)
    return numbers


class _Boxes(NamedTuple):
    """Pieces of tensors of equally many dimensions, those of one tensor together.

    Attributes:
        of: [pieces]: the tensor of each.
        begins, sizes: [pieces, dimensions].
        shapes: [tensors, dimensions].
    """

    of: Ints
    begins: Ints
    sizes: Ints
    shapes: Ints

    def not_tiling(self) -> Ints:
        """The tensors that are not the sum of their pieces, which have the right number of elements."""
        if not self.shapes.shape[1]:
            return np.zeros(0, np.int64)
        is_divided = np.zeros(self.shapes.shape, bool)
        np.logical_or.at(is_divided, self.of, (self.begins != 0) | (self.sizes != self.shapes[self.of]))
        number = is_divided.sum(axis=1)
        along_one = np.flatnonzero(number == 1)
        in_a_grid = np.flatnonzero(number > 1)
        failed = [self._not_in_a_row(along_one, is_divided), self._corners_left(in_a_grid, is_divided)]
        return np.concatenate(failed)

    def _not_in_a_row(self, tensors: Ints, is_divided: Flags) -> Ints:
        """Of tensors that are divided along one dimension: whose pieces do not follow one another."""
        chosen = np.zeros(len(self.shapes), bool)
        chosen[tensors] = True
        pieces = np.flatnonzero(chosen[self.of])
        of = self.of[pieces]
        along = is_divided.argmax(axis=1)
        begin, size = self.begins[pieces, along[of]], self.sizes[pieces, along[of]]
        order = np.lexsort((begin, of))
        of, begin, end = of[order], begin[order], (begin + size)[order]
        is_first = np.concatenate([[True], of[1:] != of[:-1]])[: len(of)]
        expected = np.where(is_first, 0, np.concatenate([[0], end[:-1]])[: len(of)])
        is_last = np.concatenate([is_first[1:], [True]])[: len(of)]
        wrong = (begin != expected) | (is_last & (end != self.shapes[of, along[of]]))
        return np.unique(of[wrong])

    def _corners_left(self, tensors: Ints, is_divided: Flags) -> Ints:
        """Of tensors that are divided along several dimensions: whose corners do not add up.

        Boxes add up to one box everywhere if and only if their corners do, counted with alternating signs.
        """
        if not len(tensors):
            return tensors
        chosen = np.zeros(len(self.shapes), bool)
        chosen[tensors] = True
        pieces = np.flatnonzero(chosen[self.of])
        divided = np.flatnonzero(is_divided[tensors].any(axis=0))
        of = np.concatenate([self.of[pieces], tensors])
        begins = np.concatenate(
            [self.begins[pieces][:, divided], np.zeros((len(tensors), len(divided)), int)]
        )
        ends = begins + np.concatenate([self.sizes[pieces][:, divided], self.shapes[tensors][:, divided]])
        # The whole counts against its pieces.
        sign = np.concatenate([np.ones(len(pieces), int), -np.ones(len(tensors), int)])
        corners, signs = [], []
        for at_end in itertools.product((False, True), repeat=len(divided)):
            corners.append(np.where(at_end, ends, begins))
            signs.append(sign * (-1) ** sum(at_end))
        return _unbalanced(np.tile(of, len(corners)), np.concatenate(corners), np.concatenate(signs))


def _unbalanced(of: Ints, corners: Ints, signs: Ints) -> Ints:
    """The tensors with a corner whose signs do not add up to zero."""
    columns: Iterable[Ints] = corners.T
    order = np.lexsort((*columns, of))
    of, corners, signs = of[order], corners[order], signs[order]
    is_new = np.ones(len(of), bool)
    is_new[1:] = (of[1:] != of[:-1]) | (corners[1:] != corners[:-1]).any(axis=1)
    starts = np.flatnonzero(is_new)
    return np.unique(of[starts][np.add.reduceat(signs, starts) != 0])
