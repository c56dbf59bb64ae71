# SPDX-License-Identifier: Apache-2.0
"""``omniq evaluate``: the models that it measures, and the input that it refuses before it measures anything."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import omniq
from omniq.cli import evaluate as evaluate_command
from omniq.cli.command import main
from omniq.config.parse import parse_run
from omniq.errors import UserError
from omniq.evaluate.perplexity import evaluate_model
from omniq.grid.affine import Grid
from omniq.models import locate
from omniq.models.transformers_io import open_checkpoint
from tests.helpers.exported import export, opened, rounded
from tests.helpers.opening import edit_json, only_pickle, truncate
from tests.helpers.runs import configuration, write_text
from tests.helpers.tiny import VOCAB_SIZE, save_tiny, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model ``source``, the same model with codes of four bits ``quantized``, and a text."""
    place = tmp_path_factory.mktemp("evaluate")
    source = opened(place / "source", Grid(4, 32))
    export(source, rounded(source, Grid(4, 32)), place / "quantized")
    write_text(place / "text.txt")
    (place / "text.yaml").write_text(yaml.safe_dump({"evaluation": configuration(place)["evaluation"]}))
    return place


@pytest.fixture
def evaluate(place: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the command on a model and returns what was measured."""

    def run(path: str | Path, *options: str) -> dict[str, Any]:
        out = tmp_path / "result.json"
        args = ["evaluate", "--config", str(place / "text.yaml"), "--device", "cpu", "--out", str(out)]
        assert main([*args, "--model.path", str(path), *options]) == 0
        found: dict[str, Any] = json.loads(out.read_text())["results"][str(path)]
        return found

    return run


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must be refused, and returns the line that says why."""

    def run(path: str | Path, *options: str) -> str:
        capfd.readouterr()
        assert main(["evaluate", "--config", str(place / "text.yaml"), "--model.path", str(path), *options]) == 2
        said, errors = capfd.readouterr()
        assert said == ""
        assert errors.startswith("omniq: ")
        assert errors.count("\n") == 1, errors
        return errors

    return run


def windows(place: Path) -> torch.Tensor:
    """What the text of the command is cut into."""
    evaluation = parse_run([], configuration(place))[0].evaluation
    assert evaluation is not None
    return evaluation.sequences(tiny_tokenizer())


def reference(path: Path, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood in float64, of a model as transformers opens it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64)
    with torch.no_grad():
        chances = model(tokens).logits.softmax(-1)[:, :-1]
    return -chances.gather(-1, tokens[:, 1:, None]).log().mean().item()


def save_gpt2(folder: Path) -> Path:
    """A model of a family that omniq does not know."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": VOCAB_SIZE}
    torch.manual_seed(0)
    config = AutoConfig.for_model("gpt2", **sizes, bos_token_id=256, eos_token_id=257)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_evaluate_family_unknown_to_omniq_equals_transformers(
    dtype: str, place: Path, tmp_path: Path, evaluate: Callable[..., dict[str, Any]]
) -> None:
    """On a CPU the evaluation runs in float32, whatever the dtype of the checkpoint."""
    folder = save_gpt2(tmp_path / "gpt2")
    AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).save_pretrained(folder)
    found = evaluate(folder)
    assert found["nll"] == pytest.approx(reference(folder, windows(place)), rel=1e-6)  # measured 2e-8
    assert found["windows"] == 4


def test_evaluate_quantized_model_uses_its_own_dtype(place: Path, evaluate: Callable[..., dict[str, Any]]) -> None:
    tokens = windows(place)
    own, single = (
        evaluate_model(open_checkpoint(place / "quantized", dtype=name), tokens) for name in (None, "float32")
    )
    assert evaluate(place / "quantized", "--batch", "1")["nll"] == own.nll
    assert evaluate(place / "quantized", "--batch", "1", "--model.dtype", "float32")["nll"] == single.nll
    assert own.nll != single.nll


def test_evaluate_hub_name_downloads_once(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, evaluate: Callable[..., dict[str, Any]]
) -> None:
    """This holds for models with and without quantization."""
    asked = []

    def download(name: str, **options: Any) -> str:
        asked.append(name)
        return str(place / name.removeprefix("me/"))

    monkeypatch.setattr(locate, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    for name in ("source", "quantized"):
        assert evaluate(f"me/{name}")["nll"] == evaluate(place / name)["nll"]
    assert asked == ["me/source", "me/quantized"]


def test_evaluate_remote_code_runs_only_when_allowed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., str],
    evaluate: Callable[..., dict[str, Any]],
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = save_tiny(tmp_path / "model")
    plain = evaluate(folder)
    code = "from transformers import LlamaConfig, LlamaForCausalLM\n"
    code += "class Mine(LlamaConfig):\n    model_type = 'mine'\n"
    code += "class MineForCausalLM(LlamaForCausalLM):\n    config_class = Mine\n"
    (folder / "modeling_mine.py").write_text(code)
    classes = {"AutoConfig": "modeling_mine.Mine", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    edit_json(folder / "config.json", model_type="mine", auto_map=classes)
    monkeypatch.setattr("transformers.configuration_utils.logger.warning", lambda *_: None)  # of the unknown type
    assert "or model.trust_remote_code False" in refused(folder)
    assert not (tmp_path / "modules").exists()
    found = evaluate(folder, "--model.trust_remote_code", "true")
    assert found["nll"] == pytest.approx(plain["nll"], rel=1e-6)


def _name_a_pickle(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "adapter_model.bin")
    edit_json(path / "config.json", transformers_weights="adapter_model.bin")


def _need(package: str, **settings: Any) -> tuple[Callable[[Path], None], list[str]]:
    """A kind of quantization that transformers knows and leaves to a package that is not installed."""

    def change(path: Path) -> None:
        edit_json(path / "config.json", quantization_config=settings)

    return change, ["transformers cannot open ", "broken (", f"requires {package}", "give another model"]


@pytest.fixture
def broken(place: Path, tmp_path: Path) -> Callable[[Callable[[Path], Any]], Path]:
    """A copy of the quantized model with something wrong."""

    def make(change: Callable[[Path], Any]) -> Path:
        shutil.copytree(place / "quantized", tmp_path / "broken")
        change(tmp_path / "broken")
        return tmp_path / "broken"

    return make


PICKLES = [(only_pickle, "pytorch_model.bin"), (_name_a_pickle, "adapter_model.bin")]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        *((change, [f"{name} is a pickle file", "convert the model to safetensors first"]) for change, name in PICKLES),
        (truncate, ["broken/model.safetensors is truncated or corrupt", "get the file again"]),
        (lambda path: (path / "model.safetensors").unlink(), ["broken holds no weights: it needs model.safetensors"]),
        (lambda path: (path / "config.json").write_text("{"), ["config.json is not valid JSON", "get the file again"]),
        (lambda path: (path / "config.json").write_text("[]"), ["config.json does not hold a JSON object"]),
        (lambda path: (path / "config.json").unlink(), ["config.json cannot be read", "a model folder needs it"]),
        (lambda path: (path / "tokenizer.json").unlink(), ["no tokenizer can be read from", "put its files there"]),
        (
            lambda path: (path / "model.safetensors").rename(path / "q4.safetensors"),
            ["broken/q4.safetensors: transformers looks for model.safetensors only: rename the file"],
        ),
        _need("optimum", quant_method="gptq", bits=4),
        _need("bitsandbytes", quant_method="bitsandbytes", load_in_4bit=True),
    ],
)
def test_evaluate_broken_checkpoint_is_refused_with_reason(
    change: Callable[[Path], Any],
    parts: list[str],
    broken: Callable[[Callable[[Path], Any]], Path],
    refused: Callable[..., str],
) -> None:
    message = refused(broken(change))
    for part in parts:
        assert part in message


@pytest.mark.parametrize(("change", "name"), PICKLES)
def test_load_pickle_file_is_refused(
    change: Callable[[Path], Any], name: str, broken: Callable[[Callable[[Path], Any]], Path]
) -> None:
    with pytest.raises(UserError, match=f"{name} is a pickle file, which can run any code .*: convert the model"):
        omniq.load(broken(change))


def test_load_truncated_file_is_named(broken: Callable[[Callable[[Path], Any]], Path]) -> None:
    with pytest.raises(UserError, match=r"broken/model\.safetensors is truncated or corrupt"):
        omniq.load(broken(truncate))


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ("--batch 0", "batch 0 is too small: give 1 or more"),
        ("--device cuda", "device 'cuda': no GPU is present; use cpu or auto"),
        ("--device mps", "device 'mps' cannot be used ("),
        ("--device xla", "device 'xla' cannot be used ("),
        ("--device meta", "device 'meta' cannot be used ("),
        ("--device abacus", "): use cpu, cuda or auto"),
        ("--out PLACE/nowhere/x.json", "nowhere is not a folder; create it or choose another"),
        ("--out PLACE", "cannot be written: it is a folder; give the name of a file in it"),
        ("--model.attention flash_attention_2", "model.attention 'flash_attention_2'"),
    ],
)
@pytest.mark.parametrize("name", ["source", "quantized"])
def test_evaluate_impossible_options_are_refused_before_measuring(
    name: str, options: str, part: str, place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(evaluate_command, "evaluate_model", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(evaluate_command, "evaluate_streamed", lambda *_: pytest.fail("measured"))
    if "mps" in options and torch.backends.mps.is_available():
        pytest.skip("there is such a device here")
    assert part in refused(place / name, *options.replace("PLACE", str(place)).split())


def test_evaluate_without_permission_for_result_is_refused(
    place: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *rest, **more: not Path(path).is_dir() and real(path, *rest, **more))
    assert "cannot be written: no permission in" in refused(place / "source", "--out", str(place / "x.json"))
