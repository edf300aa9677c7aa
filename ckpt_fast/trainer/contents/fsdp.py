# SPDX-License-Identifier: Apache-2.0
"""fsdp_dtensor checkpoints: Megatron-FSDP's DTensors in torch DCP files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save

from ckpt_fast import compat
from ckpt_fast.doors.dcp import FastStorageReader, FastStorageWriter
from ckpt_fast.doors.dcp.direct.save import start_save
from ckpt_fast.doors.dcp.together import load_together
from ckpt_fast.doors.dcp.upload import Upload
from ckpt_fast.format.names import METADATA_FILE
from ckpt_fast.format.types import FileRecord
from ckpt_fast.jobs.background import SaveHandle
from ckpt_fast.jobs.report import SaveReport
from ckpt_fast.pipeline.load.opened import OpenCheckpoint
from ckpt_fast.pipeline.save.parts import Completion, SaveOptions
from ckpt_fast.pipeline.save.save import Save
from ckpt_fast.ranks.world import barrier_if_distributed, get_rank_safe, on_all_ranks, on_rank_0
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.storage.objects.filesystem import object_reader, object_writer
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.places.paths import get_checkpoint_name, remove_file


def preprocess_fsdp_dtensor_state_dict(
    cfg: Any, raw_state_dict: dict[str, Any], model: Any
) -> dict[str, Any]:
    """A state dict in the names and pieces that fsdp_dtensor checkpoints have on disk.

    FP8 extra state, SwiGLU, gated-delta-net and MLA projections, expert numbers, multi-token-prediction names
    and uneven DTensors are taken care of, as far as the installed Megatron-Core knows them.

    Args:
        cfg: not read; part of the documented signature.
        raw_state_dict: needs a ``model`` section; the outer dict is not modified.
        model: the chunk whose config says which rules apply.

    Raises:
        KeyError: there is no ``model`` section (several chunks are not supported).
    """
    state_dict = dict(raw_state_dict)
    compat.handle_fp8_extra_state_case(state_dict["model"])
    config = compat.get_model_config(model)
    if config.gated_linear_unit and config.activation_func is torch.nn.functional.silu:
        _apply_to_model_and_optimizer(compat.handle_swiglu_in_state_dict, model, state_dict)
    _apply_to_model_and_optimizer(compat.handle_gdn_in_state_dict, model, state_dict)
    _apply_to_model_and_optimizer(compat.handle_mla_down_proj_in_state_dict, model, state_dict)
    if getattr(config, "num_moe_experts", None):
        state_dict["model"] = compat.handle_experts_in_state_dict(state_dict["model"], config.num_moe_experts)
    _apply_to_model_and_optimizer(compat.handle_mtp_in_state_dict, model, state_dict)
    compat.preprocess_state_dict_for_uneven_dtensor(state_dict)
    return state_dict


def _apply_to_model_and_optimizer(handler: Any, model: Any, state_dict: dict[str, Any]) -> None:
    if handler is None:
        return
    model_section, optimizer = handler(model, state_dict["model"], state_dict.get("optimizer"))
    state_dict["model"] = model_section
    if "optimizer" in state_dict:
        state_dict["optimizer"] = optimizer


def save_fsdp_dtensor_checkpoint(
    checkpoint_path: str | os.PathLike[str],
    state_dict: dict[str, Any],
    *,
    cfg: Any,
    model: Any,
    storage_writer: Any | None = None,
    barrier: bool = True,
) -> Any:
    """Preprocess and save with torch DCP. Collective. No trackers, train state or run config are written.

    Args:
        checkpoint_path: directory to write to when no ``storage_writer`` is given.
        state_dict: raw state dict with a ``model`` section.
        cfg: passed to the preprocessing.
        model: the chunk whose config says which preprocessing applies.
        storage_writer: torch DCP storage writer to use instead of the default one.
        barrier: wait for all ranks after the save.

    Returns:
        What ``torch.distributed.checkpoint.save`` returns.

    Raises:
        RuntimeError: Megatron FSDP is not available.
    """
    _require_megatron_fsdp("saving")
    state_dict = preprocess_fsdp_dtensor_state_dict(cfg, state_dict, model)
    writer = storage_writer or _create_fsdp_dtensor_storage_writer(str(checkpoint_path))
    result = save(state_dict=state_dict, storage_writer=writer)
    if barrier:
        barrier_if_distributed()
    return result


def _create_fsdp_dtensor_storage_writer(checkpoint_path: str) -> Any:
    """Our writer for torch DCP, or multi-storage-client's where the path is one of its own."""
    if object_storage(checkpoint_path):
        return object_writer(checkpoint_path)[0]
    return FastStorageWriter(checkpoint_path)


