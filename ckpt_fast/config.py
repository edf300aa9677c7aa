# SPDX-License-Identifier: Apache-2.0
"""The checkpoint-related part of the run's configuration.

Megatron Bridge's objects of the same names are accepted wherever these are: the code only looks at
attributes. Model, optimizer and scheduler configurations are the program's own objects (Megatron-Core's
``TransformerConfig`` and so on); ``ConfigContainer`` holds whatever it is given.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from ckpt_fast.run import config_checks, config_yaml
from ckpt_fast.run.config_checks import require
from ckpt_fast.run.config_parts import DistributedInitConfig, LoggerConfig, RNGConfig, TokenizerConfig

__all__ = [
    "CheckpointConfig",
    "ConfigContainer",
    "DistributedInitConfig",
    "LoggerConfig",
    "RNGConfig",
    "TokenizerConfig",
]

_C = TypeVar("_C", bound="ConfigContainer")


@dataclass(kw_only=True)
class CheckpointConfig:
    """Checkpoint settings: contents, directories, format and method of saving and loading.

    Field names, defaults and checks are the documented ones. Fields without effect exist so that existing
    configurations construct; one that is set to anything but its default is warned about.
    """

    # --- saving ---
    save: str | None = None
    """Root directory of the run's checkpoints; None saves nothing."""
    save_interval: int | None = None
    """Training iterations between persistent checkpoints; read by the training loop."""
    save_params_interval: int | None = None
    """Iterations between dumps of parameters by Megatron-LM. No effect here."""
    save_activations_interval: int | None = None
    """Iterations between Megatron-LM's dumps of activations. No effect here."""
    save_tokens_per_expert_interval: int | None = None
    """Iterations between Megatron-LM's dumps of tokens per expert. No effect here."""
    save_wgrads_interval: int | None = None
    """Iterations between Megatron-LM's dumps of weight gradients. No effect here."""
    save_dgrads_interval: int | None = None
    """Iterations between Megatron-LM's dumps of data gradients. No effect here."""
    save_retain_interval: int | None = None
    """Iterations between checkpoints that Megatron-LM keeps. No effect here: see ``most_recent_k``."""
    most_recent_k: int | None = -1
    """How many of the newest checkpoints to keep; -1 or None keeps all. The one a tracker names stays. What
    an abandoned branch has left does not count."""
    save_optim: bool = True
    """Include the optimizer and the scheduler."""
    save_rng: bool = True
    """Include the random number generators."""
    save_tokenizer_assets: bool = True
    """Copy the tokenizer's files into each checkpoint."""

    # --- loading ---
    load: str | None = None
    """Root directory, or one iteration's directory, to load from."""
    load_optim: bool = True
    """Restore the optimizer and the scheduler."""
    load_main_params_from_ckpt: bool = False
    """Fill the optimizer's main parameters from the model's; needs ``load_optim=False``."""
    load_rng: bool = True
    """Restore the random number generators."""
    finetune: bool = False
    """Load only the weights and start at iteration 0."""
    pretrained_checkpoint: str | None = None
    """Checkpoint to load weights from if ``load`` contains no checkpoint; must exist."""
    ckpt_step: int | None = None
    """Load this iteration instead of the newest; needs ``load``."""
    use_checkpoint_args: bool = False
    """Megatron-LM takes its arguments from the checkpoint. No effect here."""
    use_mp_args_from_checkpoint_args: bool = False
    """The same for the parallel sizes. No effect here."""
    use_tokenizer_model_from_checkpoint_args: bool = True
    """The same for the tokenizer. No effect here."""
    exit_on_missing_checkpoint: bool = False
    """Exit if ``load`` is set but contains no checkpoint, instead of starting from scratch."""
    dist_ckpt_strictness: Literal[
        "assume_ok_unexpected",
        "log_unexpected",
        "log_all",
        "raise_unexpected",
        "raise_all",
        "return_unexpected",
        "return_all",
        "ignore_all",
    ] = "assume_ok_unexpected"
    """How to handle keys that are only in the checkpoint or only in the model."""
    strict_fsdp_dtensor_load: bool = False
    """fsdp_dtensor: False allows a checkpoint that lacks some of the model's keys."""

    # --- non-persistent checkpoints ---
    non_persistent_save_interval: int | None = None
    """Training iterations between non-persistent checkpoints; read by the training loop."""
    non_persistent_ckpt_type: Literal["global", "local", "in_memory"] | None = None
    """"global": like a persistent one, elsewhere. "local": on each node's own disk."""
    non_persistent_global_ckpt_dir: str | None = None
    """Root of global ones; None means ``<save>/non_persistent``."""
    non_persistent_local_ckpt_dir: str | None = None
    """Root of local ones."""
    non_persistent_local_ckpt_algo: Literal["fully_parallel", "atomic"] = "fully_parallel"
    """How local checkpoints share the replicated state."""
    replication: bool = False
    """Copy local checkpoints to other nodes."""
    replication_jump: int | None = None
    """Distance in ranks between the copies, normally the number of GPUs of a node."""
    replication_factor: int = 2
    """Number of copies of a local checkpoint."""

    # --- format and layout ---
    ckpt_format: Literal["torch", "torch_dist", "torch_dcp", "fsdp_dtensor"] = "torch_dist"
    """Format to save in; loading detects the format."""
    auto_detect_ckpt_format: bool = False
    """Detect the format of a checkpoint when loading. No effect here: it always is."""
    ckpt_convert_format: Literal["torch", "torch_dist"] | None = None
    """Format to which Megatron-LM converts a checkpoint. No effect here."""
    ckpt_convert_save: str | None = None
    """Directory for the converted checkpoint. No effect here."""
    ckpt_convert_update_legacy_dist_opt_format: bool = False
    """Convert an old layout of the distributed optimizer. No effect here."""
    fully_parallel_save: bool = True
    """Data-parallel ranks share the writing of replicated state."""
    fully_parallel_load: bool = False
    """Data-parallel ranks share the reading of replicated state."""
    ckpt_fully_parallel_load_exchange_algo: Literal["broadcast", "gather_rounds", "gather_object"] = (
        "broadcast"
    )
    """How ranks exchange data that was read in parallel. No effect here: always by broadcast."""
    ckpt_fully_parallel_save_process_group: Literal["dp", "ep_dp"] = "dp"
    """Ranks that share a fully parallel save. No effect here: all data-parallel ones."""
    ckpt_fully_parallel_load_process_group: Literal["dp", "ep_dp"] = "dp"
    """Ranks that share a fully parallel load. No effect here: all data-parallel ones."""
    ckpt_fully_parallel_load_per_rank_objects: bool = False
    """Whether each rank reads its own objects in a fully parallel load. No effect here: it always does."""
    ckpt_pg_tensors_cache_path: str | None = None
    """Path of a cache file that newer versions of Megatron-LM use. No effect here."""
    ckpt_pg_tensors_cache_create: bool = False
    """Create that cache. No effect here."""
    ckpt_assume_constant_structure: bool = False
    """Reuse what earlier saves planned, and collect only objects, while modules, optimizers and their tensors
    are proven to be the same. Needs the same ``checkpointing_context`` at every save."""
    ckpt_load_validate_sharding_integrity: bool = True
    """Check that the requested pieces cover each tensor once. No effect here: that is always checked."""
    dist_ckpt_save_pre_mcore_014: bool = False
    """Save in the layout of Megatron-Core before 0.14. No effect here: always in the newer one."""
    dist_ckpt_optim_fully_reshardable: bool = False
    """Save the optimizer so that any tensor, pipeline and data parallel sizes can load it."""
    distrib_optim_fully_reshardable_mem_efficient: bool = False
    """The same with less memory, over gloo; not together with ``dist_ckpt_optim_fully_reshardable``."""
    verify_integrity: bool = False
    """Record and verify digests of the files. No effect here: checksums are always recorded."""

    # --- saving in the background ---
    async_save: bool = False
    """Continue training while a checkpoint is written."""
    async_strategy: str = "nvrx"
    """Upstream's queue of background saves, "nvrx" or "mcore". Only validated: threads write in both cases.
    Always "mcore" while ``async_save`` is off."""
    use_persistent_ckpt_worker: bool = True
    """Keep one worker process for all saves; ``async_save`` requires it. No effect here: threads write."""
    async_ckpt_cpu_priority: int = 10
    """Niceness of the worker process. No effect here: threads write."""
    async_ckpt_io_priority: int | None = 3
    """I/O class of the worker process. No effect here: threads write."""
    async_ckpt_use_cpu_shm: bool = False
    """Hand tensors to the worker process in shared memory. No effect here: threads write."""
    async_write_results_mp_mode: str = "fork"
    """How the worker process is started. No effect here: threads write."""
    storage_writers_per_rank: int = 1
    """Files that each rank writes."""
    dist_ckpt_workers: int = 1
    """Files per rank of fsdp_dtensor background saves. No effect here: ``storage_writers_per_rank``
    says it for every save."""
    custom_manager_class: str | None = None
    """Dotted path of a checkpoint manager class to use instead of the default one."""

    # --- Hugging Face copy ---
    also_save_hf_checkpoint: bool = False
    """Export Hugging Face weights with each checkpoint, into ``hf/``."""
    hf_source_path: str | None = None
    """Model to take the export's configuration from; default: the run's own Hugging Face model id."""
    hf_trust_remote_code: bool = False
    """Allow that model to run its own code."""
    hf_distributed_save: bool = False
    """Let several ranks write the export."""
    hf_save_every_n_ranks: int = 1
    """One rank in this many writes the export, if several ranks do."""

    # --- ckpt_fast's own ---
    retention: list[Any] | None = None
    """Policies that keep persistent checkpoints besides those of ``most_recent_k``: ``ckpt_fast.KeepEvery``,
    ``KeepBest``, ``KeepFor``, ``KeepIf``, ``KeepNewest``; ``MaxBytes`` limits them. A checkpoint that none
    keeps is deleted."""
    on_corrupt: Literal["fallback", "raise"] = "fallback"
    """If the newest checkpoint is damaged: load the newest intact one with a warning, or raise."""
    on_save_error: Literal["raise", "warn"] = "raise"
    """If a save fails: raise on every rank, or warn and continue training with the previous checkpoint."""
    on_save_failure: Literal["raise", "continue"] | None = None
    """If a background save fails: raise on every rank, or warn and continue training, but at most
    ``max_failed_saves`` times in a row, and not if it is the last save of the run. Takes the place of
    ``on_save_error`` for background saves if it is "continue". None follows ``CKPT_FAST_ON_SAVE_FAILURE``
    (raise)."""
    max_failed_saves: int | None = None
    """How many background saves may fail in a row with ``on_save_failure="continue"``; one more raises. None
    follows ``CKPT_FAST_MAX_FAILED_SAVES`` (3)."""
    on_save_in_progress: Literal["wait", "skip", "queue"] = "wait"
    """If a save is due while the previous one is still being written: wait for the previous one, skip the
    new one with a warning, or copy the state again and write it afterwards."""
    verify_on_load: bool | None = None
    """Compare checksums while loading; None follows ``CKPT_FAST_VERIFY`` (on)."""
    load_glu_rows: Literal["recorded", "contiguous", "interleaved"] = "recorded"
    """Order of the GLU rows in a torch_dist checkpoint: as recorded ("contiguous" if nothing is), or an
    override. "interleaved" is for checkpoints that store them in exactly this run's memory order."""
    host_buffer_bytes: int | None = None
    """Limit on host memory per rank for staged state; None follows ``CKPT_FAST_HOST_BUFFER`` (what the
    machine can spare)."""

    def __post_init__(self) -> None:
        """Checks at construction; raises AssertionError."""
        require(
            self.async_strategy in ("nvrx", "mcore"),
            f"async_strategy={self.async_strategy!r} is not supported: use 'nvrx' or 'mcore'",
        )
        if not self.async_save:
            self.async_strategy = "mcore"
        elif self.async_strategy == "nvrx" and self.ckpt_format in ("torch_dcp", "fsdp_dtensor"):
            from ckpt_fast.compat import HAVE_NVRX

            require(
                HAVE_NVRX,
                f"async_save with ckpt_format={self.ckpt_format!r} and async_strategy='nvrx' needs "
                "nvidia-resiliency-ext: install it, or use async_strategy='mcore'",
            )
        require(
            not self.verify_integrity or self.ckpt_format == "torch_dist",
            "verify_integrity=True requires ckpt_format='torch_dist'",
        )

    def finalize(self) -> None:
        """Check the fields against each other and against the file system. May be called repeatedly.

        Raises:
            AssertionError, ValueError: naming the fields that do not go together.
        """
        if self.pretrained_checkpoint is not None:
            require(
                config_yaml.path_exists(self.pretrained_checkpoint),
                f"Pretrained checkpoint {self.pretrained_checkpoint} does not exist",
            )
        require(
            not (self.load_main_params_from_ckpt and self.load_optim),
            "load_main_params_from_ckpt must be used with load_optim=False",
        )
        if self.async_save:
            require(
                self.save is not None,
                "async_save is enabled, but save is not set. Set save to the checkpoint directory.",
            )
            require(self.use_persistent_ckpt_worker, "async_save requires use_persistent_ckpt_worker=True")
        self._check_hf_copy()
        if self.ckpt_step is not None and self.load is None:
            raise ValueError(
                f"ckpt_step={self.ckpt_step} specified but checkpoint.load is None. "
                "Please set checkpoint.load to the base checkpoint directory."
            )
        require(
            not (
                self.dist_ckpt_optim_fully_reshardable and self.distrib_optim_fully_reshardable_mem_efficient
            ),
            "distrib_optim_fully_reshardable_mem_efficient needs gloo process groups and does not go "
            "together with dist_ckpt_optim_fully_reshardable",
        )
        config_checks.check_choices(self)
        config_checks.warn_of_unused(self)

    def _check_hf_copy(self) -> None:
        if not self.also_save_hf_checkpoint:
            return
        if self.ckpt_format == "fsdp_dtensor":
            raise ValueError("also_save_hf_checkpoint=True is not supported with ckpt_format='fsdp_dtensor'")
        if self.non_persistent_ckpt_type == "local":
            raise ValueError(
                "also_save_hf_checkpoint=True is not compatible with non_persistent_ckpt_type='local'"
            )


