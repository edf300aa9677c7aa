# SPDX-License-Identifier: Apache-2.0
"""What makes a durable payload the checkpoint to resume from: its iteration files, then the trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ckpt_fast.errors import CheckpointError
from ckpt_fast.trainer.experiment_loggers import append_to_progress_log
from ckpt_fast.trainer.paths import get_checkpoint_train_state_filename
from ckpt_fast.trainer.ranks import get_rank_safe, print_rank_0
from ckpt_fast.trainer.sidecars import save_tokenizer_assets
from ckpt_fast.trainer.trackers import (
    number_of_save,
    publish_trackers,
    snapshot_run_config,
    snapshot_train_state,
    write_run_config,
    write_train_state,
)


@contextlib.contextmanager
def save_errors_tolerated(ckpt_cfg: Any) -> Iterator[None]:
    """Within it a save that fails ends with a warning, if ``on_save_error`` is "warn".

    Every rank sees the same failure, so all of them go on together.
    """
    try:
        yield
    except CheckpointError as error:
        if getattr(ckpt_cfg, "on_save_error", "raise") != "warn":
            raise
        print_rank_0(f"WARNING: {error}\nWARNING: training goes on without it (on_save_error='warn')")


class Publication:
    """The facts of one save, taken when the save was asked for: training goes on while data is written.

    Args:
        state: GlobalState.
        checkpoint_name: the iteration directory.
        save_dir: where the trackers live.
        num_floating_point_operations_so_far: stored with the train state.
        success_suffix: end of the success line.
        is_local: a local checkpoint has neither iteration files nor trackers.

    Attributes:
        train_state: what ``train_state.pt`` will hold.
    """

    def __init__(
        self,
        state: Any,
        checkpoint_name: str,
        save_dir: str,
        num_floating_point_operations_so_far: float,
        success_suffix: str,
        is_local: bool,
    ) -> None:
        self._cfg = state.cfg
        self._step = int(state.train_state.step)
        self._checkpoint_name, self._save_dir = checkpoint_name, save_dir
        self._suffix, self._is_local = success_suffix, is_local
        self._number = number_of_save()
        self.train_state = snapshot_train_state(state.train_state, num_floating_point_operations_so_far)
        # Rank 0 alone writes it.
        self._run_config = snapshot_run_config(state.cfg) if get_rank_safe() == 0 and not is_local else b""

    def publish(self) -> None:
        """Called on rank 0 once the payload is durable on all ranks.

        Raises:
            CheckpointWriteError: a file could not be written; trackers still name the previous checkpoint.
        """
        ckpt_cfg = self._cfg.checkpoint
        if self._is_local:
            print_rank_0(f"  successfully saved local checkpoint from iteration {self._step:7d}")
            self._log_progress("Saved async local checkpoint")
            return
        write_run_config(self._checkpoint_name, self._run_config)
        self._save_tokenizer()
        write_train_state(get_checkpoint_train_state_filename(self._checkpoint_name), self.train_state)
        publish_trackers(self._save_dir, self._step, self.train_state, self._number)
        where = f"{ckpt_cfg.save} {self._suffix}"
        print_rank_0(f"  successfully saved checkpoint from iteration {self._step:7d} to {where}")
        self._log_progress("Saved async checkpoint")

    def _save_tokenizer(self) -> None:
        tokenizer = getattr(self._cfg.dataset, "tokenizer", None)
        if self._cfg.checkpoint.save_tokenizer_assets and tokenizer is not None:
            save_tokenizer_assets(tokenizer, self._cfg.tokenizer, self._checkpoint_name)

    def _log_progress(self, event: str) -> None:
        logger_cfg, ckpt_cfg = self._cfg.logger, self._cfg.checkpoint
        if getattr(logger_cfg, "log_progress", False) and ckpt_cfg.async_save:
            append_to_progress_log(ckpt_cfg.save, f"{event}\tIteration: {self._step}", barrier=False)
