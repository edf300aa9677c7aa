# SPDX-License-Identifier: Apache-2.0
"""The lengths of objects in a ``.metadata`` that is used again."""

from __future__ import annotations

import pytest

from ckpt_fast.format.types import Extent, ItemRecord, RankRecord
from ckpt_fast.pipeline.save.sealed import SealedMetadata


def test_objects_whose_length_may_need_more_than_four_bytes_are_refused() -> None:
    item = ItemRecord("object", Extent("__0_0.distcp", 0, (1 << 31) - 1), None, (), (), ())
    with pytest.raises(ValueError, match="longer than"):
        SealedMetadata([RankRecord([item], [], program="token")], None)
