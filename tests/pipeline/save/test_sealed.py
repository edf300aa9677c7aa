# SPDX-License-Identifier: Apache-2.0
"""The lengths of objects in a ``.metadata`` that is used again."""

from __future__ import annotations

import pytest
import torch

from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.format.types import Extent, ItemRecord, RankRecord
from ckpt_fast.pipeline.save.sealed import SealedMetadata


def test_objects_whose_length_may_need_more_than_four_bytes_are_refused() -> None:
    item = ItemRecord("object", Extent("__0_0.distcp", 0, (1 << 31) - 1), None, (), (), ())
    with pytest.raises(ValueError, match="longer than"):
        SealedMetadata([RankRecord([item], [], program="token")], None)


def test_what_was_allowed_to_leave_out_parts_does_not_pass_for_a_save_that_is_not() -> None:
    extent = Extent("__0_0.distcp", 0, 8)
    half = RankRecord([ItemRecord("w", extent, torch.float32, (0,), (2,), (4,))], [], program="token")
    sealed = SealedMetadata([half], None, partial=True)
    assert sealed.fits([half], None, partial=True) and not sealed.fits([half], None)
    with pytest.raises(CheckpointMismatchError, match="2 of the 4 elements"):
        SealedMetadata([half], None)
