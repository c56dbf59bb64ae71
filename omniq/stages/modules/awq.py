# SPDX-License-Identifier: Apache-2.0
"""``AWQModule``; the equations are in ``omniq.stages.awq``.

Shapes: ``o`` output features, ``i`` input features, ``c`` parameters of an equivalence.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from omniq.calibration.fuse import block_transform, fuse
from omniq.calibration.input_statistics import InputGram, InputMagnitudes, power_of
from omniq.calibration.loader import PassLoader
from omniq.calibration.observe import observe
from omniq.calibration.rounding import RTNModule
from omniq.calibration.task import BlockTask
from omniq.grid.affine import Grid, rounded_to_nearest
from omniq.stages.awq import AWQ
from omniq.storage.block_result import BlockResult
from omniq.transforms.equivalence import Equivalence
from omniq.transforms.initial import FLOOR, LIMIT


@dataclass
class SearchInput:
    """Statistics of one input for the search, which treats all its readers together.

    Args:
        equivalence: the equivalence that scales the input.
        readers: the quantized linears that read the input.
        size: mean magnitude for each parameter of the equivalence, float32 ``[c]``.
        gram: mean of ``x x^T``, float32 ``[i, i]``.
        power: mean square of the outputs of the readers.
    """

    equivalence: Equivalence
    readers: tuple[str, ...]
    size: Tensor
    gram: Tensor
    power: Tensor


class AWQModule(RTNModule):
    """Searches the scales of one block, one step for each alpha, then rounds once.

    Buffers hold the best result so far, so that a search can resume: ``<key>/log_scale`` of each equivalence, ``[c]``,
    and its error and alpha, in the order of the equivalences.
    """

    save_interval = 5.0  # seconds: a step takes milliseconds on a GPU
    least: Tensor
    alphas: Tensor

    def __init__(self, task: BlockTask, settings: AWQ) -> None:
        super().__init__(task, settings.clipping)
        self.settings = settings
        self.transform = block_transform(task, settings.kinds(task.layout), shift=False)
        for name, shape in self.transform.shapes.items():
            self.register_buffer(name, torch.zeros(shape))
        number = len(self.transform.equivalences)
        self.register_buffer("least", torch.full((number,), torch.finfo(torch.float32).max))
        self.register_buffer("alphas", torch.zeros(number))
        self.to(task.device)

    def loader(self) -> PassLoader:
        return PassLoader(samples=1, passes=self.settings.candidates)

    @torch.no_grad()
    def training_step(self, indices: Tensor, batch_idx: int = 0) -> None:
        alpha = batch_idx / (self.settings.candidates - 1)
        for place, (key, inputs) in enumerate(self.inputs.items()):
            best = self.get_buffer(f"{key}/log_scale")
            log_scale = log_scale_of(inputs.size, alpha)
            error = self._error(inputs, log_scale.exp()) / inputs.power
            better = error < self.least[place]
            best.copy_(torch.where(better, log_scale / inputs.equivalence.power, best))
            self.alphas[place] = torch.where(better, alpha, self.alphas[place])
            self.least[place] = torch.minimum(error, self.least[place])
        for name, values in (("alpha", self.alphas), ("recon_error", self.least)):
            for key, value in zip(self.inputs, values.clone(), strict=True):
                self.track(f"{key.rpartition('/')[2]}/{name}", value)

    @torch.no_grad()
    def finish(self) -> BlockResult:
        self.__dict__.pop("inputs", None)  # the clip search gathers Gram matrices of its own
        values = {name: self.get_buffer(name).to(self.task.device) for name in self.transform.shapes}
        fuse(self.task.block, self.transform, values)
        return super().finish()

    @cached_property
    def inputs(self) -> dict[str, SearchInput]:
        """Statistics of each input, by key of its equivalence, from one pass over the quantized stream."""
        task, heads, equivalences = self.task, self.transform.heads, self.transform.equivalences
        first = {key: self._readers(equivalence)[0] for key, equivalence in equivalences.items()}
        seen = observe(task, [InputMagnitudes(), InputGram()], tuple(first.values()), quantized=False)
        means = {name: [total.div_(each.tokens).float() for total in each.totals] for name, each in seen.items()}
        inputs = {}
        for key, equivalence in equivalences.items():
            name, readers = first[key], self._readers(equivalence)
            width = task.linear(name).in_features
            # Without tokens, all scales have the same error, 0, and the search keeps the first: alpha = 0.
            size, gram = means[name] or [torch.zeros(shape, device=task.device) for shape in (width, (width, width))]
            size = equivalence.by_parameter(size, heads).mean(1)
            power = torch.stack([power_of(task.linear(reader).weight.float(), gram) for reader in readers]).sum()
            power = power.clamp(min=torch.finfo(torch.float32).tiny)
            inputs[key] = SearchInput(equivalence, readers, size, gram, power)
        return inputs

    def _readers(self, equivalence: Equivalence) -> tuple[str, ...]:
        """The quantized readers of an equivalence."""
        return tuple(name for name in equivalence.readers if name in self.task.layout.linears)

    def _error(self, inputs: SearchInput, scale: Tensor) -> Tensor:
        """Mean squared error of the outputs for a scale ``[c]``, summed over the readers."""
        wide = inputs.equivalence.to_inputs(scale, self.transform.heads)  # [i]
        errors = [
            output_error(self.task.linear(name).weight, inputs.gram, wide, self.task.grids[name])
            for name in inputs.readers
        ]
        return torch.stack(errors).sum()


def log_scale_of(size: Tensor, alpha: float) -> Tensor:
    """``log s(alpha)`` of mean magnitudes ``[c]``, within the limits of a transform; zero for ``alpha = 0``.

    The lower bound of the magnitudes is ``FLOOR`` (the published code bounds ``a^alpha`` by 1e-4).
    """
    log_scale = alpha * size.clamp(min=FLOOR).log()
    return (log_scale - (log_scale.max() + log_scale.min()) / 2).clamp(-LIMIT, LIMIT)


def output_error(weight: Tensor, gram: Tensor, scale: Tensor, grid: Grid) -> Tensor:
    """``tr((W - W^) S (W - W^)^T)`` of scaled weights on the min-max grid, ``W^ = Q(W diag(s)) diag(s)^-1``.

    Args:
        weight: ``W``, ``[o, i]``.
        gram: ``S``, mean of ``x x^T``, float32 ``[i, i]``.
        scale: ``s``, ``[i]``.
        grid: the grid of the codes.
    """
    scaled = weight.float() * scale
    return power_of((scaled - rounded_to_nearest(scaled, grid)) / scale, gram)
