# SPDX-License-Identifier: Apache-2.0
"""Which of Megatron-Core's factories put back what they took apart, and nothing else."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch

# Where those merge functions are that put the pieces one behind the other: of gated layers, and of the
# projections of Mamba and gated delta nets, which are cut in sections. Versions have one or the other.
_JOINING = (
    ("megatron.core.transformer.utils", "cat_with_oom_fallback"),
    ("megatron.core.transformer.mlp", "apply_swiglu_sharded_factory"),
    ("megatron.core.ssm.mamba_mixer", "_split_tensor_factory"),
    ("megatron.core.ssm.gated_delta_net", "_split_tensor_factory"),
)
_MERGE_NAME = "sh_ten_merge_fn"
_GRAD_MODE = torch.no_grad()(lambda: None).__code__
_probed: dict[CodeType, bool] = {}


def only_joins(merge_fn: Callable[[Any], Any]) -> bool:
    """Whether a merge function does ``torch.cat(pieces)`` and nothing else.

    True of Megatron-Core's own, known by their very code: what only has their name, or wraps them, may do
    more.
    """
    code = _code_of(merge_fn)
    if code is None or not any(code is known for known in _known()):
        return False
    if code not in _probed:
        _probed[code] = _joins_two_pieces(merge_fn)
    return _probed[code]


def _code_of(function: Any) -> CodeType | None:
    code = getattr(function, "__code__", None)
    if code is _GRAD_MODE:  # decorated with torch.no_grad
        code = getattr(function.__wrapped__, "__code__", None)
    return code


def _known() -> list[CodeType]:
    """Code of the functions of ``_JOINING`` in modules that are imported: others have made no factory."""
    found = []
    for module, name in _JOINING:
        code = _code_of(getattr(sys.modules.get(module), name, None))
        if code is None:
            continue
        inner = [
            each for each in code.co_consts if isinstance(each, CodeType) and each.co_name == _MERGE_NAME
        ]
        found += inner or [code]
    return found


def _joins_two_pieces(merge_fn: Callable[[Any], Any]) -> bool:
    """Whether it does so with two small pieces: the function of another version may have changed."""
    rows = torch.arange(6.0).view(3, 2)
    try:
        return torch.equal(merge_fn([rows[:1], rows[1:]]), rows)
    except Exception:
        return False
