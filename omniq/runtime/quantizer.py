# SPDX-License-Identifier: Apache-2.0
"""omniq's format in transformers: the config and the quantizer of ``quant_method: omniq``.

Steps of ``from_pretrained``: transformers builds the stock model without memory. The quantizer replaces every linear
that the config names by a ``PackedLinear``. transformers reads the tensors into its buffers. The quantizer checks their
content and attaches the quantization of activations. With ``dequantize: true`` in the config, the result is a stock
model, which quantizes no activations.

Importing this module registers both classes. This happens while transformers is being imported, so the module must not
import more of transformers than its registry has already loaded. Functions import the rest when a model is opened.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from omniq.errors import CorruptFile, UserError
from omniq.grid.affine import Grid
from omniq.grid.dtypes import SCALE_DTYPES, torch_dtype
from omniq.grid.scheme import Activations

if TYPE_CHECKING:
    from omniq.models.layout import Layout

METHOD = "omniq"
VERSION = 1  # version of the layout; a reader refuses newer versions
_ACTIVATIONS = {"inputs", "queries", "keys_values", "symmetric"}
_LINEAR = {"bits", "group_size", "symmetric", "second", "outliers"}


@register_quantization_config(METHOD)
class OmniqConfig(QuantizationConfigMixin):
    """The entry ``quantization_config`` of ``config.json``.

    Args:
        linears: the grid of every quantized linear by full name (``bits``, ``group_size``, ``symmetric``); with
            quantized scales also ``second`` (``scale_bits``, ``zero_bits``, ``rows``), and with a sparse part the
            number of ``outliers``.
        activations: bits of the ``inputs`` of linears, of ``queries`` and of ``keys_values`` (16 for no quantization),
            with a range for each token, and whether the ranges are ``symmetric``; by default no quantization.
        scale_dtype: dtype of all scales: float16, bfloat16 or float32.
        version: version of the layout.
        dequantize: convert to stock linears while loading.
        quant_method: ``omniq``.

    Raises:
        UserError: this version of omniq cannot read an entry.
    """

    def __init__(
        self,
        linears: Mapping[str, Mapping[str, Any]],
        scale_dtype: str = "float16",
        version: int = VERSION,
        dequantize: bool = False,
        quant_method: str = METHOD,
        activations: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if version != VERSION or unknown:
            extra = f" and unknown entries {', '.join(map(repr, unknown))}" if unknown else ""
            raise UserError(
                f"quantization_config has version {version}{extra}, this omniq reads version {VERSION}: upgrade omniq"
            )
        if scale_dtype not in SCALE_DTYPES:
            raise UserError(
                f"quantization_config.scale_dtype {scale_dtype!r} is not one of {', '.join(SCALE_DTYPES)}: download "
                "config.json again"
            )
        self.quant_method: Any = quant_method  # transformers annotates the enumeration of its own methods
        self.version, self.scale_dtype, self.dequantize = version, scale_dtype, dequantize
        self.activations = dict(activations or {})
        if not self.activations.keys() <= _ACTIVATIONS:
            strange = ", ".join(map(repr, sorted(self.activations.keys() - _ACTIVATIONS)))
            raise UserError(
                f"quantization_config.activations has {strange}, which this omniq does not support: upgrade omniq"
            )
        try:
            self.linears = {name: dict(entry) for name, entry in linears.items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(
                "quantization_config.linears is not a table of grids by name: download config.json again"
            ) from error
        for name, entry in self.linears.items():
            if not entry.keys() <= _LINEAR:
                strange = ", ".join(map(repr, sorted(entry.keys() - _LINEAR)))
                raise UserError(
                    f"quantization_config.linears: {name} has {strange}, which this omniq does not support: upgrade "
                    "omniq"
                )
            self.grid(name)

    def grid(self, name: str) -> Grid:
        """The grid of one linear.

        Raises:
            UserError: the entry of the linear is incomplete or not valid.
        """
        from omniq.export.formats.omniq import entry_grid

        try:
            return entry_grid(self.linears[name], torch_dtype(self.scale_dtype))
        except KeyError as error:
            raise UserError(
                f"quantization_config.linears: {name} lacks {error.args[0]}: download config.json again"
            ) from error
        except TypeError as error:
            raise UserError(
                f"quantization_config.linears: {name} has a value of a wrong type ({error}): download config.json again"
            ) from error


@register_quantizer(METHOD)
class OmniqQuantizer(HfQuantizer):
    """Replaces quantized linears by ``PackedLinear``."""

    requires_calibration = True  # transformers then refuses to quantize a plain model with this class
    quantization_config: OmniqConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from omniq.runtime.linear import PackedLinear

        config = self.quantization_config
        stored = _stored_names(checkpoint_files)
        if any(_is_of_expert(name) for name in config.linears):
            from omniq.models.experts import split_experts

            split_experts(model)
        for name, entry in config.linears.items():
            place, linear = _find(model, name)
            config.grid(name).check_width(linear.in_features, name)
            packed = PackedLinear(linear, config.grid(name), entry.get("outliers"))
            for part, _buffer in packed.named_buffers():
                if stored is not None and f"{name}.{part}" not in stored:
                    raise CorruptFile(f"{name}.{part} is missing in the checkpoint: download its files again")
            model.set_submodule(place, packed)

    def update_weight_conversions(self, weight_conversions: Sequence[Any], model: Any) -> list[Any]:
        """Leave the tensors of experts as they are stored if the experts of the model are linears."""
        split = any(_is_of_expert(name) for name in self.quantization_config.linears)
        kept = [each for each in weight_conversions if not (split and _merges_experts(each))]
        updated: list[Any] = super().update_weight_conversions(kept, model)
        return updated

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, packed in _packed(model).items():
            packed.check(name)
        if self.quantization_config.dequantize:
            return self._dequantize(model)
        self._detach = _quantize_activations(model, self.quantization_config.activations)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        getattr(self, "_detach", lambda: None)()
        for name, packed in _packed(model).items():
            model.set_submodule(name, packed.plain(dtype or model.dtype))
        return model

    def is_serializable(self, *_: Any) -> bool:
        """``save_pretrained`` writes the same tensors again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes have no gradient."""
        return False


def _is_of_expert(name: str) -> bool:
    """True for a linear of an expert, such as ``model.layers.0.mlp.experts.3.up_proj``."""
    return ".experts." in name


def _merges_experts(conversion: Any) -> bool:
    return any(target.endswith((".gate_up_proj", ".down_proj")) for target in conversion.target_patterns)


def _packed(model: nn.Module) -> dict[str, Any]:
    from omniq.runtime.linear import PackedLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def _quantize_activations(model: Any, given: Mapping[str, Any]) -> Callable[[], None]:
    """Let blocks with quantized linears compute on quantized activations; returns a function that undoes this."""
    from omniq.blocks.activation_hooks import Finished, attach_all

    activations = Activations(**given)
    if not activations.quantized:
        return lambda: None
    described: list[tuple[nn.Module, Layout, Finished | None]] = []
    for block, layout, packed in _layouts(model):
        plain = [name for name in layout.linears if name not in packed]
        described.append((block, layout.keep(plain, "not quantized in this checkpoint"), None if packed else {}))
    return attach_all(described, activations)


def _layouts(model: Any) -> Iterator[tuple[nn.Module, "Layout", dict[str, Any]]]:
    """The blocks of a model, with their layouts and their packed linears.

    In an undeclared family, each packed linear is a group of its own: its input is quantized once more if other linears
    read it too, to the same values. Formats refuse quantized queries, keys and values there (``Omniq.check``).
    """
    from omniq.models.discover import find_blocks
    from omniq.models.families import declared_family
    from omniq.models.layout import Layout
    from omniq.transforms.heads import Heads

    family = declared_family(model.config)
    name = find_blocks(model) if family is None else family.blocks
    modules = dict(model.named_modules())
    blocks = modules.get(name) or modules[name.removeprefix(f"{model.base_model_prefix}.")]
    for index, block in enumerate(blocks.children()):
        packed = _packed(block)
        if family is None:
            layout = Layout(model.config.model_type, tuple((linear,) for linear in packed), Heads(1, 1))
        else:
            layout = family.layout(block, index)
        yield block, layout, packed


def _find(model: Any, name: str) -> tuple[str, nn.Linear]:
    """Find a linear by its full name; returns its name in this model (shorter for an ``AutoModel``) and the linear.

    Raises:
        UserError: the model has no such linear.
    """
    modules = dict(model.named_modules())
    for place in (name, name.removeprefix(f"{model.base_model_prefix}.")):
        if isinstance(linear := modules.get(place), nn.Linear):
            return place, linear
    raise UserError(
        f"quantization_config.linears: {type(model).__name__} has no linear {name}: download config.json and weights "
        "from the same source"
    )


def _stored_names(files: Sequence[str] | None) -> set[str] | None:
    """Names of all tensors in safetensors files; None without such files.

    Raises:
        CorruptFile: a file is damaged.
    """
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    names: set[str] = set()
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                names |= set(file.keys())
        except (SafetensorError, OSError) as error:
            raise CorruptFile(f"{path}: {error}") from error
    return names