def save_fsdp_dtensor(
    cfg: Any,
    model: list[Any],
    state_dict: dict[str, Any],
    checkpoint_name: str,
    options: SaveOptions | None = None,
    completion: Completion | None = None,
    write_beside: Callable[[str], Sequence[FileRecord]] = lambda _: (),
    write_more: Callable[[str], None] = lambda _: None,
) -> SaveHandle | SaveReport | None:
    """Collective. The fsdp_dtensor part of ``save_checkpoint``.

    Args:
        options, completion, write_beside: see ``dcp_save.start_save``; not used on object storage.
        write_more: collective; writes what else belongs to the checkpoint, to the directory of its files.

    Returns:
        With ``async_save`` the save to schedule. Otherwise the checkpoint is durable, and the report of the
        save is returned; None for one on object storage.

    Raises:
        ValueError: there is no model (low-memory saves).
        RuntimeError: Megatron FSDP is not available.
    """
    if not model:
        raise ValueError(
            "fsdp_dtensor cannot save without the model (low-memory save); use ckpt_format='torch_dist'"
        )
    _require_megatron_fsdp("saving")
    ckpt_cfg = cfg.checkpoint
    if object_storage(checkpoint_name):
        write_more(checkpoint_name)
        return _save_to_object_storage(cfg, model[0], state_dict, checkpoint_name)
    job = start_save(
        preprocess_fsdp_dtensor_state_dict(cfg, state_dict, model[0]),
        checkpoint_name,
        replace(options or SaveOptions(), snapshot=bool(ckpt_cfg.async_save)),
        completion,
        write_beside=write_beside,
    )
    write_along(job, write_more)
    if ckpt_cfg.async_save:
        return SaveHandle(job)
    job.write()
    return job.commit()


def write_along(job: Save, write: Callable[[str], None]) -> None:
    """Collective. Write what belongs to a staged checkpoint and must be there before it is sealed.

    Args:
        job: the save; it is abandoned if that fails.
        write: gets the directory of the checkpoint's files.
    """
    try:
        write(job.written_to)
    except BaseException:
        job.abandon()
        raise


def _save_to_object_storage(
    cfg: Any, chunk: Any, state_dict: dict[str, Any], checkpoint_name: str
) -> SaveHandle | None:
    def invalidate() -> None:
        """An older checkpoint must not vouch for data that is being replaced."""
        remove_file(os.path.join(checkpoint_name, METADATA_FILE))

    if not cfg.checkpoint.async_save:
        on_rank_0(invalidate)
        save_fsdp_dtensor_checkpoint(checkpoint_name, state_dict, cfg=cfg, model=chunk)
        return None
    writer, ask = object_writer(checkpoint_name)
    upload = Upload(
        preprocess_fsdp_dtensor_state_dict(cfg, state_dict, chunk), writer, checkpoint_name, invalidate
    )
    ask(upload.is_wanted)
    upload.stage()
    return SaveHandle(upload)


def _require_megatron_fsdp(action: str) -> None:
    if not compat.HAVE_MEGATRON_FSDP:
        raise RuntimeError(
            f"Megatron FSDP is required but not available for {action} FSDP DTensor checkpoints."
        )


