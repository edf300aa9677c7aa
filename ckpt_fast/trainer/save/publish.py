# SPDX-License-Identifier: Apache-2.0
"""Publication of durable tensors as the checkpoint to resume from: other files first, then the trackers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointError
from ckpt_fast.format.manifest import file_record
from ckpt_fast.format.types import FileRecord
from ckpt_fast.ranks.world import get_rank_safe, warn_rank_0
from ckpt_fast.retention.line import metrics_note
from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.trainer.contents.sidecars import TOKENIZER_DIR, save_tokenizer_assets
from ckpt_fast.trainer.experiment_loggers import append_to_progress_log
from ckpt_fast.trainer.lineage import lineage_of
from ckpt_fast.trainer.places.paths import (
    CONFIG_FILE,
    TRAIN_STATE_FILE,
    join_paths,
    records_below,
    write_file,
)
from ckpt_fast.trainer.places.trackers import (
    encode_train_state,
    number_of_save,
    publish_trackers,
    snapshot_run_config,
    snapshot_train_state,
)
from ckpt_fast.trainer.save.failures import policy_of


@contextlib.contextmanager
def save_errors_tolerated(ckpt_cfg: Any, queue: Any) -> Iterator[None]:
    """Within it a save that fails ends with a warning, if ``on_save_error`` is "warn".

    Every rank sees the same failure, so all of them go on together. ``on_save_failure="continue"`` takes its
    place for the saves of a queue of ours.
    """
    try:
        yield
    except CheckpointError as error:
        is_warned = getattr(ckpt_cfg, "on_save_error", "raise") == "warn"
        goes_on = isinstance(queue, AsyncCallsQueue) and ckpt_cfg.async_save and policy_of(ckpt_cfg).goes_on
        if not is_warned or goes_on:
            raise
        warn_rank_0(f"{error} -- training goes on without the checkpoint (on_save_error='warn')")


class Publication:
    """The facts of one save, captured when it was requested: training continues while data is written.

    Args:
        state: GlobalState.
        checkpoint_name: the iteration directory.
        save_dir: where the trackers live.
        num_floating_point_operations_so_far: stored with the train state.
        is_local: a local checkpoint has neither iteration files nor trackers.

    Attributes:
        train_state: what ``train_state.pt`` will hold; known once the facts are captured.
        lineage: the line of the run.
        notes: what the checkpoint will note of the run; complete once the facts are captured.
    """

    train_state: dict[str, torch.Tensor]

    def __init__(
        self,
        state: Any,
        checkpoint_name: str,
        save_dir: str,
        num_floating_point_operations_so_far: float,
        is_local: bool,
    ) -> None:
        self._cfg = state.cfg
        self._step = int(state.train_state.step)
        self._checkpoint_name, self._save_dir = checkpoint_name, save_dir
        self._is_local, self._is_complete = is_local, False
        self._number = number_of_save()
        self._flops = num_floating_point_operations_so_far
        self._run_config: Callable[[], bytes] = bytes
        self.lineage = lineage_of(state)
        self.notes: dict[str, Any] = {}

    def capture(self, train_state: Any, metrics: Mapping[str, Any] | None = None) -> None:
        """Take the train state, the configuration and the metrics as they are now. Local.

        Raises:
            ValueError: the metrics are no numbers.
        """
        self.notes.update(metrics_note(metrics))
        self.notes.update(self.lineage.notes(self._step))
        self.train_state = snapshot_train_state(train_state, self._flops)
        if get_rank_safe() == 0 and not self._is_local:
            self._run_config = snapshot_run_config(self._cfg)

    def complete(self, directory: str) -> list[FileRecord]:
        """Write what else belongs to the checkpoint. Called on rank 0, before the checkpoint is sealed.

        The seal makes the names durable.

        Args:
            directory: where its files are.

        Returns:
            The files.

        Raises:
            CheckpointWriteError: a file could not be written; the checkpoint must not be sealed.
        """
        contents = {CONFIG_FILE: self._run_config(), TRAIN_STATE_FILE: encode_train_state(self.train_state)}
        for name, content in contents.items():
            # Its directory is there, unless somebody has deleted it with all that has been written.
            write_file(join_paths(directory, name), content, sync_name=False, make_directories=False)
        self._save_tokenizer(directory)
        self._is_complete = True
        return [
            *(file_record(name, content) for name, content in contents.items()),
            *records_below(directory, TOKENIZER_DIR),
            *records_below(directory, compat.MODELOPT_DIR),
        ]

    def publish(self) -> None:
        """Called on rank 0 once the checkpoint is sealed.

        Raises:
            CheckpointWriteError: a file could not be written; trackers still name the previous checkpoint.
        """
        if self._is_local:
            self._log_progress("Saved async local checkpoint")
            return
        if not self._is_complete:
            # Some storage's own writers seal a checkpoint without asking.
            self.complete(self._checkpoint_name)
        publish_trackers(self._save_dir, self._step, self.train_state, self._number)
        self._log_progress("Saved async checkpoint")

    def _save_tokenizer(self, directory: str) -> None:
        tokenizer = getattr(self._cfg.dataset, "tokenizer", None)
        if self._cfg.checkpoint.save_tokenizer_assets and tokenizer is not None:
            save_tokenizer_assets(tokenizer, self._cfg.tokenizer, directory)

    def _log_progress(self, event: str) -> None:
        logger_cfg, ckpt_cfg = self._cfg.logger, self._cfg.checkpoint
        if getattr(logger_cfg, "log_progress", False) and ckpt_cfg.async_save:
            append_to_progress_log(ckpt_cfg.save, f"{event}\tIteration: {self._step}", barrier=False)
