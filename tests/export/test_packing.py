# SPDX-License-Identifier: Apache-2.0
"""Dense bitstreams equal integers of arbitrary size and those of compressed-tensors, and are unpacked again."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from omniq.export.formats import packing
from omniq.export.formats.packing import pack, unpack, words

BITS = st.integers(2, 8)
SIZES = st.integers(1, 70)  # a few times the 32 codes after which every width comes out at whole words


def random_codes(rows: int, length: int, bits: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (rows, length), generator=generator, dtype=torch.uint8)


def reference(row: list[int], bits: int) -> list[int]:
    """One row as one big integer, cut into signed 32-bit words."""
    stream = sum(code << (bits * position) for position, code in enumerate(row))
    cut = [(stream >> (32 * word)) & 0xFFFFFFFF for word in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in cut]


@settings(max_examples=60, deadline=None)
@given(BITS, SIZES, SIZES, st.integers(0, 99))
def test_pack_equals_one_big_integer_and_unpacks(bits: int, rows: int, length: int, seed: int) -> None:
    codes = random_codes(rows, length, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.shape == (rows, words(length, bits))
    assert packed.tolist() == [reference(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(packed, bits, length), codes)


@settings(max_examples=40, deadline=None)
@given(BITS, SIZES, SIZES, st.sampled_from([0, 1]))
def test_pack_equals_compressed_tensors(bits: int, rows: int, length: int, dim: int) -> None:
    codes = random_codes(rows, length, bits, seed=rows)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    packed = pack(codes, bits, dim)
    assert torch.equal(packed, pack_to_int32(signed, bits, dim))
    theirs = unpack_from_int32(packed, bits, codes.shape, dim)
    assert torch.equal(theirs.to(torch.int16) + 2 ** (bits - 1), codes.to(torch.int16))
    assert torch.equal(unpack(packed, bits, codes.shape[dim], dim), codes)


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_pack_in_chunks_of_rows_gives_same_words(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(37, 50, bits, seed=1)
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK", 128)  # two rows at a time
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, 50), codes)


def test_pack_all_ones_fills_sign_bit() -> None:
    codes = torch.full((1, 32), 255, dtype=torch.uint8)
    assert pack(codes, 8).tolist() == [[-1] * 8]
    assert torch.equal(unpack(pack(codes, 8), 8, 32), codes)


def test_pack_without_codes_is_empty() -> None:
    assert unpack(pack(torch.empty(3, 0, dtype=torch.uint8), 3), 3, 0).shape == (3, 0)


def test_pack_codes_that_would_be_lost_are_refused() -> None:
    codes = torch.tensor([[0, 8]], dtype=torch.uint8)
    with pytest.raises(ValueError, match="code 8 does not fit into 3 bits"):
        pack(codes, 3)
    with pytest.raises(ValueError, match="codes of 9 bits cannot be packed"):
        pack(codes, 9)
    with pytest.raises(ValueError, match=r"expected a torch\.uint8 matrix, got torch\.int64"):
        pack(codes.long(), 4)
    with pytest.raises(ValueError, match="33 codes of 4 bits take 5 words, but the tensor has 1"):
        unpack(pack(codes, 4), 4, 33)
