# SPDX-License-Identifier: Apache-2.0
"""Learnable equivalent transformation (LET): the equivalences of one block with learnable parameters.

A ``Transform`` turns the equivalences of a layout into parameters, and ``apply`` rewrites the tensors of the block. The
same function serves training, where it is differentiated, and fusing, where its result is stored. Training therefore
optimises exactly the exported model (the published code has two functions, which differ for OPT).

``theta`` is clamped to +-10, so a scale stays within 4.5e-5 .. 2.2e4: positive and finite, without the published
truncation at 1e-2. The order of the equivalences does not matter, because each is exact for any tensors.

Tensors are promoted to the dtype of the parameters (float32), so that no value is rounded between the learned
parameters and the grid. Fusing a transform into a half-precision block rounds once.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from omniq.kernels.scaled_weight import ScaledWeight, materialize
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.heads import Heads
from omniq.transforms.initial import LIMIT, ChannelRanges
from omniq.transforms.let import check_alpha
from omniq.transforms.transformed_tensors import TransformedTensors


class Transform:
    """The equivalences of one block, ready to learn and to apply.

    Args:
        equivalences: the equivalences to use: all that the layout declares, or a selection.
        heads: the attention heads of the block.
        tensors: the parameters of the block by name; determine shapes and existing biases.
        can_bias: modules without a bias for which the transform may create one.
        shift: learn shifts where they can be stored.

    Attributes:
        equivalences: the equivalences by key: the name of the divided module with ``/`` for ``.``.
        shapes: shapes of the parameters by name, ``<key>/log_scale`` and, with a shift, ``<key>/shift``.
        unshifted: the reason why an equivalence has no shift, by key.
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
        self.equivalences = {each.divided.key: each for each in equivalences}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.unshifted: dict[str, str] = {}
        for key, equivalence in self.equivalences.items():
            shapes = equivalence.shapes(tensors, heads)
            self.shapes[f"{key}/log_scale"] = shapes["log_scale"]
            if not shift or "shift" not in shapes:
                continue
            modules = equivalence.modules
            bare = [name for name in modules if f"{name}.bias" not in tensors and name not in can_bias]
            if bare:
                self.unshifted[key] = f"no shift from {modules[0]}: {', '.join(bare)} cannot store a bias"
            else:
                self.shapes[f"{key}/shift"] = shapes["shift"]

    def parameters(self, values: Mapping[str, Tensor] | None = None) -> nn.ParameterDict:
        """Create the learnable parameters, float32, with these initial values; missing ones are zero (the identity)."""
        given = values or {}
        start = {name: given[name] if name in given else torch.zeros(shape) for name, shape in self.shapes.items()}
        return nn.ParameterDict({name: nn.Parameter(value.detach().float().clone()) for name, value in start.items()})

    def initial(
        self, tensors: Mapping[str, Tensor], ranges: ChannelRanges, alpha: float | None = 0.5, shift: bool = True
    ) -> dict[str, Tensor]:
        """Initial values by SmoothQuant and Outlier Suppression+ (``omniq.transforms.initial``), for ``parameters``.

        Args:
            tensors: the parameters of the block by name.
            ranges: ranges of the inputs of the linears of the block.
            alpha: migration strength: the fraction of the activations' size to move into the weights, 0 to 1; None to
                start scales at one.
            shift: start the shifts of the transform at the middle of the range instead of zero.

        Raises:
            UserError: ``alpha`` is outside 0 to 1.
        """
        check_alpha(alpha)
        values = {}
        for key, equivalence in self.equivalences.items():
            shifted = shift and f"{key}/shift" in self.shapes
            for name, value in equivalence.initial(tensors, ranges, self.heads, alpha, shifted).items():
                values[f"{key}/{name}"] = value
        return values

    def apply(
        self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | nn.ParameterDict
    ) -> dict[str, Tensor]:
        """The tensors of the block after the transform.

        Args:
            tensors: the parameters of the block by name, linears ``[o, i]``; not modified.
            parameters: the parameters by the names in ``shapes``; a shift may be missing.

        Returns:
            every tensor by name, differentiable in the parameters: changed tensors are new, and biases that shifts
            create are added.
        """
        return {name: materialize(value) for name, value in self.apply_factored(tensors, parameters).items()}

    def apply_factored(
        self, tensors: Mapping[str, Tensor], parameters: Mapping[str, Tensor] | nn.ParameterDict
    ) -> dict[str, Tensor | ScaledWeight]:
        """As ``apply``, but the row and column factors of changed weights are kept separate from the weights."""
        linears = [name for equivalence in self.equivalences.values() for name in equivalence.factored]
        transformed = TransformedTensors(tensors, linears, self.heads)
        for key, equivalence in self.equivalences.items():
            scale = parameters[f"{key}/log_scale"].clamp(-LIMIT, LIMIT).exp()
            equivalence.apply(transformed, scale, parameters.get(f"{key}/shift"))
        return transformed.factored()
