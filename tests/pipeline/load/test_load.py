# SPDX-License-Identifier: Apache-2.0
"""Any region of any sharding into any destination, from our checkpoints and torch DCP's."""

from __future__ import annotations

import io
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given, settings
from hypothesis import strategies as st

from ckpt_fast import settings as environment
from ckpt_fast.errors import CheckpointCorruptError, CheckpointMismatchError
from ckpt_fast.format.types import ObjectShard, TensorRequest, TensorShard
from ckpt_fast.pipeline.load import load as load_module
from ckpt_fast.pipeline.load.index import CheckpointIndex
from ckpt_fast.pipeline.load.load import LoadReport, load_objects, load_tensors
from tests.pipeline.layouts import (
    PLAIN_DTYPES,
    Region,
    boxes,
    cuts,
    random_tensor,
    raw_bytes,
    same,
    save_tensors,
    shapes,
    shards_of,
    whole,
)
from tests.saves import save

pytestmark = pytest.mark.usefixtures("native_impl", "no_fsync")


def load(directory: Path | str, fqn: str, into: torch.Tensor, offsets: tuple[int, ...] = ()) -> LoadReport:
    offsets = offsets or (0,) * into.dim()
    return load_tensors(CheckpointIndex(str(directory)), [TensorRequest(fqn, into, offsets)])


