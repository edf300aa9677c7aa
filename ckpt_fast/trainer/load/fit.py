# SPDX-License-Identifier: Apache-2.0
"""Whether a checkpoint has the parts that a plan restores: found out before any of them is touched."""

from __future__ import annotations

from typing import Any

from ckpt_fast import compat
from ckpt_fast.errors import CheckpointMismatchError
from ckpt_fast.trainer.contents.rng import RNG_KEY, has_rng_state
from ckpt_fast.trainer.contents.state_dict import require_whole_model
from ckpt_fast.trainer.contexts import CheckpointType
from ckpt_fast.trainer.load.base import Paths
from ckpt_fast.trainer.load.located import Located
from ckpt_fast.trainer.load.plan import LoadPlan
from ckpt_fast.trainer.load.run import LoadRun

_OPTIMIZER_KEY = "optimizer"
# Megatron-LM's name, and that of older checkpoints.
_SCHEDULER_KEYS = ("lr_scheduler", "opt_param_scheduler")
_FRESH_OPTIMIZER = "Set load_optim=False or finetune=True to start with a fresh one."


class Needs:
    """What a load needs, whatever ``dist_ckpt_strictness`` tolerates.

    Args:
        run, plan, located: of the load.
        model: every part of the model.
    """

    def __init__(self, run: LoadRun, plan: LoadPlan, located: Located, *, model: bool) -> None:
        self._run, self._plan, self._located, self._model = run, plan, located, model

    def require_common(self) -> None:
        """Local. Check the common state of a torch_dist checkpoint.

        Raises:
            CheckpointMismatchError: there is no state for the scheduler.
        """
        if self._located.kind is CheckpointType.GLOBAL:
            self._require_scheduler(self._located.common)

    def require_read(self, state_dict: dict[str, Any]) -> None:
        """Local. Check what a local checkpoint has; nothing has been restored from it.

        Raises:
            CheckpointMismatchError: it lacks optimizer, scheduler or RNG state.
        """
        if self._located.kind is not CheckpointType.LOCAL:
            return
        if self._restores_optimizer() and _OPTIMIZER_KEY not in state_dict:
            raise self._lacking("optimizer state", _FRESH_OPTIMIZER)
        self._require_scheduler(state_dict)
        if self._plan.rng and not has_rng_state(state_dict):
            raise self._lacking_rng()

    def accept_missing(self, missing: Paths, found: Paths) -> None:
        """Local. Check what a sharded state dict asks for and a torch_dist checkpoint lacks.

        Args:
            missing: paths, in the whole state dict, of what it lacks.
            found: of the rest.

        Raises:
            CheckpointMismatchError: without it nothing could be restored in the end.
        """
        if self._model:
            require_whole_model(missing)
        # Of single parts of these, Megatron-Core and the user decide.
        gone = {path[0] for path in missing} - {path[0] for path in found}
        if _OPTIMIZER_KEY in gone and self._restores_optimizer():
            raise self._lacking("optimizer state", _FRESH_OPTIMIZER)
        if RNG_KEY in gone and self._plan.rng and not has_rng_state(self._located.common):
            raise self._lacking_rng()

    def _require_scheduler(self, state_dict: dict[str, Any]) -> None:
        is_restored = self._plan.optimizer and self._run.scheduler is not None
        if is_restored and not any(key in state_dict for key in _SCHEDULER_KEYS):
            raise self._lacking("scheduler state", _FRESH_OPTIMIZER)

    def _restores_optimizer(self) -> bool:
        optimizer = self._run.optimizer
        return (
            self._plan.optimizer
            and not self._run.skip_model_and_optimizer
            and optimizer is not None
            and not getattr(optimizer, "is_stub_optimizer", False)
            and not isinstance(optimizer, compat.LayerWiseDistributedOptimizer)
        )

    def _lacking(self, what: str, remedy: str) -> CheckpointMismatchError:
        return CheckpointMismatchError(f"{self._located.found} has no {what}. Nothing was loaded. {remedy}")

    def _lacking_rng(self) -> CheckpointMismatchError:
        return self._lacking("RNG state", "Set load_rng=False or finetune=True to go on without it.")
