# SPDX-License-Identifier: Apache-2.0
"""The state of a training run that a checkpoint records or needs: counters, loggers, the queue of saves.

Megatron Bridge's objects of the same names are accepted wherever these are.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ckpt_fast.run import loggers
from ckpt_fast.run.async_queue import AsyncCallsQueue
from ckpt_fast.run.signal_handler import DistributedSignalHandler

_COUNTERS = ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")
_FLOPS = "floating_point_operations_so_far"
_FLAGS = ("do_train", "do_valid", "do_test")


@dataclass
class TrainState:
    """The progress of training. The content of ``train_state.pt``."""

    step: int = 0
    consumed_train_samples: int = 0
    skipped_train_samples: int = 0
    consumed_valid_samples: int = 0
    floating_point_operations_so_far: float = 0
    do_train: bool = False
    do_valid: bool = False
    do_test: bool = False

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A snapshot: one 0-dim CPU tensor per field (int64, bool; the operations in float64).

        ``torch.load(weights_only=True)`` reads it back.
        """
        dtypes = dict.fromkeys(_COUNTERS, torch.int64) | {_FLOPS: torch.float64}
        dtypes |= dict.fromkeys(_FLAGS, torch.bool)
        return {
            name: torch.tensor(getattr(self, name), dtype=dtype, device="cpu")
            for name, dtype in dtypes.items()
        }

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Take over every field; tensors of other dtypes (older files: int32, float32) are fine.

        Raises:
            KeyError: a field is missing; nothing has been taken over then.
        """
        values = {name: state_dict[name].item() for name in (*_COUNTERS, _FLOPS, *_FLAGS)}
        for name in _COUNTERS:
            values[name] = int(values[name])
        for name, value in values.items():
            setattr(self, name, value)


@dataclass
class FaultToleranceState:
    """The state of nvidia-resiliency-ext's fault tolerance for this run."""

    ft_state_path: str | None = None
    """The file that keeps computed timeouts between runs."""
    is_persistent_chkpt_loaded: bool = False
    is_async_chkpt_enabled: bool = False
    is_calculating_timeouts: bool = False
    is_setup_section_open: bool = False
    seen_checkpoints_cnt: int = 0
    seen_tr_iters_cnt: int = 0
    curr_eval_iter_idx: int = 0


