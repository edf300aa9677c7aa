# SPDX-License-Identifier: Apache-2.0
"""What ranks of the tests import, once for all of them: they are forked off the process that imports this."""

import gc

import torch.distributed.device_mesh

import ckpt_fast.checkpointing
import tests.models

__all__ = ["ckpt_fast", "tests", "torch"]

# All of it stays: collections in the ranks need not walk through it, nor copy the memory it is in.
gc.collect()
gc.freeze()
