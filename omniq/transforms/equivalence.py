# SPDX-License-Identifier: Apache-2.0
"""Learnable equivalent transformation: scales and shifts that move between layers and change nothing.

A family declares where a block allows it; a ``Transform`` turns that into learnable parameters of one block, and
``apply`` rewrites the block's tensors. The same call serves training, where it is differentiated, and fusing, where its
result is stored: what is optimised is what is deployed (the published code has two, and its OPT one differs).

With per-channel scale ``s = exp(theta)`` and shift ``d`` (arXiv 2308.13137, section 3.3):

    norm -> linears     norm.w / s,  norm.b = (norm.b - d) / s;    W diag(s),  b + W d      for every reader
    value -> output     rows of Wv / s,  bv = (bv - d) / s;        Wo diag(s),  bo + Wo d   softmax rows sum to one
    query . key         rows of Wq and bq / s;                     rows of Wk and bk * s

They hold exactly, not only in the published cases:

- Heads that share a KV head share its parameters: one scale and shift for each KV channel, expanded over its readers.
- Channels that rotary embedding turns as a pair share one scale (``omniq.transforms.heads``).
- Norms of queries and keys would undo a scale of the projection; they take it into their own weight instead. A norm
  over one head is shared by all heads, and so is then the scale.
- A norm that adds an offset to its weight (Gemma: ``1 + w``) has it added before the division and taken off after.
- A shift needs a bias at both ends. Where the stock module cannot store one (RMSNorm, linears without bias) there is
  none, and ``Transform.unshifted`` says why.

``theta`` is clamped to +-10, so a scale stays within 4.5e-5 .. 2.2e4: positive and finite, without the published
truncation at 1e-2. Down projections are left alone (the paper: unstable after the non-linearity). Order does not
matter: each equivalence holds for whatever tensors the others leave.

Tensors are promoted to the dtype of the parameters (float32): nothing is rounded between transform and grid.

Shapes: ``o`` output features, ``i`` input features, ``H`` query heads, ``K`` KV heads, ``c`` channels of a head,
``P`` channels of a head after tying pairs.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from omniq.models.family import Equivalence, NormToLinears, QueryKey, ValueToOutput
from omniq.transforms.heads import Heads

LIMIT = 10.0  # of |theta|: e^10 = 22026, of the order of the largest half-precision number


class Transform:
    """The equivalences of one block, ready to learn and to apply.

    Args:
        equivalences: those to use: all the family declares, or a selection.
        heads: of the block's attention.
        tensors: the block's parameters by name, for their shapes and for which biases exist.
        can_bias: modules without a bias for which one may be created (then new among the tensors).
        shift: learn shifts where they can be stored.

    Attributes:
        moves: the equivalences by key: the first module of each, ``/`` for ``.``.
        shapes: of the parameters by name, ``<key>/log_scale`` and, where there is one, ``<key>/shift``.
        unshifted: why an equivalence has no shift, by key.
    """

    def __init__(
        self,
        equivalences: Sequence[Equivalence],
        heads: Heads,
        tensors: Mapping[str, Tensor],
        can_bias: Collection[str] = (),
        shift: bool = True,
    ) -> None:
        self.heads = heads
        self._tied: dict[tuple[int, str | None, torch.device], Tensor] = {}
        self.moves = {ends(each)[0].replace(".", "/"): each for each in equivalences}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unshifted: dict[str, str] = {}
        for key, move in self.moves.items():
            shape = self.shapes[f"{key}/log_scale"] = self._shape(move, tensors)
            if isinstance(move, QueryKey) or not shift:
                continue
            bare = [name for name in ends(move) if f"{name}.bias" not in tensors and name not in can_bias]
            if bare:
                self.unshifted[key] = f"no shift from {ends(move)[0]}: {', '.join(bare)} cannot store a bias"
            else:
                self.shapes[f"{key}/shift"] = shape

    def parameters(self, values: Mapping[str, Tensor] | None = None) -> nn.ParameterDict:
        """Learnable parameters, float32: these initial values, and zero, the identity, where there are none."""
        given = values or {}
        start = {name: given[name] if name in given else torch.zeros(shape) for name, shape in self.shapes.items()}
        return nn.ParameterDict({name: nn.Parameter(value.detach().float().clone()) for name, value in start.items()})

    def apply(
        self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | nn.ParameterDict
    ) -> dict[str, Tensor]:
        """The block's tensors after the transform.

        Args:
            tensors: the block's parameters by name, linears ``[o, i]``; not changed.
            parameters: by the names of ``shapes``; differentiable in them. A shift may be missing.

        Returns:
            every tensor by name: those that moved are new, and biases that shifts create are added.
        """
        moved = dict(tensors)
        for key, move in self.moves.items():
            scale = parameters[f"{key}/log_scale"].clamp(-LIMIT, LIMIT).exp()
            shift = parameters.get(f"{key}/shift")
            match move:
                case NormToLinears():
                    _divide(moved, move.norm, scale, shift, move.offset)
                    for linear in move.linears:
                        _multiply_inputs(moved, linear, scale, shift)
                case ValueToOutput():
                    _divide(moved, move.value, scale, shift)
                    shift = None if shift is None else self.heads.to_query(shift)
                    _multiply_inputs(moved, move.output, self.heads.to_query(scale), shift)
                case QueryKey():
                    self._move_query_key(moved, move, scale)
        return moved

    def _shape(self, move: Equivalence, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``[i]``, ``[K c]``, ``[K, P]``, or ``[P]`` where a norm of one head is shared by all."""
        if not isinstance(move, QueryKey):
            return (tensors[f"{ends(move)[0]}.weight"].shape[0],)
        channels = tensors[f"{move.key}.weight"].shape[0] // self.heads.key
        tied = int(self.heads.tied_channels(channels, move.rotary).max()) + 1
        norms = [tensors[f"{norm}.weight"] for norm in (move.query_norm, move.key_norm) if norm is not None]
        return (tied,) if any(norm.numel() == channels for norm in norms) else (self.heads.key, tied)

    def _move_query_key(self, tensors: dict[str, Tensor], move: QueryKey, scale: Tensor) -> None:
        """Divide the queries, multiply the keys: rows of the projections, or the weights of norms after them."""
        channels = tensors[f"{move.key}.weight"].shape[0] // self.heads.key
        where = (channels, move.rotary, scale.device)
        if where not in self._tied:  # kept on the device: a copy from the host cannot be captured in a CUDA graph
            self._tied[where] = self.heads.tied_channels(channels, move.rotary).to(scale.device)
        tied = self._tied[where]
        on_keys = scale.index_select(-1, tied).expand(self.heads.key, -1).flatten()  # [K c]
        on_queries = self.heads.to_query(on_keys)  # [H c]
        ends = (
            (move.query_norm or move.query, on_queries, move.query_norm),
            (move.key_norm or move.key, 1 / on_keys, move.key_norm),
        )
        for name, divisor, norm in ends:
            weight = tensors[f"{name}.weight"]
            # A norm over one head sees the same scale in every head; take the first. Others are [H c] or [H, c].
            divisor = divisor[:channels] if norm is not None and weight.numel() == channels else divisor
            shape = weight.shape if norm is not None else (-1,)
            _divide(tensors, name, divisor.reshape(shape), offset=move.norm_offset if norm is not None else 0.0)


