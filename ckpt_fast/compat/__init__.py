# SPDX-License-Identifier: Apache-2.0
"""Every name imported from Megatron-Core, and from packages that only its runs use; detected once.

Nothing else in ckpt_fast imports ``megatron``, ``nvidia_resiliency_ext`` or ``modelopt``. A name that the
installed version lacks is None (a function to call when it is there) or a harmless equivalent; ``HAVE_*``
tells whether a group is complete. Versions are never compared.
"""

from __future__ import annotations

from typing import Any

import torch

try:
    from megatron.core import dist_checkpointing, parallel_state
except ModuleNotFoundError as error:
    from ckpt_fast.optional import without_megatron_core

    raise without_megatron_core(error) from error

# The vocabulary of a sharded state dict and its checks: identical in every supported version.
from megatron.core.dist_checkpointing import load, load_common_state_dict, load_content_metadata
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedBase,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factories,
    apply_factory_merges,
    is_main_replica,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategies
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue as MCoreAsyncCallsQueue
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest as MCoreAsyncRequest
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import (
    StrictHandling,
    determine_global_metadata,
    parse_strict_flag,
    validate_integrity_and_strict_load,
    validate_sharding_integrity,
)
from megatron.core.energy_monitor import EnergyMonitor

# Training objects the documented API speaks about.
from megatron.core.msc_utils import MultiStorageClientFeature
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.layer_wise_optimizer import LayerWiseDistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.rerun_state_machine import Call, Caller, get_rerun_state_machine
from megatron.core.tensor_parallel import (
    convert_cuda_rng_state,
    get_cuda_rng_tracker,
    is_graph_safe_cuda_rng_tracker,
)
from megatron.core.timers import Timers
from megatron.core.transformer import MegatronModule
from megatron.core.utils import StragglerDetector, get_model_config, get_pg_size, unwrap_model

from ckpt_fast.compat.bridge import import_auto_bridge
from ckpt_fast.compat.common import TorchCommonSaveStrategy, accept_common_file, default_strategies
from ckpt_fast.compat.errors import DistCheckpointingError, import_local_checkpointing_error
from ckpt_fast.compat.factories import only_joins
from ckpt_fast.compat.fsdp import (
    HAVE_MEGATRON_FSDP,
    MegatronFSDP,
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_gdn_in_state_dict,
    handle_mla_down_proj_in_state_dict,
    handle_mtp_in_state_dict,
    handle_swiglu_in_state_dict,
    preprocess_state_dict_for_uneven_dtensor,
    print_diff_in_state_dicts,
    validate_fsdp_dtensor_model_load,
)
from ckpt_fast.compat.groups import SoloGroup, get_pg_collection, update_num_microbatches
from ckpt_fast.compat.modelopt import (
    MODELOPT_DIR,
    restore_modelopt_state,
    save_modelopt_state,
    save_sharded_modelopt_state,
    uses_modelopt,
)
from ckpt_fast.compat.nvrx import (
    HAVE_NVRX,
    HAVE_RESIL,
    NVRxAsyncRequest,
    NVRxFileSystemWriterAsync,
    get_async_strategy,
    import_basic_state_dict,
    import_local_checkpointing,
    import_tensor_aware_state_dict,
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from ckpt_fast.compat.optimizers import (
    fit_to_members,
    give_adam_its_state,
    keep_adam_steps,
    padding_in,
    without_parameter_state,
)
from ckpt_fast.errors import UnavailableError
from ckpt_fast.optional import safe_import
from ckpt_fast.storage.objects.client import follow_switch

__all__ = [
    "HAVE_MEGATRON_FSDP",
    "HAVE_NVRX",
    "HAVE_RESIL",
    "MODELOPT_DIR",
    "CheckpointingException",
    "DistCheckpointingError",
    "DistributedOptimizer",
    "EnergyMonitor",
    "FullyParallelLoadStrategyWrapper",
    "FullyParallelSaveStrategyWrapper",
    "LayerWiseDistributedOptimizer",
    "LocalNonpersistentObject",
    "MCoreAsyncCallsQueue",
    "MCoreAsyncRequest",
    "MegatronFSDP",
    "MegatronModule",
    "MegatronOptimizer",
    "MultiStorageClientFeature",
    "NVRxAsyncRequest",
    "NVRxFileSystemWriterAsync",
    "OptimizerParamScheduler",
    "ProcessGroupCollection",
    "ShardedBase",
    "ShardedObject",
    "ShardedTensor",
    "ShardedTensorFactory",
    "SoloGroup",
    "StragglerDetector",
    "StrictHandling",
    "Timers",
    "TorchCommonSaveStrategy",
    "TorchDistLoadShardedStrategy",
    "TorchDistSaveShardedStrategy",
    "UnavailableError",
    "accept_common_file",
    "apply_factories",
    "apply_factory_merges",
    "clean_metadata_for_serialization",
    "convert_cuda_rng_state",
    "default_strategies",
    "determine_global_metadata",
    "dict_list_map_outplace",
    "dist_checkpointing",
    "extract_sharded_base",
    "fit_to_members",
    "force_all_tensors_to_non_fp8",
    "get_async_strategy",
    "get_cuda_rng_tracker",
    "get_model_config",
    "get_pg_collection",
    "get_pg_size",
    "get_rerun_state_machine",
    "give_adam_its_state",
    "handle_experts_in_state_dict",
    "handle_fp8_extra_state_case",
    "handle_gdn_in_state_dict",
    "handle_mla_down_proj_in_state_dict",
    "handle_mtp_in_state_dict",
    "handle_swiglu_in_state_dict",
    "import_auto_bridge",
    "import_basic_state_dict",
    "import_local_checkpointing",
    "import_local_checkpointing_error",
    "import_tensor_aware_state_dict",
    "is_graph_safe_cuda_rng_tracker",
    "is_main_replica",
    "keep_adam_steps",
    "load",
    "load_common_state_dict",
    "load_content_metadata",
    "load_preprocess",
    "merge",
    "nested_values",
    "only_joins",
    "padding_in",
    "parallel_state",
    "parse_strict_flag",
    "preprocess_state_dict_for_uneven_dtensor",
    "print_diff_in_state_dicts",
    "restore_modelopt_state",
    "safe_import",
    "save_modelopt_state",
    "save_preprocess",
    "save_sharded_modelopt_state",
    "save_state_dict_async_finalize",
    "save_state_dict_async_plan",
    "torch_strategies",
    "unwrap_model",
    "update_num_microbatches",
    "uses_modelopt",
    "validate_fsdp_dtensor_model_load",
    "validate_integrity_and_strict_load",
    "validate_sharding_integrity",
    "without_parameter_state",
]


# Two tuples without behaviour, in every checkpoint of a step that is to be run again. Megatron-Core tells
# torch's restricted unpickler of the other classes that its state dicts hold, and forgets these.
torch.serialization.add_safe_globals([Call, Caller])

# Object storage is used exactly where Megatron-Core would use it.
follow_switch(MultiStorageClientFeature)


def clean_metadata_for_serialization(metadata: dict[str, Any] | None) -> dict[str, Any] | None:
    """A copy of the content metadata without its process group, which cannot be pickled."""
    if metadata is None:
        return None
    return {key: value for key, value in metadata.items() if key != "dp_cp_group"}
