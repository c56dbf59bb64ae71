# SPDX-License-Identifier: Apache-2.0
"""OmniQuant (arXiv 2308.13137): learn clipping and transform of a block against the block's own output.

For a block ``F`` with weights ``W`` and inputs ``X`` (the quantized stream), equation 1 of the paper:

    minimise over clipping and transform   || F(W, X_fp) - F(Q(T(W); clipping), X) ||^2        (mean over all elements)

1. ``T`` moves scales and shifts between norms, activations and weights (LET, section 3.3) without changing the
   full-precision output of ``F``. Its initial values are fused into the block first.
2. The clipping learns the range of each group of weights (LWC, section 3.2).
3. Each batch is one AdamW step (``omniq.calibration.reconstruction``). Where the scheme has activation bits, the
   quantized block computes on quantized inputs, queries, keys and values, in training as in the exported model.
4. After the last step, ``T`` is fused into the block and the weights are rounded.

The paper's scripts use batches of one sample, 20 epochs (40 at 2 bits), rate 1e-2, no weight decay, a constant rate,
natural order, and the augmented loss at 2 bits and for W4A4 of the first LLaMA.

Deviations from the published code: zero points stay inside the code range. The last rounding is done in float32 on
storage-rounded scales. The clipping can start from a searched range. Cosine decay of the rate and token-relative errors
are available. The transform is exact (``omniq.transforms.transform``), learned as ``exp(theta)``, with shifts for every
family.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from omniq.calibration.fuse import block_transform, check_equivalences, fuse, input_ranges
from omniq.calibration.reconstruction import Reconstruction, ReconstructionModule, Schedule, module_key
from omniq.calibration.second_moments import second_moments_for
from omniq.calibration.stage import Part
from omniq.calibration.task import BlockTask
from omniq.calibration.token_weights import TokenWeights
from omniq.errors import UserError
from omniq.grid.scheme import Activations
from omniq.kernels.scaled_weight import ScaledWeight, materialize
from omniq.models.layout import Layout
from omniq.quantizers.clipping import LWC, Clipping, FakeQuantWeight, RangeEstimator
from omniq.storage.block_result import BlockResult, QuantizedLinear
from omniq.transforms.let import LET, warn_once, worth_learning
from omniq.transforms.transform import Transform


class OmniQuant(Reconstruction):
    """Learned clipping and transform by block-wise reconstruction.

    Args:
        epochs: passes over the samples for each block.
        batch_size: samples per step and process (1 in the paper).
        clipping: how to choose the range of each group: learned by LWC, PACT or LSQ, or fixed by MinMax or Searched.
        clipping_lr: AdamW learning rate of the clipping (published code: 1e-2; the paper's text swaps it with LET's).
        transform: settings of LET, which learns scales and shifts; by default no transform (as published for
            weight-only LLaMA).
        augmented_loss: add the distance to the output of the full-precision block on the quantized stream (published
            for 2 bits, and for W4A4 of the first LLaMA).
        schedule: ``constant`` (published), or ``cosine`` to decay the learning rate to zero over the block.
        shuffle: draw a new order of the samples for each epoch; off as published.
        token_weights: the weight of each token in the loss and in the search of a range; ``uniform`` as published.

    Raises:
        UserError: a learning rate is outside 0 to 1, or nothing can be learned; see ``Reconstruction``.
    """

    def __init__(
        self,
        epochs: int = 20,
        batch_size: int = 1,
        clipping: LWC | Clipping | None = None,
        clipping_lr: float = 1e-2,
        transform: LET | None = None,
        augmented_loss: bool = False,
        schedule: Schedule = "constant",
        shuffle: bool = False,
        token_weights: TokenWeights = "uniform",
    ) -> None:
        super().__init__(epochs, batch_size, augmented_loss, schedule, shuffle, token_weights)
        self.clipping = clipping or LWC()
        self.clipping_lr, self.transform = clipping_lr, transform
        if not 0 < clipping_lr < 1:
            raise UserError(f"stages: OmniQuant.clipping_lr {clipping_lr} is not between 0 and 1: try the paper's 0.01")
        if isinstance(clipping, RangeEstimator) and transform is None:
            raise UserError(
                f"stages: OmniQuant has nothing to learn with clipping {type(clipping).__name__}: give a learnable "
                "clipping, such as LWC, or a transform"
            )

    @property
    def leaves(self) -> frozenset[Part]:
        return frozenset({"grid"} if self.transform is None else {"block"})

    def equivalence_kinds(self, layout: Layout, activations: Activations) -> Sequence[str]:
        return () if self.transform is None else worth_learning(self.transform.equivalences, activations.attention)

    def module(self, task: BlockTask) -> "OmniQuantModule":
        return OmniQuantModule(task, self)

    def check_layout(self, layout: Layout) -> None:
        if self.transform is not None:
            check_equivalences(layout, self.transform.equivalences)


class OmniQuantModule(ReconstructionModule):
    """Learns clipping and transform of one block.

    Args:
        task: the block, its streams and its grids.
        settings: the settings of the stage.
    """

    settings: OmniQuant

    def __init__(self, task: BlockTask, settings: OmniQuant) -> None:
        super().__init__(task, settings)
        self.transform, self.moves = self._start_transform()  # NOTE: checkpoints hold the name ``moves``
        if self.transform is None and isinstance(settings.clipping, RangeEstimator):
            raise UserError(
                "stages: OmniQuant has nothing to learn: a scale between queries and keys has no effect while both "
                "stay at 16 bits; add norm to transform.equivalences, or give a learnable clipping, such as LWC"
            )
        second_moment = second_moments_for(settings.clipping, task, settings.token_weights)
        weights = {name: task.linear(name).weight.detach() for name in task.layout.linears}
        self.clips = nn.ModuleDict(
            {
                module_key(name): settings.clipping.build(weight, task.grids[name], second_moment.get(name))
                for name, weight in weights.items()
            }
        )
        self.to(task.device)
        if settings.augmented_loss:
            self.augment()

    def _start_transform(self) -> tuple[Transform | None, nn.ParameterDict | None]:
        """Fuse the initial values into the block; the learned transform then starts at the identity."""
        task, let = self.task, self.settings.transform
        kinds = self.settings.equivalence_kinds(task.layout, task.activations)
        if let is not None and len(kinds) < len(let.equivalences):
            warn_once("no scale between queries and keys is learned: it has no effect while both stay at 16 bits")
        if let is None or not kinds:
            return None, None
        transform = block_transform(task, kinds, let.shift)
        values = transform.initial(dict(task.block.named_parameters()), input_ranges(task), let.alpha)
        fuse(task.block, transform, transform.parameters(values).to(task.device))
        return transform, transform.parameters()

    def tensors(self) -> dict[str, Tensor]:
        """Full-precision tensors of the block after the transform; differentiable in its parameters."""
        return {name: materialize(value) for name, value in self._transformed().items()}

    def quantized_tensors(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        tensors = self._transformed()
        for name in self.task.layout.linears:
            out = dtype or self.task.linear(name).weight.dtype
            tensors[f"{name}.weight"] = self.clip(name)(tensors[f"{name}.weight"], out)
        return {name: materialize(value) for name, value in tensors.items()}

    def _transformed(self) -> dict[str, Tensor | ScaledWeight]:
        """As ``tensors``, with the factors of transformed weights kept separate; without a transform, weights only."""
        if self.transform is None or self.moves is None:
            return {f"{name}.weight": self.task.linear(name).weight for name in self.task.layout.linears}
        return self.transform.apply_factored(dict(self.task.block.named_parameters()), self.moves)

    def clip(self, name: str) -> FakeQuantWeight:
        """The clipping of one linear."""
        clip = self.clips[module_key(name)]
        assert isinstance(clip, FakeQuantWeight)
        return clip

    def parameter_groups(self) -> list[dict[str, Any]]:
        clips = [each for each in self.clips.parameters() if each.requires_grad]
        groups: list[dict[str, Any]] = [{"params": clips, "lr": self.settings.clipping_lr}] if clips else []
        if self.settings.transform is not None and self.moves is not None:
            groups.append({"params": list(self.moves.parameters()), "lr": self.settings.transform.lr})
        return groups

    @torch.no_grad()
    def finish(self) -> BlockResult:
        task, dtype, tensors = self.task, self.task.export_dtype, self.tensors()
        linears: dict[str, QuantizedLinear] = {}
        for name in task.layout.linears:
            weight, grid = tensors[f"{name}.weight"].float(), task.grids[name]
            scale, zero_point = self.clip(name).grid_of(weight)
            linears[name] = QuantizedLinear.of(grid, grid.quantize(weight, scale, zero_point), scale, zero_point)
        if self.transform is None or self.moves is None:
            return BlockResult(linears, task.plain_tensors())
        result = BlockResult(linears, {name: tensors[name].to(dtype) for name in task.plain_tensors()})
        if result.first_unstorable(dtype) is None:  # else the block stays unchanged for ``abandon``
            fuse(task.block, self.transform, self.moves)
        return result

    @torch.no_grad()
    def abandon(self) -> str:
        for name in self.task.layout.linears:
            self.clip(name).reset()
        for value in self.moves.parameters() if self.moves is not None else ():
            value.zero_()
        return "the initial grid" if self.moves is None else "the initial grid and transform"
