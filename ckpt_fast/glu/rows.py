# SPDX-License-Identifier: Apache-2.0
"""The rows of gated MLP weights: copied from one order to the other, or seen in the other where they lie.

Dim 0 of a gated ``linear_fc1`` weight or bias holds F gate rows W and F up rows V. *Contiguous* order is
[W, V]; *interleaved* order is [W0:k, V0:k, Wk:2k, Vk:2k, ...] with interleave size k.
"""

from __future__ import annotations

import operator
from array import array
from collections import defaultdict
from collections.abc import Sequence

import torch

from ckpt_fast import native, settings
from ckpt_fast.errors import CheckpointMismatchError

# A device and a stream of it.
_Place = tuple[torch.device, int]


class GluRowsError(CheckpointMismatchError, RuntimeError):
    """The rows of a tensor cannot be paired: dim 0 is no multiple of twice the interleave size."""


class GluRankError(CheckpointMismatchError, IndexError):
    """The tensor has no dim 0."""


def permute_rows(tensor: torch.Tensor, interleave_size: int, interleave: bool, name: str) -> torch.Tensor:
    """A contiguous copy of a tensor with its rows in the other order.

    Args:
        tensor: any dtype, device and strides; not modified.
        interleave_size: k.
        interleave: from contiguous to interleaved order if True, otherwise back.
        name: what errors call the tensor.

    Returns:
        A tensor of the same shape, dtype and device that shares no memory with ``tensor`` and needs no
        gradient.

    Raises:
        CheckpointMismatchError: see ``require_pairs``.
    """
    moves = RowMoves()
    permuted = moves.add(tensor, interleave_size, interleave, name)
    moves.run()
    return permuted


class RowMoves:
    """Tensors whose rows will be copied in the other order, all at once: in one launch on a GPU."""

    def __init__(self) -> None:
        # For each device, stream and direction the arguments, and the tensors that must stay alive.
        self._waiting: defaultdict[tuple[_Place, bool], list[tuple[int, ...]]] = defaultdict(list)
        self._alive: list[torch.Tensor] = []

    def add(self, tensor: torch.Tensor, interleave_size: int, interleave: bool, name: str) -> torch.Tensor:
        """``permute_rows``, but what is in the result is undefined until ``run``."""
        block = require_pairs(tensor, interleave_size, name)
        # The bits as they are seen: a lazily conjugated or negated tensor has others in memory.
        data = tensor.detach().resolve_conj().resolve_neg()
        place = _native_place(data)
        if place is None:
            return _permute_by_views(data, block, interleave)
        permuted = torch.empty_like(data)
        rows = data.shape[0]
        row = (permuted.data_ptr(), data.data_ptr(), rows, data.nbytes // rows, block)
        self._waiting[place, interleave].append(row)
        self._alive += permuted, data
        return permuted

    def run(self) -> None:
        """Copy the rows. On a GPU that is ordered on the streams that were current when they were added."""
        for (place, interleave), rows in self._waiting.items():
            _permute_natively(rows, interleave, place)
        self._waiting.clear()
        self._alive.clear()


def contiguous_view(
    tensor: torch.Tensor, interleave_size: int, first: int, count: int
) -> torch.Tensor | None:
    """Rows ``first`` to ``first + count`` of the contiguous order, seen in an interleaved tensor.

    Returns:
        A view whose elements, in row-major order, are those of the rows, k rows to an index of its last but
        ``tensor.dim()`` dimensions. None if the rows begin or end inside a block, or lie on both sides of the
        middle without being all.

    Raises:
        CheckpointMismatchError: see ``require_pairs``.
    """
    block = require_pairs(tensor, interleave_size, "GLU tensor")
    half = tensor.shape[0] // 2
    blocks = torch.unflatten(tensor.detach(), 0, (half // block, 2, block))
    if (first, count) == (0, 2 * half):
        return blocks.transpose(0, 1)
    side = 1 if first >= half > 0 else 0
    begin = first - side * half
    if begin + count > half or begin % block or count % block:
        return None
    return blocks[begin // block : (begin + count) // block, side]


def require_pairs(tensor: torch.Tensor, interleave_size: int, name: str) -> int:
    """The interleave size as an int.

    Raises:
        CheckpointMismatchError: dim 0 is no multiple of 2k (also a RuntimeError), the tensor has no
            dimensions (also an IndexError), or k < 1.
        TypeError: k is no whole number.
    """
    block = operator.index(interleave_size)
    if block < 1:
        raise CheckpointMismatchError(f"{name}: the GLU interleave size is {block}, but must be at least 1")
    if tensor.dim() == 0:
        raise GluRankError(f"{name}: a tensor without dimensions has no GLU rows to reorder")
    if tensor.shape[0] % (2 * block):
        raise GluRowsError(
            f"{name}: dim 0 of shape {tuple(tensor.shape)} is no multiple of twice the GLU interleave size "
            f"{block}; choose moe_mlp_glu_interleave_size (moe_shared_expert_glu_interleave_size for shared "
            "experts) so that 2 * size divides the fc1 rows of one tensor-parallel rank"
        )
    return block


def _native_place(tensor: torch.Tensor) -> _Place | None:
    """The stream on which ``_permute_natively`` reorders the tensor: its device's current one, 0 for the CPU.

    None where torch must do it: the tensor is more, or less, than row after row of memory, or lies on a
    device without a kernel.
    """
    plain = type(tensor) is torch.Tensor and tensor.layout is torch.strided and not tensor.is_quantized
    if not plain or not tensor.is_contiguous() or tensor.numel() == 0:
        return None
    if tensor.device.type == "cpu":
        return tensor.device, 0
    if tensor.device.type != "cuda" or native.cuda() is None:
        return None
    return tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream


def _permute_natively(rows: Sequence[tuple[int, ...]], interleave: bool, place: _Place) -> None:
    to, origin, number, nbytes, blocks = (array("q", column) for column in zip(*rows, strict=True))
    device, stream = place
    if device.type == "cpu":
        native.permute_rows(to, origin, number, nbytes, blocks, interleave, settings.io_threads())
        return
    cuda = native.cuda()
    assert cuda is not None
    cuda.permute_rows(to, origin, number, nbytes, blocks, interleave, device.index, stream)


def _permute_by_views(data: torch.Tensor, block: int, interleave: bool) -> torch.Tensor:
    """The same by torch alone."""
    pairs = data.shape[0] // (2 * block)
    halves = (2, pairs, block) if interleave else (pairs, 2, block)
    swapped = data.reshape(*halves, *data.shape[1:]).transpose(0, 1)
    # clone, not contiguous: a single pair, swapped, is contiguous already and would be the input's memory.
    return swapped.clone(memory_format=torch.contiguous_format).reshape(data.shape)
