# SPDX-License-Identifier: Apache-2.0
"""Starting the experiment loggers that the configuration names.

One rank reports: the last one. Each ``start_*`` takes the run's configuration and returns None when it does
not name that logger.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from ckpt_fast.run import config_yaml

logger = logging.getLogger(__name__)


def start_on_last_rank(start: Callable[[Any], Any], cfg: Any) -> Any:
    """The logger on the last rank, None on others or if it fails to start: training continues."""
    if getattr(cfg, "logger", None) is None or not _is_last_rank():
        return None
    try:
        return start(cfg)
    except Exception:
        logger.exception("%s failed: the run goes on without this logger", start.__name__)
        return None


def start_tensorboard(cfg: Any) -> Any:
    """A SummaryWriter in ``logger.tensorboard_dir``."""
    directory = getattr(cfg.logger, "tensorboard_dir", None)
    if not directory:
        return None
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    return tensorboard.SummaryWriter(log_dir=directory, max_queue=cfg.logger.tensorboard_queue_size)


def start_wandb(cfg: Any) -> Any:
    """The wandb module, with a run in ``logger.wandb_project``."""
    settings = cfg.logger
    if not getattr(settings, "wandb_project", None):
        return None
    if not settings.wandb_exp_name:
        raise ValueError("logger.wandb_project is set: name the run in logger.wandb_exp_name too")
    wandb = importlib.import_module("wandb")
    _strip("WANDB_API_KEY")
    wandb.init(
        project=settings.wandb_project,
        name=settings.wandb_exp_name,
        entity=settings.wandb_entity,
        dir=_wandb_directory(cfg),
        config=config_yaml.to_dict(cfg),
    )
    return wandb


def start_mlflow(cfg: Any) -> Any:
    """The mlflow module, with a run in ``logger.mlflow_experiment``; one already active is used as it is."""
    settings = cfg.logger
    if not getattr(settings, "mlflow_experiment", None):
        return None
    mlflow = importlib.import_module("mlflow")
    if settings.mlflow_tracking_uri:
        mlflow.set_tracking_uri(settings.mlflow_tracking_uri)
    mlflow.set_experiment(settings.mlflow_experiment)
    if mlflow.active_run() is None:
        mlflow.start_run(run_name=settings.mlflow_run_name, tags=settings.mlflow_tags)
    return mlflow


def start_comet(cfg: Any) -> Any:
    """A Comet experiment in ``logger.comet_project``."""
    settings = cfg.logger
    if not getattr(settings, "comet_project", None):
        return None
    comet = importlib.import_module("comet_ml")
    _strip("COMET_API_KEY")
    key = settings.comet_api_key
    experiment = comet.Experiment(
        project_name=settings.comet_project,
        workspace=settings.comet_workspace,
        api_key=key.strip() if key else None,
    )
    if settings.comet_experiment_name:
        experiment.set_name(settings.comet_experiment_name)
    if settings.comet_tags:
        experiment.add_tags(list(settings.comet_tags))
    return experiment


def _wandb_directory(cfg: Any) -> str | None:
    """The directory for W&B's files; None (W&B's own choice) for a run that saves nothing."""
    if cfg.logger.wandb_save_dir:
        return str(cfg.logger.wandb_save_dir)
    save = getattr(getattr(cfg, "checkpoint", None), "save", None)
    if not save:
        return None
    directory = os.path.join(save, "wandb")
    os.makedirs(directory, exist_ok=True)
    return directory


def _strip(variable: str) -> None:
    """Keys read from secret files tend to end in a newline, which the services refuse."""
    if variable in os.environ:
        os.environ[variable] = os.environ[variable].strip()


def _is_last_rank() -> bool:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
    return int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1