def save_stock(directory: Path | str, state: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is logged that one process saves alone
        dcp.save(state, checkpoint_id=directory)


def test_an_unknown_variable_is_warned_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Not only by saves: a process may only load."""
    save([TensorShard("w", torch.ones(3), (0,), (3,))], str(tmp_path))
    monkeypatch.setattr(environment, "_warned", set())
    monkeypatch.setenv("CKPT_FAST_VERIFI", "0")
    for _ in range(2):
        load(tmp_path, "w", torch.empty(3))
    assert caplog.messages == ["CKPT_FAST_VERIFI has no meaning here: did you mean CKPT_FAST_VERIFY?"]


@st.composite
def destinations(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of this shape in memory of some layout, filled with something other than the answer."""
    kind = draw(st.sampled_from(["contiguous", "transposed", "inside", "strided"]))
    if kind == "transposed" and shape:
        order = draw(st.permutations(range(len(shape))))
        base = torch.empty([shape[d] for d in order], dtype=dtype)
        return base.permute([order.index(d) for d in range(len(shape))])
    if kind == "inside" and shape:
        base = torch.empty([n + 2 for n in shape], dtype=dtype)
        return Region((1,) * len(shape), shape).of(base)
    if kind == "strided" and shape:
        return torch.empty([*shape[:-1], shape[-1] * 2], dtype=dtype)[..., ::2]
    return torch.empty(shape, dtype=dtype)


@settings(max_examples=150)
@given(st.data())
def test_any_region_of_any_sharding(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    dtype = data.draw(st.sampled_from(PLAIN_DTYPES))
    tensor = random_tensor(shape, dtype, seed=data.draw(st.integers(0, 99)))
    regions = data.draw(cuts(shape))
    wanted = data.draw(boxes(shape))
    into = data.draw(destinations(wanted.sizes, dtype))
    with tempfile.TemporaryDirectory() as directory:
        save(shards_of("w", tensor, regions), directory, writers=data.draw(st.integers(1, 3)))
        report = load(directory, "w", into, wanted.offsets)
    assert same(into, wanted.of(tensor))
    touched = [region for region in regions if overlap(region, wanted) is not None]
    assert (report.verified, report.unverified) == (len(touched), 0)


def overlap(a: Region, b: Region) -> tuple[int, ...] | None:
    """Return the shape that two regions have in common; None if nothing."""
    sizes = tuple(
        min(p + n, q + m) - max(p, q)
        for p, n, q, m in zip(a.offsets, a.sizes, b.offsets, b.sizes, strict=True)
    )
    return None if any(size <= 0 for size in sizes) else sizes


@pytest.mark.parametrize("shape", [(96, 64), (4, 40, 48), (3, 1, 5, 400), (4096,)], ids=str)
def test_regions_with_long_runs(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Rows long enough to be read straight into place, without an intermediate buffer."""
    tensor = random_tensor(shape, torch.float64)
    save_tensors(tmp_path, {"w": tensor})
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        ends = [sorted(torch.randint(0, n + 1, (2,), generator=generator).tolist()) for n in shape]
        region = Region(tuple(a for a, _ in ends), tuple(b - a for a, b in ends))
        for into in (torch.zeros(region.sizes, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)):
            view = into if into.shape == torch.Size(region.sizes) else region.of(into)
            load(tmp_path, "w", view, region.offsets)
            assert same(view, region.of(tensor))


def test_nothing_outside_the_destination_is_touched(tmp_path: Path) -> None:
    tensor = random_tensor((64, 128), torch.int32)
    save_tensors(tmp_path, {"w": tensor})
    frame = torch.full((68, 132), -7, dtype=torch.int32)
    load(tmp_path, "w", frame[2:66, 2:130])
    assert same(frame[2:66, 2:130], tensor)
    frame[2:66, 2:130] = -7
    assert (frame == -7).all()


@pytest.mark.parametrize(
    ("saved", "wanted"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
        (torch.int64, torch.int32),
        (torch.float8_e4m3fn, torch.float32),
    ],
    ids=str,
)
def test_conversion(tmp_path: Path, saved: torch.dtype, wanted: torch.dtype) -> None:
    tensor = torch.arange(-20, 20).reshape(5, 8).to(saved)
    save_tensors(tmp_path, {"w": tensor})
    into = torch.empty(3, 8, dtype=wanted)
    load(tmp_path, "w", into, (1, 0))
    assert same(into, tensor[1:4].to(wanted))


@pytest.mark.parametrize("divisor", [2, 8, 32])
def test_a_slice_of_rows_reads_little_more_than_itself(tmp_path: Path, divisor: int) -> None:
    tensor = random_tensor((1024, 256), torch.bfloat16)
    regions = [Region((n * 256, 0), (256, 256)) for n in range(4)]
    save(shards_of("w", tensor, regions), str(tmp_path), writers=2)
    rows = 1024 // divisor
    into = torch.empty(rows, 256, dtype=torch.bfloat16)
    report = load(tmp_path, "w", into, (1024 - rows - 1, 0))
    wanted = into.numel() * 2
    assert wanted <= report.nbytes <= wanted + 4 * len(regions)


def test_a_slice_of_columns_reads_only_its_columns_when_they_are_wide(tmp_path: Path) -> None:
    tensor = random_tensor((256, 2048), torch.bfloat16)
    save_tensors(tmp_path, {"w": tensor})
    into = torch.empty(256, 256, dtype=torch.bfloat16)
    assert load(tmp_path, "w", into, (0, 512)).nbytes == into.numel() * 2
    assert same(into, tensor[:, 512:768])


def test_narrow_columns_read_the_rows_around_them_once(tmp_path: Path) -> None:
    tensor = random_tensor((256, 64), torch.bfloat16)
    save_tensors(tmp_path, {"w": tensor})
    into = torch.empty(100, 2, dtype=torch.bfloat16)
    assert load(tmp_path, "w", into, (50, 7)).nbytes == 100 * 64 * 2
    assert same(into, tensor[50:150, 7:9])


def test_many_requests_at_once(tmp_path: Path) -> None:
    tensors = {f"w{n}": random_tensor((n, 5), PLAIN_DTYPES[n % len(PLAIN_DTYPES)], n) for n in range(40)}
    save_tensors(tmp_path, tensors, writers=4)
    into = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
    requests = [TensorRequest(name, tensor, (0, 0)) for name, tensor in into.items()]
    report = load_tensors(CheckpointIndex(str(tmp_path)), requests * 2)
    assert all(same(into[name], tensors[name]) for name in tensors)
    assert (report.verified, report.unverified) == (80, 0)
    assert report.seconds > 0 and report.directory == str(tmp_path)


def test_verification_can_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = random_tensor((10,), torch.float32)
    save_tensors(tmp_path, {"w": tensor})
    request = TensorRequest("w", torch.empty(10), (0,))
    index = CheckpointIndex(str(tmp_path))
    assert load_tensors(index, [request], verify=False).unverified == 1
    monkeypatch.setenv("CKPT_FAST_VERIFY", "0")
    assert load_tensors(index, [request]).verified == 0
    assert load_tensors(index, [request], verify=True).verified == 1
    assert same(request.destination, tensor)


def test_parameters_are_loaded_in_place(tmp_path: Path) -> None:
    tensor = random_tensor((6, 4), torch.float32)
    save_tensors(tmp_path, {"w": tensor})
    parameter = torch.nn.Parameter(torch.zeros(6, 4))
    load(tmp_path, "w", parameter)
    load(tmp_path, "w", parameter[1:3], (1, 0))
    assert same(parameter.detach(), tensor) and parameter.requires_grad and parameter.grad_fn is None


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [((11,), (0,)), ((2,), (9,)), ((2,), (-1,)), ((2, 5), (0, 0)), ((), ())],
    ids=str,
)
def test_regions_that_do_not_fit(tmp_path: Path, shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    save_tensors(tmp_path, {"w": torch.zeros(10)})
    with pytest.raises(CheckpointMismatchError, match=r"w is saved with shape \(10,\); a region of shape"):
        load_tensors(CheckpointIndex(str(tmp_path)), [TensorRequest("w", torch.zeros(shape), offsets)])


def test_names_that_are_not_there(tmp_path: Path) -> None:
    save([whole("a.weight", torch.zeros(2)), ObjectShard("o", b"x")], str(tmp_path))
    index = CheckpointIndex(str(tmp_path))
    with pytest.raises(CheckpointMismatchError, match=r"has no b\.weight\. It has, for example, a\.weight\."):
        load_tensors(index, [TensorRequest("b.weight", torch.zeros(2), (0,))])
    with pytest.raises(CheckpointMismatchError, match="has no o"):
        load_tensors(index, [TensorRequest("o", torch.zeros(2), (0,))])
    with pytest.raises(CheckpointMismatchError, match=r"has no a\.weight"):
        load_objects(index, ["a.weight"])


# Tensors that are not plain bytes, and other writers' checkpoints.


def test_complex32_and_quantized_tensors(tmp_path: Path) -> None:
    half = torch.tensor([[1 + 2j, 3 - 4j, 5j]], dtype=torch.complex32)
    save_tensors(tmp_path, {"half": half})
    into = torch.empty(1, 2, dtype=torch.complex32)
    report = load(tmp_path, "half", into, (0, 1))
    assert same(into, half[:, 1:]) and report.verified == 1


@pytest.mark.parametrize("dtype", PLAIN_DTYPES, ids=str)
def test_stock_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = random_tensor((7, 9), dtype)
    save_stock(tmp_path, {"w": tensor})
    into = torch.empty_like(tensor)
    report = load(tmp_path, "w", into)
    assert same(into, tensor) and (report.verified, report.unverified) == (1, 0)
    part = torch.empty(3, 9, dtype=dtype)
    load(tmp_path, "w", part, (2, 0))
    assert same(part, tensor[2:5])


BASE = torch.arange(240.0).reshape(12, 20)


@pytest.mark.parametrize(
    "tensor",
    [BASE.t(), BASE[3:7], BASE[:, 5:9], BASE[::2, ::3], BASE[0, 0], BASE[:, :0], torch.ones(1).expand(5, 3)],
    ids=["transposed", "rows", "columns", "strided", "scalar", "empty", "expanded"],
)
def test_stock_tensors_that_are_views(tmp_path: Path, tensor: torch.Tensor) -> None:
    """torch.save keeps strides, and storages larger than the tensor."""
    save_stock(tmp_path, {"w": tensor})
    into = torch.full(tensor.shape, -1.0)
    load(tmp_path, "w", into)
    assert torch.equal(into, tensor)


def test_stock_items_of_both_kinds_read_together(tmp_path: Path) -> None:
    state = {"plain": BASE.clone(), "turned": BASE.t(), "small": torch.tensor(3)}
    save_stock(tmp_path, dict(state))
    into = {name: torch.zeros_like(tensor).contiguous() for name, tensor in state.items()}
    load_tensors(
        CheckpointIndex(str(tmp_path)),
        [TensorRequest(name, tensor, (0,) * tensor.dim()) for name, tensor in into.items()],
    )
    assert all(torch.equal(into[name], state[name]) for name in state)


def test_stock_dcp_reads_what_we_write(tmp_path: Path) -> None:
    tensors = {f"w{n}": random_tensor((3, n), PLAIN_DTYPES[n], n) for n in range(8)}
    save_tensors(tmp_path, tensors, writers=3)
    into = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, checkpoint_id=tmp_path)
    assert all(same(into[name], tensors[name]) for name in tensors)


def test_stock_dcp_reads_what_we_shard(tmp_path: Path) -> None:
    tensor = random_tensor((9, 10), torch.float32)
    regions = [Region((0, 0), (4, 10)), Region((4, 0), (5, 3)), Region((4, 3), (5, 7))]
    save(shards_of("w", tensor, regions), str(tmp_path))
    into = {"w": torch.zeros(9, 10)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, checkpoint_id=tmp_path)
    assert same(into["w"], tensor)


def test_objects(tmp_path: Path) -> None:
    payloads = {}
    for name, value in (("a", [1, "x"]), ("b", {"t": torch.ones(3)})):
        buffer = io.BytesIO()
        torch.save(value, buffer)
        payloads[name] = buffer.getvalue()
    shards = [ObjectShard(name, payload) for name, payload in payloads.items()]
    save([*shards, whole("w", torch.zeros(5))], str(tmp_path), writers=2)
    found = load_objects(CheckpointIndex(str(tmp_path)), ["a", "b"])
    assert found["a"] == [1, "x"] and raw_bytes(found["b"]["t"]) == raw_bytes(torch.ones(3))


def test_a_piece_with_a_transposed_layout_is_saved_by_value(tmp_path: Path) -> None:
    turned = BASE.t()[3:8]
    save([TensorShard("w", turned, (0, 0), (5, 12))], str(tmp_path))
    into = torch.empty(5, 12)
    load(tmp_path, "w", into)
    assert torch.equal(into, turned)


@pytest.mark.parametrize("limit", [1, 3000, 1 << 20])
def test_what_is_not_read_in_place_lands_in_waves(
    tmp_path: Path, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a buffer for one tensor, for some, and for all; some in between need none."""
    monkeypatch.setattr(load_module, "_LANDING_NBYTES", limit)
    taken, take = [], load_module.host_buffers.take
    monkeypatch.setattr(
        load_module.host_buffers, "take", lambda nbytes, *rest: taken.append(nbytes) or take(nbytes, *rest)
    )
    tensors = {f"w{n}": torch.randn(n + 1, 40) for n in range(12)}
    save_tensors(tmp_path, tensors)
    into = {
        name: torch.empty_like(tensor, dtype=torch.float64 if number % 3 else torch.float32)
        for number, (name, tensor) in enumerate(tensors.items())
    }
    requests = [TensorRequest(name, tensor, (0, 0)) for name, tensor in into.items()]
    report = load_tensors(CheckpointIndex(str(tmp_path)), requests)
    assert all(torch.equal(into[name].float(), tensors[name]) for name in tensors)
    assert report.verified == len(tensors)
    largest = 12 * 40 * 4
    assert len(taken) == 1 and taken[0] <= max(limit, largest)


def test_a_tensor_of_which_only_empty_pieces_were_saved(tmp_path: Path) -> None:
    empty = TensorShard("e", torch.empty(0, 4), (0, 0), (4, 4))
    save([whole("w", torch.ones(3)), empty], str(tmp_path), partial=True)
    index, found = CheckpointIndex(str(tmp_path)), torch.zeros(3)
    load_tensors(index, [TensorRequest("w", found, (0,))])
    assert found.tolist() == [1, 1, 1] and index.shape("e") == (4, 4)
    with pytest.raises(CheckpointCorruptError, match="e"):
        load_tensors(index, [TensorRequest("e", torch.zeros(4, 4), (0, 0))])
