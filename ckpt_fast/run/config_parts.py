# SPDX-License-Identifier: Apache-2.0
"""The small parts of a run's configuration that saving and loading look at."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from typing import Literal

from ckpt_fast.run.config_yaml import SECRET


@dataclass(kw_only=True)
class TokenizerConfig:
    """Which tokenizer the run uses and where its files are."""

    tokenizer_type: str | None = None
    """For instance "HuggingFaceTokenizer" or "GPT2BPETokenizer"; see ``save_tokenizer_assets``."""
    tokenizer_model: str | None = None
    """Model file, or Hugging Face model id."""
    vocab_file: str | None = None
    merge_file: str | None = None


@dataclass(kw_only=True)
class RNGConfig:
    """Random number generators."""

    seed: int = 1234
    te_rng_tracker: bool = False
    inference_rng_tracker: bool = False
    data_parallel_random_init: bool = False
    """Ranks of one data-parallel group have states of their own, so all of them are saved."""


@dataclass(kw_only=True)
class DistributedInitConfig:
    """Process groups."""

    distributed_backend: Literal["nccl", "gloo"] = "nccl"
    distributed_timeout_minutes: int = 10
    use_gloo_process_groups: bool = True
    use_megatron_fsdp: bool = False
    use_torch_fsdp2: bool = False
    use_decentralized_pg: bool = False
    """Groups live in a collection that the program passes around, not in Megatron's globals."""


@dataclass(kw_only=True)
class LoggerConfig:
    """Progress log, timers and experiment trackers. A tracker is used when its project is named."""

    log_progress: bool = False
    """Append a line to ``<save>/progress.txt`` for each checkpoint."""
    timing_log_level: Literal[0, 1, 2] = 0
    timing_log_option: Literal["max", "minmax", "all"] = "minmax"
    log_energy: bool = False
    tensorboard_dir: str | None = None
    tensorboard_queue_size: int = 1000

    wandb_project: str | None = None
    wandb_exp_name: str | None = None
    """Name of the run; required with ``wandb_project``."""
    wandb_save_dir: str | None = None
    """Default: ``<save>/wandb``."""
    wandb_entity: str | None = None

    mlflow_experiment: str | None = None
    mlflow_run_name: str | None = None
    mlflow_tracking_uri: str | None = None
    mlflow_tags: dict[str, str] | None = None
    mlflow_log_artifacts: bool = True
    """Upload each checkpoint; False only tracks the run."""

    comet_project: str | None = None
    comet_experiment_name: str | None = None
    comet_workspace: str | None = None
    comet_api_key: str | None = field(default=None, repr=False, metadata={SECRET: True})
    """Never written to a checkpoint or shown; ``COMET_API_KEY`` in the environment serves as well."""
    comet_tags: list[str] | None = None

    def finalize(self) -> None:
        """Check that the packages of the configured trackers are installed.

        Raises:
            ModuleNotFoundError: for mlflow or comet_ml. (W&B is looked for when it is first used.)
            ValueError: ``wandb_project`` without ``wandb_exp_name``.
        """
        for option, value, package in (
            ("mlflow_experiment", self.mlflow_experiment, "mlflow"),
            ("comet_project", self.comet_project, "comet_ml"),
        ):
            if value and importlib.util.find_spec(package) is None:
                raise ModuleNotFoundError(
                    f"logger.{option}={value!r} needs the package {package}: install it, or unset {option}"
                )
        if self.wandb_project and not self.wandb_exp_name:
            raise ValueError(
                f"logger.wandb_project={self.wandb_project!r} needs logger.wandb_exp_name as well"
            )