class GlobalState:
    """Everything that lives as long as the run. A second ``__init__`` of the same object changes nothing.

    Loggers, timers and the train state are made when first asked for. Experiment loggers exist on the last
    rank only (None elsewhere), and a logger that cannot be started is None: it never fails a save.
    """

    def __init__(self) -> None:
        if getattr(self, "_initialized", False):
            return
        self._initialized = True
        self._cfg: Any = None
        self.rank_monitor_client: Any = None
        self.start_time = time.time()
        self._ft_state: FaultToleranceState | None = None
        self._async_calls_queue: AsyncCallsQueue | None = None
        self._signal_handler: DistributedSignalHandler | None = None
        self._train_pgs: Any = None
        self._eval_pgs: Any = None
        self._clear_run()

    def _clear_run(self) -> None:
        self._tokenizer: Any = None
        self._tensorboard_logger: Any = None
        self._wandb_logger: Any = None
        self._mlflow_logger: Any = None
        self._comet_logger: Any = None
        self._started_loggers: set[str] = set()
        self._timers: Any = None
        self._train_state: TrainState | None = None
        self._straggler_timer: Any = None
        self._nvrx_straggler_manager: Any = None
        self._energy_monitor: Any = None

    @property
    def cfg(self) -> Any:
        """The run's ConfigContainer, None until set."""
        return self._cfg

    @cfg.setter
    def cfg(self, value: Any) -> None:
        """Also listens for ``cfg.train.exit_signal``, where the configuration names one."""
        self._cfg = value
        self._release_signal_handler()
        exit_signal = getattr(getattr(value, "train", None), "exit_signal", None)
        if exit_signal is not None:
            self._signal_handler = DistributedSignalHandler(exit_signal).__enter__()

    @property
    def tokenizer(self) -> Any:
        """The tokenizer the program has set."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, value: Any) -> None:
        self._tokenizer = value

    @property
    def tensorboard_logger(self) -> Any:
        """A SummaryWriter if ``logger.tensorboard_dir`` is set."""
        return self._logger("_tensorboard_logger", loggers.start_tensorboard)

    @property
    def wandb_logger(self) -> Any:
        """The wandb module with a run started, if ``logger.wandb_project`` is set."""
        return self._logger("_wandb_logger", loggers.start_wandb)

    @property
    def mlflow_logger(self) -> Any:
        """The mlflow module with a run started, if ``logger.mlflow_experiment`` is set."""
        return self._logger("_mlflow_logger", loggers.start_mlflow)

    @property
    def comet_logger(self) -> Any:
        """A Comet experiment if ``logger.comet_project`` is set."""
        return self._logger("_comet_logger", loggers.start_comet)

    def _logger(self, attribute: str, start: Callable[[Any], Any]) -> Any:
        # A logger that could not be started is not tried again at each save.
        if self._cfg is not None and attribute not in self._started_loggers:
            self._started_loggers.add(attribute)
            if getattr(self, attribute) is None:
                setattr(self, attribute, loggers.start_on_last_rank(start, self._cfg))
        return getattr(self, attribute)

    @property
    def timers(self) -> Any:
        """Megatron-Core's timers. They time a GPU's work and are therefore off on a machine without one."""
        if self._timers is None:
            from ckpt_fast.compat import Timers

            settings = getattr(self._cfg, "logger", None)
            level = getattr(settings, "timing_log_level", 0) if torch.cuda.is_available() else -1
            self._timers = Timers(level, getattr(settings, "timing_log_option", "minmax"))
        return self._timers

    @property
    def train_state(self) -> TrainState:
        """The run's counters."""
        if self._train_state is None:
            self._train_state = TrainState()
        return self._train_state

    @train_state.setter
    def train_state(self, value: TrainState) -> None:
        self._train_state = value

    @property
    def fault_tolerance_state(self) -> FaultToleranceState:
        """The state of fault tolerance."""
        if self._ft_state is None:
            self._ft_state = FaultToleranceState()
        return self._ft_state

    @fault_tolerance_state.setter
    def fault_tolerance_state(self, value: FaultToleranceState) -> None:
        self._ft_state = value

    @property
    def signal_handler(self) -> DistributedSignalHandler | None:
        """Listens for the exit signal; None when the configuration names none."""
        return self._signal_handler

    @property
    def straggler_timer(self) -> Any:
        """Megatron-Core's straggler detector."""
        if self._straggler_timer is None:
            from ckpt_fast.compat import StragglerDetector

            self._straggler_timer = StragglerDetector()
        return self._straggler_timer

    @property
    def nvrx_straggler_manager(self) -> Any:
        """The straggler manager that the program has set."""
        return self._nvrx_straggler_manager

    @nvrx_straggler_manager.setter
    def nvrx_straggler_manager(self, value: Any) -> None:
        self._nvrx_straggler_manager = value

    @property
    def energy_monitor(self) -> Any:
        """Megatron-Core's energy monitor if ``logger.log_energy`` is set, else None."""
        wanted = getattr(getattr(self._cfg, "logger", None), "log_energy", False)
        if self._energy_monitor is None and wanted:
            from ckpt_fast.compat import EnergyMonitor

            self._energy_monitor = EnergyMonitor()
        return self._energy_monitor

    @property
    def async_calls_queue(self) -> AsyncCallsQueue | None:
        """Saves in flight; None until ``initialize_async_checkpoint_worker``."""
        return self._async_calls_queue

    def initialize_async_checkpoint_worker(self) -> None:
        """Create the queue of background saves if the configuration asks for one. Idempotent."""
        checkpoint = getattr(self._cfg, "checkpoint", None)
        wanted = checkpoint is not None and checkpoint.save is not None and checkpoint.async_save
        if wanted and self._async_calls_queue is None:
            self._async_calls_queue = AsyncCallsQueue()

    def reset_for_restart(self) -> None:
        """Forget the run, for one that starts over in this process.

        Kept: configuration, the queue of saves, the fault tolerance client and state, and the start time.
        """
        if self._tensorboard_logger is not None:
            self._tensorboard_logger.close()
        self._release_signal_handler()
        self._clear_run()

    def _release_signal_handler(self) -> None:
        if self._signal_handler is not None:
            self._signal_handler.release()
            self._signal_handler = None