def ends(move: Equivalence) -> tuple[str, ...]:
    """Every module that an equivalence touches, the one that is divided first."""
    match move:
        case NormToLinears(norm, linears):
            return (norm, *linears)
        case ValueToOutput(value, output):
            return (value, output)
        case QueryKey(query, key):
            return (query, key)


def _divide(
    tensors: dict[str, Tensor], name: str, scale: Tensor, shift: Tensor | None = None, offset: float = 0.0
) -> None:
    """The module's output less ``shift``, over ``scale``: rows of a linear ``[o, i]``, or the weight of a norm."""
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    rows = scale.unsqueeze(-1) if weight.dim() > scale.dim() else scale
    tensors[f"{name}.weight"] = (weight + offset) / rows - offset if offset else weight / rows
    if shift is not None:
        bias = -shift if bias is None else bias - shift
    if bias is not None:
        tensors[f"{name}.bias"] = bias / scale


def _multiply_inputs(tensors: dict[str, Tensor], name: str, scale: Tensor, shift: Tensor | None) -> None:
    """A linear that computes the same from inputs that lost ``shift`` and were divided by ``scale``, both ``[i]``."""
    weight = tensors[f"{name}.weight"]
    if shift is not None:
        with torch.autocast(weight.device.type, enabled=False):  # which would compute this product in half precision
            lost = weight.to(shift.dtype) @ shift
        tensors[f"{name}.bias"] = tensors[f"{name}.bias"] + lost if f"{name}.bias" in tensors else lost
    tensors[f"{name}.weight"] = weight * scale
