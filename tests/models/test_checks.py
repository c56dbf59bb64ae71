# SPDX-License-Identifier: Apache-2.0
"""Weights that are stored quantized without a word in the config are refused by the name of a tensor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from omniq.models.source import SourceModel
from omniq.models.weight_files import SINGLE
from tests.helpers.opening import edit_json, refused
from tests.helpers.tiny import save_tiny

LINEAR = "model.layers.0.self_attn.q_proj"
INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64)
OTHERS = (torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2)


def store(folder: Path, changes: dict[str, Tensor], drop: str = "") -> None:
    tensors = {name: value for name, value in load_file(folder / SINGLE).items() if name != drop}
    save_file(tensors | changes, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [*INTEGERS, *OTHERS], ids=str)
def test_open_parameter_in_integer_dtype_is_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_tiny(tmp_path)
    for name in (f"{LINEAR}.weight", "model.norm.weight", "lm_head.weight"):
        plain = load_file(folder / SINGLE)[name]
        store(folder, {name: plain.to(dtype)})
        refused(folder, rf"model.safetensors: {name} is quantized, as its dtype \w+ shows, and config.json has no")
        store(folder, {name: plain})


@pytest.mark.parametrize(
    "inner",
    [
        "SCB",  # bitsandbytes, 8 bits
        "weight.absmax",  # bitsandbytes, 4 bits
        "qweight",  # GPTQ, AWQ
        "weight_packed",  # compressed-tensors
        "weight_scale",
        "weight_scale_inv",  # DeepSeek's FP8
        "weight:qdata",  # torchao
        "lora_A.weight",  # an adapter that is not merged
    ],
)
@pytest.mark.parametrize("prefix", ["model.", ""])
def test_open_tensor_of_quantized_linear_is_refused(tmp_path: Path, inner: str, prefix: str) -> None:
    folder = save_tiny(tmp_path)
    name = f"{prefix}{LINEAR.removeprefix('model.')}"
    packed = inner in ("qweight", "weight_packed")
    store(folder, {f"{name}.{inner}": torch.ones(4)}, drop=f"{LINEAR}.weight" if packed else "")
    refused(folder, rf"the tensor {name}.{inner} shows that the linear {name} is quantized or has an adapter")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_open_weights_in_each_floating_dtype_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save_tiny(tmp_path, dtype=dtype)
    assert SourceModel.open(folder, dtype="float32").block(0).self_attn.q_proj.weight.dtype == torch.float32


def test_open_unused_bias_warns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_tiny(tmp_path)
    store(folder, {f"{LINEAR}.bias": torch.zeros(64)})
    SourceModel.open(folder)
    assert f"stores 1 tensors the model does not use, such as {LINEAR}.bias" in caplog.text


def test_open_config_dtype_without_weights_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path)
    for name in ("int8", "float8_e4m3fn"):
        edit_json(folder / "config.json", dtype=name)
        refused(folder, rf"config.json: dtype '{name}' cannot be the dtype of a model: set it, or model.dtype, to one")
        assert SourceModel.open(folder, dtype="float32").dtype == torch.float32
