# SPDX-License-Identifier: Apache-2.0
"""Learnable equivalent transformation: scales and shifts that move between layers and change nothing.

A family declares where a block allows it; a ``Transform`` turns that into learnable parameters of one block, and
``apply`` rewrites the block's tensors. The same call serves training, where it is differentiated, and fusing, where its
result is stored: what is optimised is what is deployed (the published code has two, and its OPT one differs).

With per-channel scale ``s = exp(theta)`` and shift ``d`` (arXiv 2308.13137, section 3.3):

    norm -> linears     norm.w / s,  norm.b = (norm.b - d) / s;    W diag(s),  b + W d      for every reader
    value -> output     rows of Wv / s,  bv = (bv - d) / s;        Wo diag(s),  bo + Wo d   softmax rows sum to one
    query . key         rows of Wq and bq / s;                     rows of Wk and bk * s
    up -> down          rows of Wu and bu / s;                     Wd diag(s)               a product: act(gate) * up

They hold exactly, not only in the published cases:

- Heads that share a KV head share its parameters: one scale and shift for each KV channel, expanded over its readers.
- Channels that rotary embedding turns as a pair share one scale (``omniq.transforms.heads``).
- Norms of queries and keys would undo a scale of the projection; they take it into their own weight instead. A norm
  over one head is shared by all heads, and so is then the scale.
- A shift needs a bias at both ends. Where the stock module cannot store one (RMSNorm, linears without bias) there is
  none, and ``Transform.unshifted`` says why.

``theta`` is clamped to +-10, so a scale stays within 4.5e-5 .. 2.2e4: positive and finite, without the published
truncation at 1e-2. Down projections are left alone unless asked for (the paper: unstable after the non-linearity).
Order does not matter: each equivalence holds for whatever tensors the others leave.

Tensors are promoted to the dtype of the parameters (float32), so that nothing is rounded between what is learned and
the grid. A transform that is fused into a block in half precision is rounded there, once: initial values before
anything is learned, and what stages without gradients find. Matrices are not multiplied before somebody wants them: a
weight keeps its factors beside it (``omniq.kernels.scaled_weight``) until it is quantized or stored.

Shapes: ``o`` output features, ``i`` input features, ``H`` query heads, ``K`` KV heads, ``c`` channels of a head,
``P`` channels of a head after tying pairs.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from omniq.kernels.scaled_weight import ScaledWeight, materialize
from omniq.transforms.heads import Heads

LIMIT = 10.0  # of |theta|: e^10 = 22026, of the order of the largest half-precision number


@dataclass(frozen=True)
class NormToLinears:
    """A norm whose output only these linears read: its scale can be divided there and multiplied here.

    Args:
        norm: an RMSNorm or LayerNorm with a weight.
        linears: all that read it.
    """

    norm: str
    linears: tuple[str, ...]


@dataclass(frozen=True)
class ValueToOutput:
    """Rows of the value projection against columns of the output projection (softmax rows sum to one)."""

    value: str
    output: str


@dataclass(frozen=True)
class QueryKey:
    """Rows of the query projection against rows of the key projection, within one head.

    Args:
        rotary: how rotary embedding pairs the channels of a head: ``half`` (i with i + d/2), ``interleaved``
            (2i with 2i + 1), or None where there is none. Paired channels must share one scale.
        query_norm, key_norm: norms between projection and rotary embedding, if the family has them; they take the
            scale in place of the projections' rows.
    """

    query: str
    key: str
    rotary: str | None = "half"
    query_norm: str | None = None
    key_norm: str | None = None


@dataclass(frozen=True)
class UpToDown:
    """Rows of the up projection against columns of the down projection of a gated MLP, ``down(act(gate) * up)``.

    Exact because nothing but a product lies between them. Not so where an activation does (``fc1``, ``fc2``).
    """

    up: str
    down: str


Equivalence = NormToLinears | ValueToOutput | QueryKey | UpToDown


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
        self.moves = {modules_of(each)[0].replace(".", "/"): each for each in equivalences}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unshifted: dict[str, str] = {}
        for key, move in self.moves.items():
            shape = self.shapes[f"{key}/log_scale"] = self._shape(move, tensors)
            if isinstance(move, QueryKey | UpToDown) or not shift:
                continue
            bare = [name for name in modules_of(move) if f"{name}.bias" not in tensors and name not in can_bias]
            if bare:
                self.unshifted[key] = f"no shift from {modules_of(move)[0]}: {', '.join(bare)} cannot store a bias"
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
        return {name: materialize(value) for name, value in self.move(tensors, parameters).items()}

    def move(
        self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | nn.ParameterDict
    ) -> dict[str, Tensor | ScaledWeight]:
        """As ``apply``, but weights of linears that moved are given with the factors of their rows and columns."""
        moved = _Moving(tensors, [name for move in self.moves.values() for name in _linears(move)])
        for key, move in self.moves.items():
            scale = parameters[f"{key}/log_scale"].clamp(-LIMIT, LIMIT).exp()
            shift = parameters.get(f"{key}/shift")
            match move:
                case NormToLinears():
                    moved.divide(move.norm, scale, shift)
                    for linear in move.linears:
                        moved.multiply_inputs(linear, scale, shift)
                case ValueToOutput():
                    moved.divide(move.value, scale, shift)
                    shift = None if shift is None else self.heads.to_query(shift)
                    moved.multiply_inputs(move.output, self.heads.to_query(scale), shift)
                case QueryKey():
                    channels = tensors[f"{move.key}.weight"].shape[0] // self.heads.key
                    self._move_query_key(moved, move, scale, channels)
                case UpToDown():
                    moved.divide(move.up, scale)
                    moved.multiply_inputs(move.down, scale, None)
        return moved.plain | {f"{name}.weight": weight for name, weight in moved.weights.items()}

    def _shape(self, move: Equivalence, tensors: Mapping[str, Tensor]) -> tuple[int, ...]:
        """``[i]``, ``[K c]``, ``[K, P]``, or ``[P]`` where a norm of one head is shared by all."""
        if not isinstance(move, QueryKey):
            return (tensors[f"{modules_of(move)[0]}.weight"].shape[0],)
        channels = tensors[f"{move.key}.weight"].shape[0] // self.heads.key
        tied = int(self.heads.tied_channels(channels, move.rotary).max()) + 1
        norms = [tensors[f"{norm}.weight"] for norm in (move.query_norm, move.key_norm) if norm is not None]
        return (tied,) if any(norm.numel() == channels for norm in norms) else (self.heads.key, tied)

    def _move_query_key(self, moved: "_Moving", move: QueryKey, scale: Tensor, channels: int) -> None:
        """Divide the queries, multiply the keys: rows of the projections, or the weights of norms after them."""
        where = (channels, move.rotary, scale.device)
        if where not in self._tied:  # kept on the device: a copy from the host cannot be captured in a CUDA graph
            self._tied[where] = self.heads.tied_channels(channels, move.rotary).to(scale.device)
        tied = self._tied[where]
        on_keys = scale.index_select(-1, tied).expand(self.heads.key, -1).flatten()  # [K c]
        on_queries = self.heads.to_query(on_keys)  # [H c]
        ends = ((move.query, on_queries, move.query_norm), (move.key, 1 / on_keys, move.key_norm))
        for name, divisor, norm in ends:
            if norm is None:
                moved.divide(name, divisor)
                continue
            weight = moved.plain[f"{norm}.weight"]
            # A norm over one head sees the same scale in every head; take the first. Others are [H c] or [H, c].
            divisor = divisor[:channels] if weight.numel() == channels else divisor
            moved.divide(norm, divisor.reshape(weight.shape))


class _Moving:
    """A block's tensors on their way: weights of linears collect factors, all others are rewritten.

    Args:
        tensors: by name.
        linears: those whose weights get factors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], linears: Collection[str]) -> None:
        self.plain = dict(tensors)
        self.weights = {name: ScaledWeight(self.plain.pop(f"{name}.weight")) for name in dict.fromkeys(linears)}

    def divide(self, name: str, scale: Tensor, shift: Tensor | None = None) -> None:
        """The module's output less ``shift``, over ``scale``: rows of a linear, or the weight of a norm."""
        if name in self.weights:
            self.weights[name] = self.weights[name].times_rows(1 / scale)
        else:
            self.plain[f"{name}.weight"] = self.plain[f"{name}.weight"] / scale
        bias = self.plain.get(f"{name}.bias")
        if shift is not None:
            bias = -shift if bias is None else bias - shift
        if bias is not None:
            self.plain[f"{name}.bias"] = bias / scale

    def multiply_inputs(self, name: str, scale: Tensor, shift: Tensor | None) -> None:
        """Make up for inputs of a linear that lost ``shift`` and were divided by ``scale``, both ``[i]``."""
        if shift is not None:
            lost = self.weights[name].product(shift)
            self.plain[f"{name}.bias"] = self.plain[f"{name}.bias"] + lost if f"{name}.bias" in self.plain else lost
        self.weights[name] = self.weights[name].times_columns(scale)


def modules_of(move: Equivalence) -> tuple[str, ...]:
    """Every module that an equivalence touches, the one that is divided first."""
    match move:
        case NormToLinears(norm, linears):
            return (norm, *linears)
        case ValueToOutput(value, output):
            return (value, output)
        case QueryKey(query, key):
            return (query, key)
        case UpToDown(up, down):
            return (up, down)


def _linears(move: Equivalence) -> tuple[str, ...]:
    """Those of these modules that are linears whose rows or columns get a factor."""
    match move:
        case NormToLinears():
            return move.linears
        case QueryKey():
            sides = ((move.query, move.query_norm), (move.key, move.key_norm))
            return tuple(name for name, norm in sides if norm is None)
        case _:
            return modules_of(move)
