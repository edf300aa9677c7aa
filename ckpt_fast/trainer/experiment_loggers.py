# SPDX-License-Identifier: Apache-2.0
"""Telling others about a checkpoint: W&B, MLflow, Comet, the progress log, and fault tolerance.

None of them is worth a checkpoint: what goes wrong here is reported and swallowed. A logger that is not
configured is None and is left out.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ckpt_fast.ranks.world import (
    barrier_if_distributed,
    get_rank_safe,
    get_world_size_safe,
    note_rank_0,
    warn_rank_last,
)
from ckpt_fast.storage import objects
from ckpt_fast.storage.objects.client import object_storage
from ckpt_fast.trainer.places.paths import ensure_directory_exists, file_exists, read_file, write_file

logger = logging.getLogger(__name__)

_WANDB_TRACKER = "latest_wandb_artifact_path.txt"
_PROGRESS_LOG = "progress.txt"
_FT_SECTION = "checkpointing"
# Fewer iterations are no basis for a timeout.
_FT_MIN_ITERATIONS = 16


# --- Experiment loggers ----------------------------------------------------------------------------------


def on_save_checkpoint_success(
    state: Any, checkpoint_path: str, save_dir: str, step: int, to_mlflow: bool = True
) -> None:
    """Tell the run's experiment loggers that a checkpoint is complete. For the last rank.

    Args:
        state: GlobalState.
        checkpoint_path: the iteration's directory.
        save_dir: the root it is in.
        step: its iteration, which may be behind ``state.train_state.step``.
        to_mlflow: upload the files to MLflow, if it is used (``logger.mlflow_log_artifacts``).
    """
    _try("W&B", lambda: _saved_to_wandb(checkpoint_path, save_dir, step, state.wandb_logger))
    if to_mlflow:
        _try("MLflow", lambda: _saved_to_mlflow(checkpoint_path, save_dir, state.mlflow_logger))
    _try("Comet", lambda: _saved_to_comet(checkpoint_path, step, state.comet_logger))


def on_load_checkpoint_success(state: Any, checkpoint_path: str, load_dir: str) -> None:
    """Tell the run's experiment loggers where it resumed from. For the last rank.

    Args:
        state: GlobalState.
        checkpoint_path: the iteration's directory.
        load_dir: the root it is in.
    """
    _try("W&B", lambda: _loaded_to_wandb(checkpoint_path, load_dir, state.wandb_logger))
    _try("MLflow", lambda: _loaded_to_mlflow(checkpoint_path, load_dir, state.mlflow_logger))
    _try("Comet", lambda: _loaded_to_comet(checkpoint_path, load_dir, state.comet_logger))


def _try(name: str, report: Callable[[], None]) -> None:
    try:
        report()
    except Exception as error:
        logger.debug("telling %s failed", name, exc_info=True)
        warn_rank_last(f"failed to tell {name} about the checkpoint: {type(error).__name__}: {error}")


def _saved_to_wandb(checkpoint_path: str, save_dir: str, step: int, wandb: Any) -> None:
    """Log a reference to the directory as version ``iter_N`` of the model artifact named after the root."""
    if not wandb:
        return
    artifact = wandb.Artifact(Path(save_dir).stem, type="model", metadata={"iteration": step})
    artifact.add_reference(_uri(checkpoint_path), checksum=False)
    wandb.run.log_artifact(artifact, aliases=[Path(checkpoint_path).stem])
    tracker = os.path.join(save_dir, _WANDB_TRACKER)
    write_file(tracker, f"{wandb.run.entity}/{wandb.run.project}".encode())


def _loaded_to_wandb(checkpoint_path: str, load_dir: str, wandb: Any) -> None:
    """Declare that artifact an input of this run; the tracker says whose it is."""
    if not wandb:
        return
    owner = ""
    tracker = os.path.join(load_dir, _WANDB_TRACKER)
    if file_exists(tracker):
        owner = f"{read_file(tracker).decode(errors='replace').strip()}/"
    wandb.run.use_artifact(f"{owner}{Path(load_dir).stem}:{Path(checkpoint_path).stem}")


def _saved_to_mlflow(checkpoint_path: str, save_dir: str, mlflow: Any) -> None:
    """Upload the directory."""
    if mlflow is None:
        return
    root = os.path.basename(save_dir.rstrip("/")) or "checkpoints"
    name = os.path.basename(checkpoint_path.rstrip("/"))
    mlflow.log_artifacts(os.path.abspath(checkpoint_path), artifact_path=f"{root}/{name}")


def _loaded_to_mlflow(checkpoint_path: str, load_dir: str, mlflow: Any) -> None:
    if mlflow is None:
        return
    places = {"checkpoint": checkpoint_path, "root": load_dir}
    mlflow.set_tags({f"last_loaded_{name}": _absolute(path) for name, path in places.items()})


def _saved_to_comet(checkpoint_path: str, step: int, comet: Any) -> None:
    if comet is None:
        return
    comet.log_other("last_saved_checkpoint", _absolute(checkpoint_path))
    comet.log_other("last_saved_iteration", step)


def _loaded_to_comet(checkpoint_path: str, load_dir: str, comet: Any) -> None:
    if comet is None:
        return
    comet.log_other("last_loaded_checkpoint", _absolute(checkpoint_path))
    comet.log_other("checkpoint_base_dir", _absolute(load_dir))


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _uri(path: str) -> str:
    return path if "://" in path else f"file://{os.path.abspath(path)}"


# --- Progress log ----------------------------------------------------------------------------------------


def append_to_progress_log(save_dir: str | None, string: str, barrier: bool = True) -> None:
    """Append a line with the time, job and number of GPUs to ``<save_dir>/progress.txt`` on rank 0.

    Args:
        save_dir: root of the run's checkpoints, made if missing; None writes nothing.
        string: what happened.
        barrier: wait for all ranks first; collective then.
    """
    if save_dir is None:
        return
    if barrier:
        barrier_if_distributed()
    if get_rank_safe() != 0:
        return
    path = os.path.join(save_dir, _PROGRESS_LOG)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    job = os.environ.get("SLURM_JOB_ID", "")
    try:
        ensure_directory_exists(path)
        _append(path, f"{now}\tJob ID: {job}\t# GPUs: {get_world_size_safe()}\t{string}\n")
    except OSError as error:
        logger.warning("cannot append to %s: %s", path, error)


def _append(path: str, line: str) -> None:
    if object_storage(path):
        objects.append(path, line.encode())
        return
    with open(path, "a", encoding="utf-8") as stream:
        stream.write(line)


# --- Fault tolerance (nvidia-resiliency-ext) -------------------------------------------------------------


def on_checkpointing_start(global_state: Any) -> None:
    """From here on time is spent on checkpoints: the launcher applies that section's timeout."""
    client = _monitor_client(global_state)
    if client is not None:
        _try("fault tolerance", lambda: client.start_section(_FT_SECTION))