def load_fsdp_dtensor_checkpoint(
    load_dir: str,
    ckpt_cfg: Any,
    rank0: bool,
    sharded_state_dict: dict[str, Any] | None,
    iteration: int | None,
    release: bool = False,
    checkpoint_path_override: str | None = None,
    checkpointing_context: dict[str, Any] | None = None,
    cfg: Any | None = None,
) -> tuple[dict[str, Any], str, bool, CheckpointType]:
    """Load an fsdp_dtensor checkpoint in place.

    Args:
        load_dir: root of the checkpoints.
        ckpt_cfg: CheckpointConfig, for ``strict_fsdp_dtensor_load``, ``dist_ckpt_strictness``, ``finetune``.
        rank0: only say which checkpoint it is; nothing is read.
        sharded_state_dict: scaffold with ``_model`` (list of chunks), which is removed from it.
        iteration: the iteration to load.
        release: load the ``release`` directory.
        checkpoint_path_override: the iteration directory itself.
        checkpointing_context: not used by this format.
        cfg: passed to the preprocessing.

    Returns:
        (state dict, checkpoint directory, release, CheckpointType.FSDP_DTENSOR).

    Raises:
        CheckpointError: on every rank, naming the rank that failed; see ``load_together``.
        RuntimeError: Megatron FSDP is not available, or no scaffold was given.
    """
    name = checkpoint_path_override or get_checkpoint_name(load_dir, iteration or 0, release)
    state_dict = {} if rank0 else load_fsdp_dtensor(name, ckpt_cfg, sharded_state_dict, cfg)
    return state_dict, name, release, CheckpointType.FSDP_DTENSOR


def load_fsdp_dtensor(
    name: str,
    ckpt_cfg: Any,
    sharded_state_dict: dict[str, Any] | None,
    cfg: Any | None,
    checkpoint: OpenCheckpoint | None = None,
) -> dict[str, Any]:
    """The state dict of one checkpoint; arguments and errors as of ``load_fsdp_dtensor_checkpoint``.

    Args:
        name: its directory.
        checkpoint: the same, if it is open already.
    """
    _require_megatron_fsdp("loading")
    if sharded_state_dict is None:
        raise RuntimeError("loading an FSDP DTensor checkpoint needs a sharded state dict to load into")
    raw: dict[str, Any] = {
        key: dict(sharded_state_dict[key]) for key in ("optimizer", "model") if key in sharded_state_dict
    }
    model = sharded_state_dict.pop("_model")
    state_dict = on_all_ranks(lambda: preprocess_fsdp_dtensor_state_dict(cfg, sharded_state_dict, model[0]))
    reader = get_filesystem_reader(name, checkpoint)
    allow_partial = not getattr(ckpt_cfg, "strict_fsdp_dtensor_load", False)
    if allow_partial:
        on_all_ranks(lambda: _report_differences(reader, state_dict, name, ckpt_cfg))
    planner = DefaultLoadPlanner(allow_partial_load=allow_partial)
    if isinstance(reader, FastStorageReader):
        reader.partial = "optimizer" not in state_dict
        load_together(state_dict, reader, planner)
    else:
        load_state_dict(state_dict=state_dict, storage_reader=reader, planner=planner)
    # The tensors were filled in place; callers know them by their names in the model.
    state_dict.update(raw)
    return state_dict


def get_filesystem_reader(checkpoint_path: str, checkpoint: OpenCheckpoint | None = None) -> Any:
    """Our reader for torch DCP, or multi-storage-client's where the path is one of its own."""
    if object_storage(checkpoint_path):
        return object_reader(checkpoint_path)
    return FastStorageReader(checkpoint_path, checkpoint=checkpoint)


def _report_differences(reader: Any, state_dict: dict[str, Any], name: str, ckpt_cfg: Any) -> None:
    saved = reader.read_metadata().state_dict_metadata
    # One rank after the other, so that their lines do not mix.
    time.sleep(get_rank_safe() * 0.001)
    compat.print_diff_in_state_dicts(saved, state_dict)
    if compat.validate_fsdp_dtensor_model_load is not None and not getattr(ckpt_cfg, "finetune", False):
        compat.validate_fsdp_dtensor_model_load(saved, state_dict, name, strict=ckpt_cfg.dist_ckpt_strictness)
