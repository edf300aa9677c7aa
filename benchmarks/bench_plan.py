# SPDX-License-Identifier: Apache-2.0
"""Measure the coordinator's work on the plans of many ranks: time, bytes received, bytes of ``.metadata``.

    python benchmarks/bench_plan.py --rounds 3

Ranks are simulated: their plans are built and pickled here, as the gathering collective would. The
coordinator's part is real: unpickle, merge, check, encode. Both sides describe the same shards: every rank
has ``--shards`` fragments of as many tensors.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import harness
import rivals
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from ckpt_fast import compat
from ckpt_fast.doors.megatron.sharded_state import shards_of
from ckpt_fast.format.types import FileRecord, RankRecord
from ckpt_fast.pipeline.save.encode import encode_metadata
from ckpt_fast.pipeline.save.plan import file_prefix, item_records, plan_save
from ckpt_fast.ranks.group import Outcome

SIZES = ((512, 100), (4096, 25))
ROWS, WIDTH = 8, 16


def fragments(rank: int, ranks: int, count: int) -> dict[str, Any]:
    """Return ``rank``'s fragment of each of ``count`` tensors, which are divided among all ranks."""
    return rivals.sharded(
        {f"decoder.layers.{n}.mlp.linear_fc1.weight": torch.empty(ROWS, WIDTH) for n in range(count)},
        axis=0, fragments=ranks, rank=rank,
    )  # fmt: skip


def our_messages(ranks: int, count: int) -> list[bytes]:
    """Return what every rank sends once it has written: its items and files."""
    messages = []
    for rank in range(ranks):
        files = plan_save(shards_of(fragments(rank, ranks, count)), file_prefix(rank), 1)
        record = RankRecord(item_records(files), [FileRecord(file.path, file.nbytes, 0) for file in files])
        messages.append(pickle.dumps(Outcome(rank, record)))
    return messages


def our_coordinator(messages: Sequence[bytes]) -> bytes:
    outcomes = [pickle.loads(message) for message in messages]
    return encode_metadata(item for outcome in outcomes for item in outcome.value.items)


def stock_messages(ranks: int, count: int) -> list[tuple[bytes, bytes]]:
    """Return what every rank sends: its plan before writing, its results afterwards."""
    messages = []
    for rank in range(ranks):
        state = fragments(rank, ranks, count)
        planner = stock_planner(compat.torch_strategies.mcore_to_pyt_state_dict(_by_key(state), False))
        plan = planner.create_local_plan()
        results = [
            WriteResult(item.index, 4096, _StorageInfo(f"__{rank}_0.distcp", 4096 * number, 4096))
            for number, item in enumerate(plan.items)
        ]
        messages.append((pickle.dumps(plan), pickle.dumps(results)))
    return messages


def _by_key(state: dict[str, Any]) -> dict[str, list[Any]]:
    return {key: [tensor] for key, tensor in state.items()}


def stock_planner(state: dict[str, Any]) -> Any:
    planner = compat.torch_strategies.MCoreSavePlanner(
        dedup_replicated_tensors=False, flatten_state_dict=False
    )
    planner.set_up_planner(state, is_coordinator=True)
    return planner


def stock_coordinator(messages: Sequence[tuple[bytes, bytes]]) -> bytes:
    plans = [pickle.loads(plan) for plan, _ in messages]
    _, metadata = stock_planner({}).create_global_plan(plans)
    metadata.all_local_plans = plans
    results = [pickle.loads(written) for _, written in messages]
    metadata.storage_data = {result.index: result.storage_data for written in results for result in written}
    buffer = io.BytesIO()
    pickle.dump(metadata, buffer)
    return buffer.getvalue()


def coordinators(ranks: int, count: int, only: str) -> tuple[list[harness.Contestant], list[str]]:
    """Return our and the stock coordinator over the same shards, and a line on the bytes of each."""
    contestants, lines = [], []
    for name, messages, work in (
        ("ckpt_fast", our_messages, our_coordinator),
        ("mcore", stock_messages, stock_coordinator),
    ):
        if only and only not in name:
            continue
        received = messages(ranks, count)
        metadata = work(received)
        gathered = sum(len(part) for m in received for part in ([m] if isinstance(m, bytes) else m))
        contestants.append(harness.Contestant(name, _discarding(work, received), nbytes=len(metadata)))
        sizes = f"{gathered / 1e6:7.1f} MB gathered, {len(metadata) / 1e6:7.1f} MB of .metadata"
        lines.append(f"  {name.ljust(10)} {sizes}")
    return contestants, lines


def _discarding(work: Callable[[Any], bytes], received: Any) -> Callable[[], None]:
    def run() -> None:
        work(received)

    return run


def main() -> None:
    options = harness.parse_arguments(__doc__, rounds=3)
    rivals.start_process_group()
    report = harness.Report(options)
    for full, count in SIZES:
        # --gigabytes 1 is the full size; less, for a test, means fewer ranks.
        ranks = max(2, round(full * min(options.gigabytes, 1.0)))
        contestants, lines = coordinators(ranks, count, options.only)
        times = harness.measure(contestants, options.rounds)[harness.TOTAL]
        title = f"{ranks} ranks with {count} shards each, on the coordinator, {options.rounds} rounds"
        report.add(harness.table(title, times, contestants, 0, "mcore"))
        report.add(lines)
    report.finish()


if __name__ == "__main__":
    main()
