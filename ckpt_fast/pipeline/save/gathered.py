# SPDX-License-Identifier: Apache-2.0
"""The records of all ranks meet on the coordinator."""

from __future__ import annotations

import pickle

from ckpt_fast.format.columns.records import WorldRecord, encode_record, join_records
from ckpt_fast.format.types import RankRecord
from ckpt_fast.ranks.group import ControlGroup, Outcome

# What begins the bytes that a rank sends: its record follows, or the outcome that has its failure.
_RECORD, _FAILURE = b"r", b"f"


def gather_records(
    group: ControlGroup, written: Outcome[RankRecord]
) -> tuple[list[Outcome[bytes]], Outcome[WorldRecord | None]]:
    """Collective. What all ranks have written, on the coordinator.

    Args:
        group: the ranks that save together.
        written: by this rank; or its failure.

    Returns:
        Each rank's record in rank order, or its failure; empty elsewhere. And all of them joined: None
        elsewhere, and where a rank has failed.
    """
    mine: Outcome[bytes] = Outcome(written.rank, error=written.error, raised=written.raised)
    record = written.value
    if record is not None:
        mine = group.attempt(lambda: encode_record(record))
    sent = _RECORD + mine.value if mine.value is not None else _FAILURE + pickle.dumps(mine)
    outcomes: list[Outcome[bytes]] = [
        _received(rank, each) for rank, each in enumerate(group.gather_bytes(sent))
    ]
    if outcomes:
        outcomes[group.rank] = mine  # with what was raised
    return outcomes, group.attempt(lambda: _joined(outcomes))


def _received(rank: int, content: bytes) -> Outcome[bytes]:
    if content[:1] == _RECORD:
        return Outcome(rank, content[1:])
    failed: Outcome[bytes] = pickle.loads(memoryview(content)[1:])
    return failed


def _joined(outcomes: list[Outcome[bytes]]) -> WorldRecord | None:
    records = [outcome.value for outcome in outcomes if outcome.value is not None]
    return join_records(records) if records and len(records) == len(outcomes) else None
