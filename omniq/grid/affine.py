# SPDX-License-Identifier: Apache-2.0
"""The uniform affine grid: the only place in omniq where a weight is rounded to an integer.

For a group of weights with range ``[lo, hi]``, ``b`` bits and ``L = 2^b - 1``:

    s = (hi - lo) / L            scale, rounded to its storage dtype before any other use
    z = round(-lo / s)           zero point, an integer in [0, L]
    q = clamp(round(w / s) + z, 0, L)          codes
    w^ = (q - z) * s

Rounding is half to even. The range always includes zero, so zero is representable and ``0 <= z <= L`` holds by
construction; every common format can store the result. A symmetric grid fixes ``z = 2^(b-1)`` and uses
``s = 2 max|w| / L`` (the convention of GPTQ and compressed-tensors).

Some runtimes cannot hold every zero point. For ``z >= 1``, the range is first widened to ``lo <= -hi / (L - 1)``, and
for ``z <= L - 1`` to ``hi >= -lo / (L - 1)``. So the grid still covers the range, and a group of weights of one sign
loses one code.

Scales are storage-rounded *before* codes are chosen, so ``(q - z) * s`` is bit for bit the value that a runtime
computes. A stage may restrict scales and zero points further, to a few levels: ``omniq.grid.quantized_scales``.

Shapes: ``o`` output features, ``i`` input features, ``G`` groups in a row, ``g`` group size (``i = G g``).
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import frexp, gcd

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.grid.name import ScaleBits, ZeroPoints, check_weights
from omniq.grid.quantized_scales import QuantizedScales


@dataclass(frozen=True)
class Grid:
    """A uniform affine grid for the weights of a linear.

    Args:
        bits: bits of a code, 2 to 8.
        group_size: number of inputs that share one scale and zero point; -1 for one group per output channel.
        symmetric: fix the zero point in the middle of the code range.
        scale_dtype: the dtype in which scales are stored and exported.
        second: how scales and zero points are stored as codes; None if they are not.
        zero_points: the zero points that ``fit`` may choose on an asymmetric grid. Like ``scale_bits``, this limits the
            choice and not the meaning of codes, so grids that differ only in these two are equal.
        scale_bits: significant bits of scales; None for all bits of their dtype.

    Raises:
        UserError: ``bits`` is outside 2 to 8, the group size is neither -1 nor positive, or codes of zero points would
            take as much space as the zero points.
    """

    bits: int
    group_size: int = -1
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16
    second: QuantizedScales | None = None
    zero_points: ZeroPoints = field(default="any", compare=False, repr=False)
    scale_bits: ScaleBits | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_weights(self.bits, self.group_size)
        if self.second is not None and self.second.zero_bits and (self.symmetric or self.second.zero_bits >= self.bits):
            kind = "of a symmetric grid" if self.symmetric else f"of {self.bits} bits"
            raise UserError(f"zero_bits {self.second.zero_bits} saves no space for zero points {kind}: set it to 0")

    @property
    def max_code(self) -> int:
        """The largest code, ``L = 2^b - 1``."""
        return 2**self.bits - 1

    def groups(self, width: int) -> int:
        """Number of groups in a row of ``width`` inputs."""
        return 1 if self.group_size == -1 else width // self.group_size

    def check_width(self, width: int, name: str, others: Iterable[int] = ()) -> None:
        """Refuse a layer whose inputs do not divide into groups.

        Args:
            width: number of inputs of the layer.
            name: name of the layer, for the message.
            others: widths of the other layers on this grid; a suggested group size must divide them too.

        Raises:
            UserError: names the layer, its width and the group sizes that divide it.
        """
        if self.group_size != -1 and width % self.group_size:
            common = gcd(width, *others)
            fitting = [size for size in range(16, common + 1, 16) if common % size == 0]
            every = ", which divide the inputs of all layers," if common < width else ","
            choices = f"{', '.join(map(str, fitting))}{every} or " if fitting else ""
            raise UserError(
                f"group size {self.group_size} does not divide the {width} inputs of {name}: use {choices}-1 for "
                "per-channel scales"
            )

    def split(self, weight: Tensor) -> Tensor:
        """View ``[o, i]`` as ``[o, G, g]``."""
        return weight.unflatten(-1, (self.groups(weight.shape[-1]), -1))

    def expand(self, per_group: Tensor, width: int) -> Tensor:
        """Repeat the value of each group, ``[o, G]``, over the inputs of the group, ``[o, i]``."""
        return per_group.repeat_interleave(width // per_group.shape[-1], dim=-1)

    def range(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of each group, zero included: two ``[o, G]`` tensors, ``lo <= 0 <= hi``."""
        split = self.split(weight)  # not aminmax, which has no derivative before torch 2.13
        return split.amin(dim=-1).clamp(max=0), split.amax(dim=-1).clamp(min=0)

    def fit(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Compute scale and zero point of the grid that covers ``[lo, hi]``.

        Args:
            lo, hi: range of each group, ``[o, G]``; extended to include zero if necessary.

        Returns:
            scale ``[o, G]``, in the dtype of the inputs, with values that the storage dtype represents exactly; and
            zero point ``[o, G]``, integers in ``[0, L]`` in the dtype of the inputs.
        """
        lo, hi = self.widened(lo.clamp(max=0), hi.clamp(min=0))
        if self.symmetric:
            scale = self.store(2 * torch.maximum(-lo, hi) / self.max_code)
            return scale, torch.full_like(scale, 2 ** (self.bits - 1))
        scale = self.store((hi - lo) / self.max_code)
        return scale, (-lo / scale).round().clamp(*self.zero_range)

    @property
    def zero_range(self) -> tuple[int, int]:
        """Smallest and largest zero point of an asymmetric grid."""
        return int(self.zero_points != "any"), self.max_code - int(self.zero_points == "inner")

    def widened(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest range that contains ``[lo, hi]``, ``lo <= 0 <= hi``, and has a permitted zero point."""
        least, most = self.zero_range
        if self.symmetric or (least, most) == (0, self.max_code):
            return lo, hi
        # both sides by the given range: only one of them can be too short
        return (
            torch.minimum(lo, -hi * (least / (self.max_code - least))),
            torch.maximum(hi, -lo * ((self.max_code - most) / most)),
        )

    def store(self, scale: Tensor) -> Tensor:
        """Round a scale to its storage dtype, but never to zero or infinity; the tensor keeps its own dtype.

        With ``scale_bits``, the scale is rounded to that many significant bits first, half to even.
        """
        info = torch.finfo(self.scale_dtype)
        smallest, largest = info.tiny * info.eps, info.max  # the smallest positive number, a subnormal
        if self.scale_bits is not None:
            mantissa, exponent = torch.frexp(scale)  # scale = mantissa 2^exponent, 1/2 <= mantissa < 1
            scale = torch.ldexp(
                torch.ldexp(mantissa, torch.tensor(self.scale_bits)).round(), exponent - self.scale_bits
            )
            largest = (1 - 2.0**-self.scale_bits) * 2.0 ** frexp(info.max)[1]
        return scale.to(self.scale_dtype).to(scale.dtype).clamp(smallest, largest)

    def quantize(self, weight: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Round weights to the nearest codes.

        Args:
            weight: ``[o, i]``.
            scale, zero_point: ``[o, G]``.

        Returns:
            uint8 codes ``[o, i]`` in ``[0, L]``.
        """
        s, z = scale.unsqueeze(-1), zero_point.unsqueeze(-1)  # [o, G, 1]
        codes = (self.split(weight.to(s.dtype)) / s).round() + z
        return codes.clamp(0, self.max_code).flatten(-2).to(torch.uint8)

    def dequantize(self, codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Compute weights ``(q - z) * s``, ``[o, i]``, in the dtype of ``scale``."""
        s, z = scale.unsqueeze(-1), zero_point.unsqueeze(-1).to(scale.dtype)
        return ((self.split(codes.to(scale.dtype)) - z) * s).flatten(-2)


@torch.no_grad()
def rounded_to_nearest(weight: Tensor, grid: Grid) -> Tensor:
    """Round a float32 weight ``[o, i]`` to its min-max grid and dequantize it; bit for bit the exported values."""
    scale, zero_point = grid.fit(*grid.range(weight))
    return grid.dequantize(grid.quantize(weight, scale, zero_point), scale, zero_point)
