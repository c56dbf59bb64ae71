# SPDX-License-Identifier: Apache-2.0
"""The reader of omniq's format: ``from_pretrained`` after ``import omniq``, the opened model, and refusals."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import omniq
from omniq.cli.command import main
from omniq.errors import CorruptFile, UserError
from omniq.grid.affine import Grid
from omniq.models.source import SourceModel
from omniq.runtime.linear import PackedLinear
from omniq.runtime.quantizer import OmniqConfig
from tests.helpers.exported import WINDOWS, export, opened, rounded, verify
from tests.helpers.outliers import Q_PROJ, edit_config, edit_tensors, expected_logits, logits, sparse, unquantized
from tests.helpers.schemes import scheme_of
from tests.helpers.tiny import save_tiny


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    return opened(tmp_path / "source", Grid(3, 32))


@pytest.fixture
def out(source: SourceModel, tmp_path: Path) -> Path:
    results = sparse(rounded(source, Grid(3, 32)), "unstructured")
    return export(source, results, tmp_path / "out", format="omniq")


@pytest.mark.parametrize("order", ["import omniq, transformers", "import transformers, omniq"])
def test_runtime_in_fresh_process_opens_export(order: str, source: SourceModel, out: Path, tmp_path: Path) -> None:
    code = (
        f"{order}, torch\n"
        "from transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(out)!r})\n"
        f"windows = torch.tensor({WINDOWS.tolist()})\n"
        "with torch.no_grad():\n"
        "    logits = torch.cat([model(window[None]).logits for window in windows])\n"
        f"torch.save(logits, {str(tmp_path / 'logits.pt')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = sparse(rounded(source, Grid(3, 32)), "unstructured")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), expected_logits(source, results, torch.float16))


def test_runtime_registers_when_transformers_is_imported() -> None:
    code = (
        "import sys, omniq, omniq.runtime\n"
        "omniq.runtime.install()\n"
        "assert 'torch' not in sys.modules\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('no_such_module') is None\n"
        "import transformers.quantizers.auto as auto\n"
        "assert 'omniq' in auto.AUTO_QUANTIZER_MAPPING and auto.__spec__.origin == auto.__file__\n"
        "assert auto.__spec__ is importlib.util.find_spec('transformers.quantizers.auto')\n"
        "assert not [finder for finder in sys.meta_path if 'SimpleNamespace' in type(finder).__name__]\n"
        "omniq.runtime.register()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"omniq"} <= AUTO_QUANTIZER_MAPPING.keys() & AUTO_QUANTIZATION_CONFIG_MAPPING.keys()


@pytest.mark.gpu
def test_packed_model_on_cuda_equals_cpu(out: Path) -> None:
    model = omniq.load(out, dtype=torch.float32)
    expected = logits(model)
    with torch.no_grad():
        found = torch.cat([model.to("cuda")(window[None].cuda()).logits for window in WINDOWS])
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_packed_linear_on_meta_makes_weights_there() -> None:
    """The weights are made on the device of the codes."""
    packed = PackedLinear(nn.Linear(64, 16, device="meta"), Grid(3, 32), None)
    assert packed(torch.zeros(2, 64, device="meta")).device.type == "meta"
    assert packed.plain(torch.float16).weight.device.type == "meta"


# -- what can be done with the opened model -------------------------------------------------------------------------


def test_packed_model_in_another_dtype_keeps_stored_tensors(source: SourceModel, out: Path) -> None:
    results = sparse(rounded(source, Grid(3, 32)), "unstructured")
    exact = expected_logits(source, results, torch.float32)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)), exact)
    model = AutoModelForCausalLM.from_pretrained(out).to(torch.bfloat16).to(torch.float32)
    packed = model.get_submodule(Q_PROJ)
    assert packed.weight_scale.dtype == torch.float16
    assert torch.equal(packed.weight_scale, results[0].linears["self_attn.q_proj"].scale)
    assert packed.outlier_value.dtype == torch.float16


def test_packed_model_saved_again_keeps_tensors(out: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out)
    model.save_pretrained(tmp_path / "again")
    before, after = load_file(out / "model.safetensors"), load_file(tmp_path / "again" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    inner = AutoModel.from_pretrained(out)
    assert isinstance(inner.get_submodule(Q_PROJ.removeprefix("model.")), PackedLinear)
    with torch.no_grad():
        assert torch.equal(
            inner(WINDOWS[:1]).last_hidden_state, model(WINDOWS[:1], output_hidden_states=True).hidden_states[-1]
        )
    assert "64, 64, bias=False, Grid(bits=3" in str(model)


def test_packed_model_dequantized_while_loading_has_plain_linears(out: Path) -> None:
    expected = logits(omniq.load(out))
    edit_config(out, dequantize=True)
    model = omniq.load(out)
    assert type(model.get_submodule(Q_PROJ)) is nn.Linear
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_packed_model_with_quantized_activations_equals_hooks(family: str, tmp_path: Path) -> None:
    """W4A4 of the paper with queries, keys and values; also token by token, and switched off again."""
    grid = Grid(4, 32)
    source = opened(tmp_path / "source", grid, family=family)
    results = [rounded(source, grid)[0], unquantized(source, 1)]
    scheme = scheme_of(grid, 4, 4, queries=True)
    out = export(source, results, tmp_path / "out", format="omniq", scheme=scheme)
    verify(out, source, results, format="omniq", scheme=scheme, windows=WINDOWS, tolerance=0.0)
    model = AutoModelForCausalLM.from_pretrained(out)
    whole, plain = logits(model), expected_logits(source, results, torch.float16)
    assert 0.02 < (whole - plain).norm() / plain.norm() < 0.5  # measured 0.17 and 0.08
    with torch.no_grad():
        start = model(WINDOWS[:, :20], use_cache=True)
        rest = model(WINDOWS[:, 20:], past_key_values=start.past_key_values).logits
    assert (rest - whole[:, 20:]).norm() / whole.norm() < 0.02  # measured 0.0; sums may come in another order
    assert torch.equal(logits(model.dequantize()), plain)


def test_evaluate_of_packed_and_dequantized_model_agree(out: Path, tmp_path: Path) -> None:
    text, config, measured = tmp_path / "text.txt", tmp_path / "evaluate.yaml", tmp_path / "result.json"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 20)
    source = {"class_path": "omniq.data.LocalText", "init_args": {"path": str(text)}}
    config.write_text(json.dumps({"evaluation": {"source": source, "length": 64}}))
    assert main(["evaluate", "--config", str(config), "--model.path", str(out), "--out", str(measured)]) == 0
    packed = json.loads(measured.read_text())["results"][str(out)]
    edit_config(out, dequantize=True)
    assert main(["evaluate", "--config", str(config), "--model.path", str(out), "--out", str(measured)]) == 0
    assert json.loads(measured.read_text())["results"][str(out)]["perplexity"] == packed["perplexity"]


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"version": 2}, "quantization_config has version 2; this omniq reads version 1: upgrade omniq"),
        ({"rotation": "hadamard"}, "quantization_config has version 1, 'rotation'; .* upgrade omniq"),
        (
            {"activations": {"inputs": 4, "ranges": "tensor"}},
            "activations has 'ranges', which this omniq does not support: upg",
        ),
        ({"scale_dtype": "float8"}, "scale_dtype 'float8' is not one of float16, bfloat16, float32"),
        ({"linears": {Q_PROJ: {"bits": 3, "group_size": 32}}}, "q_proj lacks symmetric: download config.json again"),
        (
            {"linears": {Q_PROJ: {"bits": 3, "rotation": 1}}},
            "q_proj has 'rotation', which this omniq does not support: upgrade",
        ),
        (
            {"linears": {Q_PROJ: {"bits": "3", "group_size": 32, "symmetric": True}}},
            "q_proj has a value of a wrong type",
        ),
        ({"linears": {Q_PROJ: {"bits": 3, "group_size": None, "symmetric": True}}}, "q_proj has a value of a wrong"),
        ({"linears": {Q_PROJ: 3}}, "linears is not a table of grids by name: download config.json again"),
        ({"linears": [Q_PROJ]}, "linears is not a table of grids by name: download config.json again"),
        ({"linears": {Q_PROJ: {"bits": 9, "group_size": 32, "symmetric": True}}}, r"bits 9 are outside 2\.\.8"),
        ({"linears": {Q_PROJ: {"bits": 3, "group_size": 7, "symmetric": True}}}, "group size 7 does not divide the 64"),
        ({"linears": {"x": {"bits": 3, "group_size": 32, "symmetric": True}}}, "LlamaForCausalLM has no linear x"),
    ],
)
def test_runtime_unreadable_config_is_refused(entries: dict[str, Any], message: str, out: Path) -> None:
    edit_config(out, **entries)
    with pytest.raises(UserError, match=message):
        AutoModelForCausalLM.from_pretrained(out)


def test_runtime_damaged_tensors_are_refused(out: Path) -> None:
    whole = load_file(out / "model.safetensors")

    def refused(message: str, **tensors: Tensor | None) -> None:
        edit_tensors(out, **tensors)
        with pytest.raises(CorruptFile, match=message):
            AutoModelForCausalLM.from_pretrained(out)
        edit_tensors(out, **{name: whole[f"{Q_PROJ}.{name}"] for name in tensors})

    column, pointer = whole[f"{Q_PROJ}.outlier_column"], whole[f"{Q_PROJ}.outlier_row_pointer"]
    refused(rf"{Q_PROJ}\.weight_scale is missing in the checkpoint", weight_scale=None)
    refused("outliers lie outside the 64 x 64 weights", outlier_column=torch.full_like(column, 64))
    refused("outliers lie outside", outlier_column=torch.full_like(column, -1))
    refused("outliers lie outside", outlier_row_pointer=pointer.flip(0))
    refused("outliers lie outside", outlier_row_pointer=pointer + 1)


def test_runtime_truncated_file_is_refused(out: Path) -> None:
    file = out / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CorruptFile, match=r"model\.safetensors: "):
        AutoModelForCausalLM.from_pretrained(out)


def test_runtime_of_plain_model_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    with pytest.raises(ValueError, match="omniq does require the model to be pre-quantized"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=OmniqConfig({}))
