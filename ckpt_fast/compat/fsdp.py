# SPDX-License-Identifier: Apache-2.0
"""Megatron FSDP: what a ``fsdp_dtensor`` checkpoint needs."""

from ckpt_fast.optional import import_names

_FSDP = "megatron.core.distributed.fsdp.src.megatron_fsdp"
_HANDLERS = "megatron.core.transformer.fsdp_dtensor_checkpoint"

(MegatronFSDP,) = import_names(f"{_FSDP}.megatron_fsdp", "MegatronFSDP")
(preprocess_state_dict_for_uneven_dtensor,) = import_names(
    f"{_FSDP}.uneven_dtensor", "preprocess_state_dict_for_uneven_dtensor"
)
(
    handle_experts_in_state_dict,
    handle_fp8_extra_state_case,
    handle_swiglu_in_state_dict,
    print_diff_in_state_dicts,
) = import_names(
    _HANDLERS,
    "handle_experts_in_state_dict",
    "handle_fp8_extra_state_case",
    "handle_swiglu_in_state_dict",
    "print_diff_in_state_dicts",
)
HAVE_MEGATRON_FSDP = None not in (
    MegatronFSDP,
    preprocess_state_dict_for_uneven_dtensor,
    handle_experts_in_state_dict,
)

# Newer models' layouts. The last three came together: half of them would leave weights unmapped.
(handle_gdn_in_state_dict,) = import_names(_HANDLERS, "handle_gdn_in_state_dict")
handle_mla_down_proj_in_state_dict, handle_mtp_in_state_dict, validate_fsdp_dtensor_model_load = import_names(
    _HANDLERS,
    "handle_mla_down_proj_in_state_dict",
    "handle_mtp_in_state_dict",
    "validate_fsdp_dtensor_model_load",
)