@dataclass(kw_only=True)
class ConfigContainer:
    """The whole run's configuration. A program may leave out any part that it does not need."""

    train: Any = None
    """Training settings."""
    model: Any = None
    """Model configuration or provider, for instance ``TransformerConfig``."""
    optimizer: Any = None
    """``OptimizerConfig``; ``use_distributed_optimizer`` is read."""
    scheduler: Any = None
    """Learning rate schedule."""
    dataset: Any = None
    """Data; ``tokenizer``, ``dataloader_save`` and ``dataloader_load`` are read where present."""
    logger: Any = field(default_factory=LoggerConfig)
    """LoggerConfig."""
    tokenizer: Any = None
    """TokenizerConfig."""
    checkpoint: Any = field(default_factory=CheckpointConfig)
    """CheckpointConfig."""
    rng: Any = field(default_factory=RNGConfig)
    """RNGConfig."""
    dist: Any = field(default_factory=DistributedInitConfig)
    """DistributedInitConfig."""
    ddp: Any = None
    """``DistributedDataParallelConfig``; ``use_megatron_fsdp`` is read."""
    rerun_state_machine: Any = None
    validation: Any = None
    profiling: Any = None
    optimizer_config_override_provider: Any = None
    ft: Any = None
    """Set if nvidia-resiliency-ext's fault tolerance monitors the run."""
    straggler: Any = None
    nvrx_straggler: Any = None
    peft: Any = None
    """Adapter configuration; its ``adapter_key_filter`` selects the keys to save."""
    comm_overlap: Any = None
    mixed_precision: Any = None
    tensor_inspect: Any = None
    inprocess_restart: Any = None

    def validate(self) -> None:
        """Check the checkpoint-related settings across the parts; fills ``tensor_inspect.log_dir``.

        Raises:
            AssertionError, ValueError: naming the fields that do not go together.
        """
        config_checks.check_container(self)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as nested dicts with ``_target_`` keys; leaves (dtypes, enums) as they are."""
        return config_yaml.to_dict(self)

    def to_yaml(self, yaml_path: str) -> None:
        """Write the configuration to ``yaml_path``, atomically. Objects of any kind are allowed in it.

        Raises:
            CheckpointWriteError: the file cannot be written; an earlier one is unchanged then.
        """
        config_yaml.write_yaml(self, yaml_path)

    @classmethod
    def from_dict(cls: type[_C], config_dict: dict[str, Any]) -> _C:
        """The opposite of ``to_dict``; also takes what Megatron Bridge wrote (``config_yaml.from_dict``)."""
        return config_yaml.from_dict(cls, config_dict)

    @classmethod
    def from_yaml(cls: type[_C], yaml_path: str) -> _C:
        """The opposite of ``to_yaml``; also reads the ``run_config.yaml`` of Megatron Bridge.

        Raises:
            FileNotFoundError: there is no such file.
            UnsafeCheckpointError: the file names a class or function that is not allowed.
        """
        return config_yaml.read_yaml(cls, yaml_path)
