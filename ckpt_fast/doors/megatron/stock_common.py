# SPDX-License-Identifier: Apache-2.0
"""Common state that Megatron-Core's own load would refuse: said when it is saved.

Megatron-Core reads the common state with torch's ``weights_only``, whose list is shorter than ours. It
refuses the whole checkpoint for one value.
"""

from __future__ import annotations

import io
import logging
import re
from typing import Any

import torch

from ckpt_fast.format.archive import TYPED_STORAGES
from ckpt_fast.pipeline.save.objects import encoded, parts_of_value

logger = logging.getLogger(__name__)

# Names in a pickle of protocol 2, and those that torch always accepts.
_NAME = re.compile(rb"c([\w.]+)\n([\w.]+)\n")
_ACCEPTED = {
    (b"collections", b"OrderedDict"),
    (b"torch._utils", b"_rebuild_tensor_v2"),
    *((b"torch", name.encode()) for name in TYPED_STORAGES.values()),
}
_REASON = re.compile(r"((?:Unsupported|GLOBAL|Trying to).*?)(?:\.? by default|\. |\n|$)")
_MOST_LEVELS = 16
_told: set[frozenset[tuple[bytes, bytes]]] = set()


def warn_of_refusal(state: Any, payload: bytes, name: str) -> None:
    """Local. Log a warning, once for values of the same classes, if Megatron-Core's own load refuses them.

    Args:
        state: the common state.
        payload: the same, as ``torch.save`` has written it.
        name: of the state, for the warning.
    """
    names = frozenset(_NAME.findall(payload)) - _ACCEPTED
    if not names or names in _told:
        return
    reason = _refusal(payload)
    if reason is None:
        return
    _told.add(names)
    for _ in range(_MOST_LEVELS):
        for key, part in parts_of_value(state):
            why = _refusal(encoded(part))
            if why is not None:
                name, state, reason = f"{name}[{key!r}]", part, why
                break
        else:
            break
    logger.warning(
        "%s (a %s.%s) is saved, and ckpt_fast loads it, but the installed Megatron-Core itself would refuse "
        "to load this checkpoint: %s. If it shall be able to, keep plain numbers, strings, containers or "
        "tensors instead, or call torch.serialization.add_safe_globals wherever the checkpoint is loaded.",
        name,
        type(state).__module__,
        type(state).__qualname__,
        reason,
    )


def _refusal(payload: bytes) -> str | None:
    try:
        torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        # All around it is advice that does not apply here.
        found = _REASON.search(str(error))
        return found[1] if found else type(error).__name__
    return None
