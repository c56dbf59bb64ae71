# SPDX-License-Identifier: Apache-2.0
"""Files that are whole or not there, and know when they were altered; block results in them."""

import errno
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.blocks.weights import load_quantized_weights
from omniq.errors import CorruptFile, UserError
from omniq.grid.affine import Grid
from omniq.storage.atomic import atomic_write, report_full_disk
from omniq.storage.block_result import BlockResult, Outliers, QuantizedLinear
from omniq.storage.ownership import check_writable
from omniq.storage.run_dir import RunDir
from omniq.storage.sealed import load_state, load_tensors, save_state, save_tensors

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
)
in_one_folder = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype and shape, empty and scalar ones included, and not always contiguous."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    tensor = (10 * torch.randn(shape, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    return tensor.mT if tensor.dim() >= 2 and draw(st.booleans()) else tensor


def equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


@in_one_folder
@given(
    st.dictionaries(st.text(min_size=1, max_size=8), tensors(), max_size=4),
    st.dictionaries(st.text(), st.text(), max_size=3),
)
def test_tensors_round_trip(tmp_path: Path, content: dict[str, Tensor], head: dict[str, str]) -> None:
    content.pop("__metadata__", None)  # a name that safetensors keeps for itself
    head.pop("sha256", None)
    save_tensors(tmp_path / "file", content, head)
    found, found_head = load_tensors(tmp_path / "file")
    assert found_head == head
    assert found.keys() == content.keys()
    assert all(equal(found[name], content[name]) for name in content)


@in_one_folder
@given(st.data())
def test_no_altered_byte_goes_unnoticed(tmp_path: Path, data: st.DataObject) -> None:
    """Any byte of a result or of a state, and any cut: refused by name, or of no consequence."""
    result, state = tmp_path / "result", {"x": torch.arange(3), "n": 2}
    example().save(result)
    save_state(tmp_path / "state", state)
    for path in (result, tmp_path / "state"):
        content = bytearray(path.read_bytes())
        place = data.draw(st.integers(0, len(content) - 1))
        if data.draw(st.booleans()):
            content[place] ^= 1 << data.draw(st.integers(0, 7))
        else:
            del content[place:]
        path.write_bytes(content)
        if path != result:
            with pytest.raises(CorruptFile, match=str(path)):
                load_state(path)
            continue
        try:
            loaded = BlockResult.load(path)
        except CorruptFile:
            continue
        assert_same(loaded, example())  # such as a blank of the header that became another blank


def test_files_that_never_were_any(tmp_path: Path) -> None:
    for content in (b"", b"x", b"\0" * 100, os.urandom(200)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CorruptFile, match=str(tmp_path / "file")):
            load_tensors(tmp_path / "file")
        with pytest.raises(CorruptFile, match=str(tmp_path / "file")):
            load_state(tmp_path / "file")


def test_state_round_trip(tmp_path: Path) -> None:
    state = {"tensor": torch.randn(3), "numbers": [1, 2.5, None, True], "nested": {"a": ("b", torch.float16)}}
    save_state(tmp_path / "state", state)
    found = load_state(tmp_path / "state")
    assert torch.equal(found.pop("tensor"), state.pop("tensor"))
    assert found == state


