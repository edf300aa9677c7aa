# SPDX-License-Identifier: Apache-2.0
"""Megatron Bridge's converter between Megatron-Core and Hugging Face models, if Bridge is installed."""

from __future__ import annotations

from typing import Any

from ckpt_fast.errors import UnavailableError
from ckpt_fast.optional import import_names


def import_auto_bridge() -> Any:
    """The class ``megatron.bridge.AutoBridge``; imported late, because it brings transformers along.

    Raises:
        UnavailableError: Megatron Bridge is not installed.
    """
    (auto_bridge,) = import_names("megatron.bridge", "AutoBridge")
    if auto_bridge is None:
        raise UnavailableError(
            "Hugging Face weights are converted by megatron.bridge.AutoBridge, which cannot be imported: "
            "install megatron-bridge, or convert the model elsewhere (also_save_hf_checkpoint=False; a "
            "torch_dist checkpoint as pretrained_checkpoint)"
        )
    return auto_bridge
