# SPDX-License-Identifier: Apache-2.0
"""Where shards lie in the tensors that a run has registered."""

from __future__ import annotations

import torch

from ckpt_fast.doors.megatron.reuse import _places


def test_shards_lie_in_the_longest_tensor_that_begins_before_them() -> None:
    whole, other = torch.arange(20.0), torch.ones(4)
    sources = [other, whole[5:8], whole]
    assert _places([whole[6:8], whole[12:], other], [whole, *sources[:1]]) == [(0, 24), (0, 48), (1, 0)]
    assert _places([whole[5:7]], sources) == [(1, 0)]
    assert _places([torch.ones(1)], sources) is None
    assert _places([whole[:0]], sources) == [(0, 0)]


def test_shards_have_no_place_where_nothing_is_registered() -> None:
    assert _places([], []) == []
    assert _places([torch.ones(0)], []) is None