def test_state_with_objects_is_refused_when_read(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"object": SimpleNamespace(a=1)})
    with pytest.raises(CorruptFile, match="state: it holds objects that cannot be read back safely"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match=f"cannot write {path}: No space left on device; free the disk"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_new_name_is_flushed_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a power cut could keep what was written later, such as that the work before it was removed."""
    real, seen = os.fsync, []

    def flush(handle: int) -> None:
        real(handle)
        here = os.path.samestat(os.fstat(handle), tmp_path.stat())
        seen.append((here, (tmp_path / "file").exists()))
        if here:
            raise OSError(errno.EINVAL, "Invalid argument")  # a filesystem that cannot flush folders

    monkeypatch.setattr(os, "fsync", flush)
    atomic_write(tmp_path / "file", b"new")
    assert seen == [(False, False), (True, True)]


def test_records_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    with RunDir(tmp_path) as run:
        run.write_json("summary.json", {"perplexity": {"rtn": math.inf}, "blocks": [{"loss": math.nan}, {"loss": 0.5}]})

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    found = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert found == {"perplexity": {"rtn": None}, "blocks": [{"loss": None}, {"loss": 0.5}]}


def test_copies_beside_blocks_are_not_blocks(tmp_path: Path) -> None:
    for name in ("000.safetensors", "1000.safetensors", "000 (copy).safetensors"):
        (tmp_path / "blocks").mkdir(exist_ok=True)
        (tmp_path / "blocks" / name).touch()
    assert RunDir(tmp_path).finished() == [0, 1000]


def test_a_filesystem_that_became_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the half file cannot be removed either, which must not hide why."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(UserError, match=f"cannot write {tmp_path / 'file'}: Read-only file system; free the disk"):
        atomic_write(tmp_path / "file", b"new")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS])
@pytest.mark.parametrize("wrapped", [False, True])
def test_others_on_a_disk_that_takes_no_more(tmp_path: Path, number: int, wrapped: bool) -> None:
    error, outer = OSError(number, os.strerror(number)), ValueError("you tried to log 1.0")
    outer.__cause__ = error  # as TensorBoard's logger does
    said = f"cannot write into {tmp_path}: {os.strerror(number)}; free the disk"
    with pytest.raises(UserError, match=said), report_full_disk(tmp_path):
        raise outer if wrapped else error


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), ValueError("no"), UserError("as it was")])
def test_other_errors_of_others_are_theirs(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error), match=str(error.args[-1])) as caught, report_full_disk(tmp_path):
        raise error
    assert caught.value is error


def test_parts_are_joined_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"a much longer content")
    atomic_write(path, b"one", b"", b"two")
    assert path.read_bytes() == b"onetwo"


def linear(grid: Grid, outliers: bool = False, seed: int = 0) -> QuantizedLinear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 16, generator=generator)
    scale, zero_point = grid.fit(*grid.range(weight))
    dense = weight * (torch.rand(weight.shape, generator=generator) < 0.1)
    sparse = Outliers.from_dense(dense) if outliers else None
    return QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point, sparse)


def example() -> BlockResult:
    linears = {
        "self_attn.q_proj": linear(Grid(3, 4)),
        "mlp.up_proj": linear(Grid(8, -1, True, torch.bfloat16), outliers=True),
    }
    others = {
        "self_attn.q_proj.bias": torch.randn(6, generator=torch.Generator().manual_seed(3)),
        "norm.weight": torch.ones(16),
    }
    return BlockResult(linears, others, {"loss": 0.1, "guard": "text", "nested": {"a": [1, None]}})


def assert_same(found: BlockResult, expected: BlockResult) -> None:
    assert found.summary == expected.summary
    assert found.linears.keys() == expected.linears.keys()
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(equal(found.tensors[name], value) for name, value in expected.tensors.items())
    for name, theirs in expected.linears.items():
        ours = found.linears[name]
        assert ours.grid == theirs.grid
        for part in ("codes", "scale", "zero_point"):
            assert equal(getattr(ours, part), getattr(theirs, part))
        assert (ours.outliers is None) == (theirs.outliers is None)
        if ours.outliers is not None and theirs.outliers is not None:
            assert all(equal(value, vars(theirs.outliers)[key]) for key, value in vars(ours.outliers).items())


def test_result_round_trip(tmp_path: Path) -> None:
    example().save(tmp_path / "block")
    assert_same(BlockResult.load(tmp_path / "block"), example())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**16), st.floats(0, 1))
def test_outliers_round_trip(seed: int, share: float) -> None:
    """Any pattern, empty rows included; values are rounded to float16 once."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(5, 7, generator=generator) * (torch.rand(5, 7, generator=generator) < share)
    sparse = Outliers.from_dense(dense)
    assert torch.equal(sparse.dense(7), dense.half().float())
    assert sparse.row_pointer.tolist() == [0, *(dense != 0).sum(1).cumsum(0).tolist()]
    kinds = (sparse.row_pointer.dtype, sparse.column.dtype, sparse.value.dtype)
    assert kinds == (torch.int32, torch.int16, torch.float16)


def test_outliers_of_a_wide_layer() -> None:
    """Columns that 16 bits do not count are stored in 32."""
    dense = torch.zeros(2, 2**15 + 1)
    dense[1, -1] = 0.5
    sparse = Outliers.from_dense(dense)
    assert sparse.column.dtype == torch.int32
    assert torch.equal(sparse.dense(2**15 + 1), dense)
    assert Outliers.from_dense(dense[:, 1:]).column.dtype == torch.int16


def test_dequantized_weight_and_bits() -> None:
    sparse = linear(Grid(3, 4), outliers=True)
    assert sparse.outliers is not None
    scale, zero = sparse.scale.float().repeat_interleave(4, 1), sparse.zero_point.float().repeat_interleave(4, 1)
    expected = (sparse.codes.float() - zero) * scale + sparse.outliers.dense(16)
    assert torch.equal(sparse.dequantize(), expected)
    assert torch.equal(sparse.dequantize(torch.bfloat16), expected.bfloat16())
    stored = 96 * 3 + 24 * 16 + 24 * 3 + 7 * 32 + sparse.outliers.value.numel() * (16 + 16)
    assert sparse.bits_per_weight() == stored / 96
    assert linear(Grid(4, -1, symmetric=True)).bits_per_weight() == (96 * 4 + 6 * 16) / 96  # no zero points stored


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_deploy_gives_a_module_the_deployed_weights(device: str) -> None:
    """On its own device, and there the same bits as on the CPU."""
    block = torch.nn.ModuleDict({"q": torch.nn.Linear(16, 6), "norm": torch.nn.LayerNorm(16, bias=False)}).to(device)
    parts = {"q.bias": torch.ones(6), "norm.weight": torch.zeros(16)}
    result = BlockResult({"q": linear(Grid(3, 4), outliers=True)}, parts)
    load_quantized_weights(block, result)
    assert torch.equal(block["q"].weight.cpu(), result.linears["q"].dequantize())
    assert block["q"].bias.eq(1).all()
    assert block["norm"].weight.eq(0).all()
    assert result.with_summary(seconds=1).summary == {"seconds": 1}


def test_run_directory_keeps_streams_and_records(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RunDir(tmp_path / "run") as folder:
        streams = (torch.randn(2, 4, 8).bfloat16(), torch.randn(2, 4, 8).bfloat16())
        assert folder.load_streams(torch.clone) is None
        folder.save_streams(3, *streams)
        found = folder.load_streams(torch.clone)
        assert found is not None
        assert found[0] == 3
        assert equal(found[1], streams[0])
        assert equal(found[2], streams[1])
        folder.save_record("x.json", {"a": 0.1, "b": None})
        assert folder.load_record("x.json") == {"a": 0.1, "b": None}
        for damage in ('{"a": 0.2, "b": null', '{"a": 0.2, "b": null}', "[]", "1"):
            (tmp_path / "run/x.json").write_text(damage)
            assert folder.load_record("x.json") is None
            assert not (tmp_path / "run/x.json").exists()
            assert "x.json: the checksum does not match its content; removed" in caplog.messages[-1]


def test_unwritable_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"out .* cannot be written: {tmp_path / 'file'} is a file; choose"):
        check_writable(tmp_path / "file/run")
    check_writable(tmp_path / "new/run")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=f"out .* cannot be written: no permission in {tmp_path}; choose"):
        check_writable(tmp_path / "new/run")