def on_checkpointing_end(is_async_finalization: bool, global_state: Any) -> None:
    """The opposite of ``on_checkpointing_start``.

    Args:
        is_async_finalization: after a look at the saves in flight, which may have done nothing; only real
            saves are counted and improve the timeouts.
        global_state: GlobalState.
    """
    client = _monitor_client(global_state)
    if client is None:
        return
    _try("fault tolerance", lambda: client.end_section(_FT_SECTION))
    if not is_async_finalization:
        seen = global_state.fault_tolerance_state
        seen.seen_checkpoints_cnt += 1
        _try("fault tolerance", lambda: _update_timeouts(client, seen))


def on_checkpoint_loaded(is_local_chkpt: bool, global_state: Any) -> None:
    """Note what setting up included: reading from local memory says nothing about a load from disk."""
    if _monitor_client(global_state) is not None:
        global_state.fault_tolerance_state.is_persistent_chkpt_loaded = not is_local_chkpt


def _monitor_client(global_state: Any) -> Any:
    if getattr(global_state.cfg, "ft", None) is None:
        return None
    return getattr(global_state, "rank_monitor_client", None)


def _update_timeouts(client: Any, seen: Any) -> None:
    """Derive timeouts from what was observed and keep them for the next run. Collective, as the client is."""
    if not seen.is_calculating_timeouts:
        return
    sections = []
    if seen.is_persistent_chkpt_loaded:
        sections.append("setup")
    if seen.seen_tr_iters_cnt >= _FT_MIN_ITERATIONS:
        sections.append("step")
    # With background saves the section is sometimes empty and sometimes a whole commit.
    if not seen.is_async_chkpt_enabled:
        sections.append(_FT_SECTION)
    if not sections:
        return
    updated = client.calculate_and_set_section_timeouts(
        selected_sections=sections, calc_out_of_section=False, skip_if_not_ready=True
    )
    if updated and get_rank_safe() == 0 and seen.ft_state_path:
        write_file(seen.ft_state_path, json.dumps(client.state_dict()).encode())
        note_rank_0(f"FT: timeouts of {', '.join(sections)} updated in {seen.ft_state_path}")
