# SPDX-License-Identifier: Apache-2.0
"""Hugging Face weights: to start a run, and as a copy with a checkpoint. Megatron Bridge converts them."""

from __future__ import annotations

import os
import shutil
from functools import lru_cache
from typing import Any

from ckpt_fast import compat
from ckpt_fast.ranks.foreign import run_on_all_ranks
from ckpt_fast.ranks.world import (
    barrier_if_distributed,
    get_rank_safe,
    note_rank_0,
    on_all_ranks,
    on_rank_0,
    print_rank_0,
)
from ckpt_fast.run.config_checks import hf_source
from ckpt_fast.settings import Settings
from ckpt_fast.trainer.load.restore import reload_model_params
from ckpt_fast.trainer.places.paths import ensure_directory_exists, is_hf_checkpoint_dir, sync_files

_HF_WEIGHTS_SUBDIR = "hf"
_FORMATS = ("torch_dist", "fsdp_dtensor")


def require_export(cfg: Any, model: list[Any]) -> None:
    """Check, before anything is written, that ``also_save_hf_checkpoint`` can be done. Collective.

    Raises:
        UnavailableError: Megatron Bridge is not installed.
        ValueError: nothing says which Hugging Face model the run is one of.
        NotImplementedError: Bridge cannot export this kind of model.
    """
    if _is_wanted(cfg, model):
        on_all_ranks(lambda: _bridge_for_export(cfg))


def save_hf_copy(cfg: Any, model: list[Any], checkpoint_name: str) -> None:
    """Export the model to ``<checkpoint_name>/hf``, if the configuration wants that. Collective.

    With PEFT the adapters are exported. A failed export leaves no directory behind.

    Raises:
        CheckpointError: on every rank, naming the one where Bridge failed.
        RuntimeError: the same, with ranks that still wait for it within Bridge; see ``run_on_all_ranks``.
    """
    if not _is_wanted(cfg, model):
        return
    directory = os.path.join(checkpoint_name, _HF_WEIGHTS_SUBDIR)

    def prepare() -> None:
        # Shards of an earlier save may be more than those of this one.
        shutil.rmtree(directory, ignore_errors=True)
        ensure_directory_exists(directory, check_parent=False)

    def export() -> None:
        _export(cfg, model, directory)
        if get_rank_safe() == 0 or cfg.checkpoint.hf_distributed_save:
            sync_files(directory)

    on_all_ranks(Settings.read)  # an odd one is refused while nothing has been touched
    on_rank_0(prepare)
    try:
        run_on_all_ranks(export, f"exporting Hugging Face weights to {directory}")
    except BaseException:
        # Nothing collective: the ranks may be out of step.
        if get_rank_safe() == 0:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    note_rank_0(f"  exported Hugging Face weights to {directory}")


def is_hf_source(load_dir: str | None, ckpt_cfg: Any) -> bool:
    """Whether there are Hugging Face weights to start from. Collective.

    Raises:
        NotImplementedError: the configured format is not one that can be loaded.
        ValueError: the run is to be resumed from Hugging Face weights.
    """
    if ckpt_cfg.ckpt_format not in _FORMATS:
        raise NotImplementedError(
            f"checkpoint format {ckpt_cfg.ckpt_format!r} is not supported; use one of {_FORMATS}"
        )
    if not on_rank_0(lambda: is_hf_checkpoint_dir(load_dir)):
        return False
    if load_dir == ckpt_cfg.load:
        raise ValueError(
            f"checkpoint.load does not support HuggingFace-format directories ({load_dir}); convert it, "
            "or give it as checkpoint.pretrained_checkpoint"
        )
    return True


def load_hf_pretrained(
    load_dir: str, state: Any, model: list[Any], optimizer: Any | None, *, skip: bool
) -> tuple[int, int]:
    """Start a run from a directory of Hugging Face weights. Collective.

    Args:
        load_dir: holds a whole Hugging Face model.
        state: GlobalState; training starts at step 0.
        model: unwrapped chunks to load into.
        optimizer: its master weights follow the loaded ones.
        skip: leave the model alone.

    Returns:
        (0, 0)

    Raises:
        UnavailableError: Megatron Bridge is not installed.
        CheckpointError: on every rank, naming the one where Bridge failed.
        RuntimeError: the same, with ranks that still wait for it within Bridge; see ``run_on_all_ranks``.
    """
    cfg = state.cfg
    if not skip:
        trust = bool(getattr(cfg.checkpoint, "hf_trust_remote_code", False))
        bridge = on_all_ranks(
            lambda: compat.import_auto_bridge().from_hf_pretrained(load_dir, trust_remote_code=trust)
        )
        run_on_all_ranks(
            lambda: bridge.load_hf_weights(model), f"loading Hugging Face weights from {load_dir}"
        )
    state.train_state.step = 0
    on_all_ranks(lambda: reload_model_params(None, cfg, optimizer))
    barrier_if_distributed()
    print_rank_0(f"  successfully loaded Hugging Face weights from {load_dir}")
    return 0, 0


def _is_wanted(cfg: Any, model: list[Any]) -> bool:
    # A low-memory save brings a state dict instead of a model.
    return bool(getattr(cfg.checkpoint, "also_save_hf_checkpoint", False) and model)


def _bridge_for_export(cfg: Any) -> Any:
    source = hf_source(cfg)
    if source is None:
        raise ValueError(
            "also_save_hf_checkpoint=True requires an HF source: set checkpoint.hf_source_path, "
            "model.hf_model_id or tokenizer.tokenizer_model"
        )
    bridge = _auto_bridge(
        compat.import_auto_bridge(), source, bool(getattr(cfg.checkpoint, "hf_trust_remote_code", False))
    )
    if not getattr(getattr(bridge, "_model_bridge", None), "SUPPORTS_HF_PRETRAINED_EXPORT", True):
        raise NotImplementedError(
            f"Megatron Bridge cannot export a standalone Hugging Face model for {source}; set "
            "also_save_hf_checkpoint=False"
        )
    return bridge


@lru_cache(maxsize=4)
def _auto_bridge(auto_bridge: Any, source: str, trust_remote_code: bool) -> Any:
    """Kept between saves: making one reads the model's configuration, possibly over the network."""
    return auto_bridge.from_hf_pretrained(source, trust_remote_code=trust_remote_code)


def _export(cfg: Any, model: list[Any], directory: str) -> None:
    bridge = _bridge_for_export(cfg)
    if cfg.peft is not None:
        bridge.save_hf_adapter(
            model,
            directory,
            peft_config=cfg.peft,
            base_model_name_or_path=hf_source(cfg),
            show_progress=False,
        )
        return
    bridge.save_hf_pretrained(
        model,
        directory,
        show_progress=False,
        distributed_save=bool(getattr(cfg.checkpoint, "hf_distributed_save", False)),
        save_every_n_ranks=int(getattr(cfg.checkpoint, "hf_save_every_n_ranks", 1)),
    )
