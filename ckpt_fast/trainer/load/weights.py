# SPDX-License-Identifier: Apache-2.0
"""Model weights, and nothing else, from a checkpoint."""

from __future__ import annotations

import gc
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.doors.megatron import torch_dist
from ckpt_fast.glu.layout import _is_model_section, contiguous_chunks, reorder_late, sizes_to_undo
from ckpt_fast.glu.model import _get_model_glu_interleave_sizes
from ckpt_fast.jobs.background import wait_staged
from ckpt_fast.ranks.world import barrier_if_distributed, note_rank_0, on_all_ranks
from ckpt_fast.trainer.contents.state_dict import (
    _generate_model_state_dict,
    delete_extra_state,
    require_whole_model,
)
from ckpt_fast.trainer.load.base import Paths, load_strategy
from ckpt_fast.trainer.load.located import opened_torch_dist
from ckpt_fast.trainer.load.restore import load_sections


def _load_model_weights_from_checkpoint(
    checkpoint_path: str,
    model: list[Any],
    fully_parallel_load: bool = False,
    return_state_dict: bool = False,
    dist_ckpt_strictness: str = "assume_ok_unexpected",
    strict: bool = True,
) -> Any:
    """Load model weights, and nothing else, from an iteration directory. Collective.

    Args:
        checkpoint_path: the iteration directory of a torch_dist checkpoint.
        model: model chunks to load into.
        fully_parallel_load: share the reads among data-parallel ranks.
        return_state_dict: return the state dict instead of giving it to the model's ``load_state_dict``. Its
            tensors are the model's own where the sharded state dict has them, and filled: GLU rows are in
            the model's order.
        dist_ckpt_strictness: how keys that do not match are treated.
        strict: model keys must match, except ``_extra_state``.

    Returns:
        None; with ``return_state_dict`` the state dict, or for the two ``return_*`` strictness modes
        (state dict, missing keys, unexpected keys).
    """
    wait_staged()
    with opened_torch_dist(checkpoint_path) as (opened, common):
        metadata = compat.load_content_metadata(preloaded_state_dict=common)
        note_rank_0(f"sharded_state_dict metadata loaded from the checkpoint: {metadata}")
        compat.restore_modelopt_state(model, common)
        model = compat.unwrap_model(model)
        pg_collection = compat.get_pg_collection(model)
        sizes = sizes_to_undo(metadata or {}, None, None, _get_model_glu_interleave_sizes(model, None))
        chunks = contiguous_chunks(model, sizes, is_loading=True)
        scaffold = on_all_ranks(
            lambda: _generate_model_state_dict(chunks, {"metadata": metadata}, pg_collection=pg_collection)
        )
        loaded = torch_dist.load(
            scaffold,
            checkpoint_path,
            checkpoint=opened,
            common=common,
            strategy=load_strategy(fully_parallel_load, pg_collection),
            strict=dist_ckpt_strictness,
            accept_missing=_accept_missing if strict and not return_state_dict else lambda *_: None,
        )
    state_dict = loaded[0] if isinstance(loaded, tuple) else loaded
    for section in filter(_is_model_section, state_dict):
        delete_extra_state(state_dict[section])
    on_all_ranks(lambda: reorder_late(chunks, state_dict))
    if return_state_dict:
        return loaded
    on_all_ranks(lambda: load_sections(model, state_dict, strict))
    del common, scaffold, loaded
    state_dict.clear()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    barrier_if_distributed()
    return None


def _accept_missing(missing: Paths, found: Paths) -> None:
    require_whole_model(missing)
