# SPDX-License-Identifier: Apache-2.0
"""Megatron-Core's strategy for the common state, where it has one: versions before 0.19.

They write ``common.pt`` before they ask the strategy for the sharded part. An object that is refused only
there has replaced the file of an older checkpoint by then.
"""

from __future__ import annotations

import os
from typing import Any

from ckpt_fast import compat
from ckpt_fast.doors.megatron.common_state import common_bytes
from ckpt_fast.errors import also_raised_as
from ckpt_fast.ranks.group import ControlGroup

_StockStrategy: Any = compat.TorchCommonSaveStrategy or object


class FastCommonSaveStrategy(_StockStrategy):  # type: ignore[misc]
    """Writes the common state as Megatron-Core does, after looking whether it can be loaded again."""

    @also_raised_as(compat.DistCheckpointingError)
    def save_common(self, common_state_dict: dict[str, Any], checkpoint_dir: str | os.PathLike[str]) -> None:
        """Collective. Check the common state, then let Megatron-Core write it on rank 0.

        Raises:
            UnsafeCheckpointError: on every rank: it has an object that a load would refuse. No file was
                touched.
        """
        group = ControlGroup()
        group.agree(lambda: common_bytes(common_state_dict) if group.is_coordinator else None)
        super().save_common(common_state_dict, checkpoint_dir)
