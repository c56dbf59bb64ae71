# SPDX-License-Identifier: Apache-2.0
"""Integer codes as a dense bitstream in int32 words, in the layout of compressed-tensors (0.18 and later).

Along the packed dimension, element ``k`` of ``b`` bits occupies bits ``[b k, b k + b)`` of one little-endian stream.
The stream is cut into 32-bit words, and its end is filled with zeros:

    8 codes of b bits  =  b bytes  ->  word w holds bytes 4w .. 4w + 3, the lowest byte first

Codes may straddle words (b = 3, 5, 6, 7). For b = 2, 4, 8 this is the familiar layout of 32 / b codes per word.

Eight codes always fill exactly ``b`` bytes. Therefore shifts gather eight codes into one 64-bit integer, whose low
``b`` bytes are kept. This takes a few vectorised operations for every width, without a table of straddling positions.
Rows are processed in chunks, so the working memory stays at a few megabytes in addition to input and output.

Hosts must be little-endian, as are all for which PyTorch publishes wheels.

Shapes: ``o`` rows, ``i`` elements of a row, ``w = ceil(i b / 32)`` words of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 2**20  # codes per chunk: 1 MiB of codes and 1 MiB of 64-bit integers, which fit in the cache of a core
_EIGHT = 8  # codes per 64-bit integer


def words(length: int, bits: int) -> int:
    """Number of words for ``length`` codes of ``bits`` bits."""
    return -(-length * bits // 32)


def pack(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack codes into words along a dimension.

    Args:
        codes: uint8 ``[o, i]``, each in ``[0, 2^bits - 1]``.
        bits: width of a code, 2 to 8.
        dim: the dimension to pack: 1, or 0 for columns.

    Returns:
        int32 ``[o, w]``, or ``[w, i]`` with ``w = ceil(o b / 32)`` for ``dim=0``.

    Raises:
        ValueError: a code is too large, or ``bits`` or the dtype is not as above.
    """
    _check(bits, codes, torch.uint8)
    if dim == 0:
        return pack(codes.t().contiguous(), bits).t().contiguous()
    if bits < 8 and codes.numel() and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit into {bits} bits")
    rows, length = codes.shape
    out = torch.empty(rows, words(length, bits), dtype=torch.int32, device=codes.device)
    for chunk in _chunks(rows, length):
        out[chunk] = _pack_rows(codes[chunk], bits)
    return out


def unpack(packed: Tensor, bits: int, length: int, dim: int = 1) -> Tensor:
    """Invert ``pack``.

    Args:
        packed: int32 ``[o, w]``, or ``[w, i]`` for ``dim=0``.
        bits: width of a code, 2 to 8.
        length: number of codes along the packed dimension.
        dim: the dimension that was packed.

    Returns:
        uint8 ``[o, length]``, or ``[length, i]`` for ``dim=0``.

    Raises:
        ValueError: the number of words does not match ``length``, or ``bits`` or the dtype is not as above.
    """
    _check(bits, packed, torch.int32)
    if dim == 0:
        return unpack(packed.t().contiguous(), bits, length).t().contiguous()
    rows, found = packed.shape
    if found != words(length, bits):
        raise ValueError(f"{length} codes of {bits} bits take {words(length, bits)} words, but the tensor has {found}")
    out = torch.empty(rows, length, dtype=torch.uint8, device=packed.device)
    for chunk in _chunks(rows, length):
        out[chunk] = _unpack_rows(packed[chunk], bits, length)
    return out


def _check(bits: int, tensor: Tensor, dtype: torch.dtype) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"codes of {bits} bits cannot be packed: use 2 to 8 bits")
    if tensor.dtype != dtype or tensor.dim() != 2:
        raise ValueError(f"expected a {dtype} matrix, got {tensor.dtype} with {tensor.dim()} dimensions")


def _chunks(rows: int, length: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, length))
    return [slice(start, start + step) for start in range(0, rows, step)]


def _pack_rows(codes: Tensor, bits: int) -> Tensor:
    rows, length = codes.shape
    octets = F.pad(codes, (0, -length % _EIGHT)).view(rows, -(-length // _EIGHT), _EIGHT)
    stream = octets[..., 0].long()
    for position in range(1, _EIGHT):
        stream |= octets[..., position].long() << (bits * position)
    # [o, octets] int64 -> the low `bits` bytes of each -> whole words
    data = stream.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(1)
    size = 4 * words(length, bits)  # bytes
    # NOTE: flattened for the view, because a one-row matrix may be contiguous but have strides that a view refuses
    return F.pad(data, (0, size - data.shape[1])).flatten().view(torch.int32).view(rows, size // 4)


def _unpack_rows(packed: Tensor, bits: int, length: int) -> Tensor:
    rows, octets = packed.shape[0], -(-length // _EIGHT)
    data = packed.contiguous().flatten().view(torch.uint8).view(rows, 4 * packed.shape[1])
    data = F.pad(data, (0, octets * bits - data.shape[1])).reshape(rows, octets, bits)
    stream = F.pad(data, (0, _EIGHT - bits)).view(torch.int64).squeeze(-1)  # [o, octets]
    mask = 2**bits - 1
    codes = torch.empty(rows, octets, _EIGHT, dtype=torch.uint8, device=packed.device)
    for position in range(_EIGHT):
        codes[..., position] = (stream >> (bits * position)) & mask
    return codes.flatten(1)[:, :length]
