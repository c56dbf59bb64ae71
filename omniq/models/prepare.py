# SPDX-License-Identifier: Apache-2.0
"""Prepared checkpoints: decorators that change the weights of a model before anything else sees them.

Every weight enters a run through ``Checkpoint.read``. A decorator wraps a checkpoint and is one itself, so streams,
stages, export, verification and evaluation see an ordinary model, and decorators can be stacked:

    FoldedNorms(Renamed(SafetensorsCheckpoint(folder, "model.safetensors"), names), folds)

A decorator reads what it needs when it is asked for a tensor, and holds none. It knows no model families: its caller
gives it full parameter names. The digest remains that of the files; what a decorator does follows from the settings of
a run, which the run's fingerprint holds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from omniq.errors import UserError
from omniq.models.checkpoint import Checkpoint, Stored


class PreparedCheckpoint(Checkpoint):
    """A checkpoint that delegates to another one; subclasses override ``read``.

    Args:
        inner: the checkpoint to change.
        tensors: the tensors that the decorator offers, if their names, shapes or dtypes differ from those of ``inner``.
    """

    def __init__(self, inner: Checkpoint, tensors: Mapping[str, Stored] | None = None) -> None:
        super().__init__(inner.tensors if tensors is None else tensors, inner.files)
        self._inner = inner

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        return self._inner.read(names)

    def digest(self) -> str:
        return self._inner.digest()


class Renamed(PreparedCheckpoint):
    """Tensors under other names. Two names may share one stored tensor, which unties parameters.

    Args:
        inner: the checkpoint to change.
        stored_name: the name in ``inner`` of every tensor on offer, by its new name.
    """

    def __init__(self, inner: Checkpoint, stored_name: Mapping[str, str]) -> None:
        super().__init__(inner, {name: inner.tensors[stored] for name, stored in stored_name.items()})
        self._stored_name = stored_name

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        stored = {name: self._stored_name[name] for name in names}
        found = self._inner.read(set(stored.values()))
        return {name: found[key] for name, key in stored.items()}


@dataclass(frozen=True)
class NormFold:
    """A norm to fold, and the linears that take over its scale and shift.

    Args:
        norm: full name of the module, such as ``model.layers.0.input_layernorm``.
        linears: full names of all linears that read the output of the norm. No other module may read it.
        offset: added to the stored weight before it scales: 0, or 1 for norms that multiply by ``1 + w`` (Gemma).
    """

    norm: str
    linears: tuple[str, ...]
    offset: int = 0


class FoldedNorms(PreparedCheckpoint):
    """Norms without scale and shift; the linears after them compute with both.

    With ``n`` the normalized input, ``w`` and ``b`` the weight and bias of the norm, ``W`` and ``c`` those of a linear:

        W ((offset + w) * n + b) + c  =  (W diag(offset + w)) n + (W b + c)

    as in SliceGPT (arXiv 2401.15024, section 3.2) and QuaRot (arXiv 2404.00456, section 3). The right side is computed
    in float64 and rounded once, to the stored dtype. The norm becomes the identity: its weight is ``1 - offset`` and
    its bias 0.

    Args:
        inner: the checkpoint to change.
        folds: the norms.

    Raises:
        UserError: a weight is not stored (a tied head, for instance: give it a name of its own with ``Renamed``), a
            linear has no bias for the shift of its norm, or two norms are to be folded into one linear.
    """

    def __init__(self, inner: Checkpoint, folds: Iterable[NormFold]) -> None:
        super().__init__(inner)
        self._norms: dict[str, NormFold] = {}
        self._linears: dict[str, NormFold] = {}
        for fold in folds:
            self._norms[fold.norm] = fold
            for linear in fold.linears:
                if linear in self._linears:
                    raise UserError(f"{linear} follows two norms, {self._linears[linear].norm} and {fold.norm}")
                self._check(fold, linear)
                self._linears[linear] = fold

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        found = self._inner.read(names)
        return {name: self._folded(name, found[name]) for name in names}

    def _check(self, fold: NormFold, linear: str) -> None:
        for name in (f"{fold.norm}.weight", f"{linear}.weight"):
            if name not in self.tensors:
                raise UserError(f"{name} is not stored, so {fold.norm} cannot be folded into {linear}")
        if f"{fold.norm}.bias" in self.tensors and f"{linear}.bias" not in self.tensors:
            raise UserError(f"{linear} has no bias to take over that of {fold.norm}, which cannot be folded into it")

    def _folded(self, name: str, value: Tensor) -> Tensor:
        module, _, kind = name.rpartition(".")
        if fold := self._norms.get(module):
            return torch.full_like(value, 1 - fold.offset if kind == "weight" else 0)
        fold = self._linears.get(module)
        if fold is None or kind not in ("weight", "bias"):
            return value
        if kind == "weight":
            scale = self._double(f"{fold.norm}.weight") + fold.offset  # [i]
            folded = value.double() * scale  # [o, i]
        elif f"{fold.norm}.bias" in self.tensors:
            folded = value.double() + self._double(f"{module}.weight") @ self._double(f"{fold.norm}.bias")  # [o]
        else:
            return value
        return folded.to(value.dtype)

    def _double(self, name: str) -> Tensor:
        return self._inner.read([name])[name].double()
