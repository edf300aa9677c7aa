# SPDX-License-Identifier: Apache-2.0
"""Which ranks a model lives on, also for programs that never set Megatron's groups up."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import num_microbatches_calculator as _microbatches
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection


class SoloGroup:
    """The group of one process, for programs that never initialised torch.distributed."""

    def rank(self) -> int:
        """Always 0."""
        return 0

    def size(self) -> int:
        """Always 1."""
        return 1


def get_pg_collection(model: Any) -> Any:
    """The process groups a model (or the first of a list of chunks) runs in.

    Its own ``pg_collection``, through wrappers; else Megatron's default groups; else, in a program that
    uses neither, every rank is a data-parallel rank of one whole model.
    """
    module = model[0] if isinstance(model, list) and model else model
    while module is not None and not isinstance(module, list):
        collection = getattr(module, "pg_collection", None)
        if collection is not None:
            return collection
        module = getattr(module, "module", None)
    if parallel_state.model_parallel_is_initialized():
        return ProcessGroupCollection.use_mpu_process_groups()
    solo: Any = SoloGroup()
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    data_parallel = torch.distributed.group.WORLD if distributed else solo
    names = dict.fromkeys(("tp", "pp", "mp", "cp", "tp_cp", "ep", "expt_tp", "tp_ep", "tp_ep_pp"), solo)
    names.update(dict.fromkeys(("dp", "dp_cp", "expt_dp"), data_parallel))
    return ProcessGroupCollection(**names)


def update_num_microbatches(consumed_samples: int, verbose: bool = False) -> None:
    """Bring the microbatch calculator to ``consumed_samples``; nothing where a program has none."""
    if _microbatches._GLOBAL_NUM_MICROBATCHES_CALCULATOR is not None:
        _microbatches.update_num_microbatches(consumed_samples=consumed_samples, verbose=verbose)
