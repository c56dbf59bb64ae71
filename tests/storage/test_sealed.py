# SPDX-License-Identifier: Apache-2.0
"""Sealed files: they are read back equal, and belong to one place of one run."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.errors import CorruptFile
from omniq.storage.sealed import Owner, load_state, load_tensors, save_state, save_tensors

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
def test_save_tensors_are_loaded_back(tmp_path: Path, content: dict[str, Tensor], head: dict[str, str]) -> None:
    content.pop("__metadata__", None)  # a name that safetensors keeps for itself
    head.pop("sha256", None)
    save_tensors(tmp_path / "file", content, head)
    found, found_head = load_tensors(tmp_path / "file")
    assert found_head == head
    assert found.keys() == content.keys()
    assert all(equal(found[name], content[name]) for name in content)


def test_load_of_garbage_is_refused_by_name(tmp_path: Path) -> None:
    for content in (b"", b"x", b"\0" * 100, os.urandom(200)):
        (tmp_path / "file").write_bytes(content)
        with pytest.raises(CorruptFile, match=str(tmp_path / "file")):
            load_tensors(tmp_path / "file")
        with pytest.raises(CorruptFile, match=str(tmp_path / "file")):
            load_state(tmp_path / "file")


def test_save_state_is_loaded_back(tmp_path: Path) -> None:
    state = {"tensor": torch.randn(3), "numbers": [1, 2.5, None, True], "nested": {"a": ("b", torch.float16)}}
    save_state(tmp_path / "state", state)
    found = load_state(tmp_path / "state")
    assert torch.equal(found.pop("tensor"), state.pop("tensor"))
    assert found == state


def test_load_state_with_objects_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"object": SimpleNamespace(a=1)})
    with pytest.raises(CorruptFile, match="state: it holds objects that cannot be read back safely"):
        load_state(tmp_path / "state")


@pytest.mark.parametrize(("found", "strict", "accepted"), [("a", True, True), ("b", False, False), ("", False, True)])
def test_owner_accepts_own_and_old_files_only(found: str, strict: bool, accepted: bool) -> None:
    assert Owner("a", strict).accepts(found) == accepted
    assert not Owner("a", strict=True).accepts("")


def test_load_state_of_another_place_is_refused(tmp_path: Path) -> None:
    save_state(tmp_path / "state", {"x": 1}, Owner("run/current/000.0.block", strict=True))
    assert load_state(tmp_path / "state", owner=Owner("run/current/000.0.block", strict=True)) == {"x": 1}
    for name in ("run/current/001.0.block", "other/current/000.0.block"):
        with pytest.raises(CorruptFile, match="state: the checksum does not match its content, its run"):
            load_state(tmp_path / "state", owner=Owner(name, strict=True))
