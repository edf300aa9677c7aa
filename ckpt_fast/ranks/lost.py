# SPDX-License-Identifier: Apache-2.0
"""A rank that has ended, as the transport says it and as we do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import torch.distributed as dist

from ckpt_fast.errors import CheckpointError, RankLostError


def rank_lost(error: Exception, rank: int, others: int) -> RankLostError:
    """What ``rank`` raises instead of the transport's ``error``; it had ``others`` to talk to."""
    reason = str(error).strip().partition("\n")[0]
    return RankLostError(
        f"rank {rank} has lost touch with the other {others} ranks, so nobody can "
        f"tell whether all had done their part: {reason}. One of them has ended (killed, out of "
        "memory, its node gone) or does not answer; its own log says why. What was published before "
        "is as it was. Start the job again, from the newest checkpoint."
    )


@contextlib.contextmanager
def in_touch() -> Iterator[None]:
    """A block, or as a decorator a function, out of which the transport's errors come in our words.

    For calls that talk to other ranks in code that is not ours, such as Megatron-Core's optimizers. Other
    errors pass as they are.

    Raises:
        RankLostError: a collective of that code failed because another rank has ended or does not answer.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, CheckpointError) or not _is_of_transport(error):
            raise
        raise rank_lost(error, dist.get_rank(), dist.get_world_size() - 1) from error


# gloo has no class for its errors, but they begin with their place in its source.
_GLOO = re.compile(r"\[[^\[\]]*/gloo/[^\[\]]*\.(cc|h):[0-9]+\] ")


def _is_of_transport(error: RuntimeError) -> bool:
    """Whether a process group raised it because another rank has ended or does not answer."""
    if not (dist.is_available() and dist.is_initialized()):
        return False
    if isinstance(error, dist.DistBackendError):  # NCCL's also say what is wrong on this rank
        return "ncclRemoteError" in str(error)
    return isinstance(error, dist.DistNetworkError) or _GLOO.match(str(error)) is not None
