# SPDX-License-Identifier: Apache-2.0
"""What test ranks import, once for all of them: they are forked from the process that imports this."""

import gc

import hypothesis
import pytest
import torch.distributed.device_mesh

import ckpt_fast.checkpointing
import tests.models

__all__ = ["ckpt_fast", "hypothesis", "pytest", "tests", "torch"]

# All of it stays, so collections in the ranks need neither walk it nor copy its memory.
gc.collect()
gc.freeze()
