# SPDX-License-Identifier: Apache-2.0
"""Bad input on the command line gives one line and status 2 before anything is written."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from omniq.cli.command import main
from omniq.config.trainer import COMPUTE_DTYPES


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("--scheme.wbits 3", ["--scheme.wbits 3", "--help"]),
        ("--nothing 1", ["--nothing 1", "--help"]),
        ("--stages omniq.stages.Nothing", ["stages: no class is named omniq.stages.Nothing: give one of AWQ, GPTQ"]),
        ("--stages.help Nothing", ["stages: no class is named Nothing: give one of AWQ, GPTQ, RTN"]),
        ("--data.source.help Nothing", ["data.source: no class is named Nothing: give one of Stdlib, LocalText"]),
        ("--callbacks.help Nothing", ["callbacks: no class is named Nothing: give a class path such as"]),
        ("--stages.init_args.epoch 3", ["epoch", "not accepted"]),
        ("--stages.init_args.epochs many", ["epochs", "many"]),
        ("--stages.init_args.schedule linear", ["schedule", "'constant', 'cosine'", "linear"]),
        ("--stages []", ["stages is empty: give at least one"]),
        ("--stages.init_args.epochs 0", ["OmniQuant.epochs 0 is too small"]),
        ("--stages.init_args.batch_size 0", ["OmniQuant.batch_size 0 is too small"]),
        ("--stages.init_args.clipping_lr=-1", ["OmniQuant.clipping_lr -1.0 is not between 0 and 1"]),
        ("--scheme.name W1A16", ["weight bits 1 are outside 2..8: choose"]),
        ("--scheme.name W9A16", ["weight bits 9 are outside 2..8: choose"]),
        ("--scheme.name 4bit", ["scheme '4bit' is not valid: write W<bits>A<bits>"]),
        ("--scheme.name W4A16g0", ["group size 0 is not valid"]),
        (
            "--scheme.name W4A16g48",
            ["group size 48 does not divide the 32 inputs of model.layers.0.self_attn.q_proj", "16, 32, or -1"],
        ),
        ("--scheme.dtype int8", ["scheme.dtype", "int8", "'float16', 'bfloat16', 'float32'"]),
        ("--scheme.name W4A12", ["scheme.name 'W4A12': activations of 12 bits are not valid: use 2 to 8, or 16"]),
        ("--scheme.name W4A4KV12", ["scheme.name 'W4A4KV12': keys and values of 12 bits are not valid: use 2"]),
        ("--scheme.name W4A4KV4", ["compressed-tensors does not support a dynamic KV cache of 4 bits: use KV16"]),
        ("--scheme.activation_symmetric true", ["scheme.activation_symmetric: 'W3A16g16' quantizes no activations"]),
        ("--scheme.activation_range tensor", ["scheme.activation_range: 'W3A16g16' quantizes no inputs of linears"]),
        ("--scheme.activation_range row", ["scheme.activation_range", "'token', 'tensor'", "row"]),
        ("--scheme.queries true", ["scheme.queries: 'W3A16g16' has no activation bits to give to queries; use a name"]),
        (
            "--stages.transform.alpha 1.5",
            ["omniq: alpha 1.5 is outside 0 to 1: give 0 to keep the range of activations, up"],
        ),
        (
            "--stages.transform.lr 0",
            ["omniq: transform.lr 0.0 is not between 0 and 1: give a learning rate such as 5e-3"],
        ),
        (
            "--stages.transform.equivalences []",
            ["omniq: transform.equivalences: an empty list is not accepted: choose"],
        ),
        ("--stages+=omniq.stages.SmoothQuant --stages.alpha=-1", ["omniq: alpha -1.0 is outside 0 to 1: give 0"]),
        ("--stages.token_weights mean", ["token_weights", "'uniform', 'relative'", "mean"]),
        (
            "--stages.token_weigths relative",
            ["'token_weigths' is not accepted", "--stages.help omniq.stages.OmniQuant"],
        ),
        ("--data.samples 0", ["data.samples: 0 is too few; give 1 or more"]),
        ("--data.length 1", ["data.length: 1 is too few; give 2 or more"]),
        ("--data.length 129", ["data.length: 129 tokens exceed the model's 128 positions: give fewer"]),
        ("--evaluation.length 129", ["evaluation.length: 129 tokens exceed the model's 128 positions: give fewer"]),
        (
            "--data.source.init_args.path SHORT",
            ["data.source: the text is too short", "needs 48 tokens, found 8", "data.length"],
        ),
        (
            "--evaluation.source.init_args.path SHORT",
            ["evaluation.source: the text is too short", "24 tokens, found 8", "evaluation.length"],
        ),
        ("--data.source.init_args.path /no/such.txt", ["LocalText.path: '/no/such.txt' does not exist; give a file"]),
        ("--data.source.init_args.path EMPTY", ["LocalText.path: ", "is empty; give a file with text in it"]),
        ("--data.source.init_args.path BLANK", ["LocalText.path: ", "holds no text; give a file with text in it"]),
        ("--data.source.init_args.max_documents 0", ["LocalText.max_documents: 0 is too few; give 1 or more"]),
        ("--seed=-1", ["seed -1 is out of range: give a number from 0 to 999999999"]),
        ("--seed 1000000000", ["seed 1000000000 is out of range: give a number from 0 to 999999999"]),
        ("--data.seed 1000000000", ["data.seed 1000000000 is out of range: give a number from 0"]),
        ("--batch 0", ["batch 0 is too small: give 1 or more"]),
        ("--batch x", ["batch", "x"]),
        ("--matmul fp16", ["matmul 'fp16' is not accepted: give one of 'tf32', 'ieee', 'bf16'"]),
        ("--save_streams_every=-1", ["save_streams_every -1 is negative: give 0"]),
        ("--export.max_shard_size 0", ["export.max_shard_size 0.0 is not a valid size: give gigabytes"]),
        ("--export.max_shard_size=-1", ["export.max_shard_size -1.0 is not a valid size"]),
        ("--export.max_shard_size .inf", ["export.max_shard_size inf is not a valid size"]),
        ("--export.format gguf9", ["export.format 'gguf9' is not accepted: give one of 'compressed-tensors'"]),
        ("--model.path /no/such/model", ["model.path '/no/such/model' does not exist: give a folder"]),
        ("--model.path /no/such.gguf", ["model.path '/no/such.gguf' does not exist: give a folder"]),
        ("--model.path ~no-such-user/model", ["~no-such-user/model: this user has no home folder; give"]),
        ("--out=~no-such-user/run", ["~no-such-user/run: this user has no home folder; give the path"]),
        (
            "--model.dtype bfloat16",
            ["model.dtype 'bfloat16' is no longer a setting of omniq quantize", "trainer.precision"],
        ),
        (
            "--trainer.precision 16-true",
            ["trainer.precision '16-true' would round the learned parameters", *COMPUTE_DTYPES],
        ),
        ("--trainer.precision 64-true", ["trainer.precision '64-true' is not supported: use one"]),
        ("--trainer.num_nodes 2", ["trainer.num_nodes 2 means 2 process(es), but one was started", "--nnodes 2"]),
        ("--trainer.precision 16-mixed", ["trainer.precision '16-mixed' needs a GPU: use bf16-mixed or 32-true"]),
        ("--trainer.nothing 1", ["nothing", "not accepted"]),
        ("--trainer.accelerator abacus", ["trainer: ", "abacus", "Available names"]),
        ("--trainer.strategy abacus", ["trainer.strategy 'abacus' is not supported", "remove it"]),
        ("--trainer.max_epochs 3", ["trainer.max_epochs 3 is set by omniq for each block: use a stage's epochs"]),
        ("--trainer.max_epochs 0", ["trainer.max_epochs 0 is set by omniq for each block: use a stage's epochs"]),
        ("--trainer.max_steps 3", ["trainer.max_steps 3", "use a stage's epochs"]),
        ("--trainer.max_steps 0", ["trainer.max_steps 0 is set by omniq for each block: use a stage's epochs"]),
        ("--trainer.callbacks []", ["trainer.callbacks [] is set by omniq for each block: use the callbacks section"]),
        ("--trainer.default_root_dir /x", ["trainer.default_root_dir", "use out"]),
        ("--trainer.limit_train_batches 2", ["trainer.limit_train_batches 2", "use data.samples"]),
        ("--trainer.limit_train_batches 0", ["trainer.limit_train_batches 0 is set by omniq for each block: use data"]),
        ("--trainer.limit_train_batches 0.0", ["trainer.limit_train_batches 0.0 is set by omniq for each block"]),
        ("--trainer.accumulate_grad_batches 2", ["trainer.accumulate_grad_batches 2", "use a stage's batch_size"]),
        ("--trainer.gradient_clip_val 1.0", ["trainer.gradient_clip_val 1.0 is set by omniq for each block"]),
        ("--trainer.fast_dev_run true", ["trainer.fast_dev_run True", "use data.samples"]),
        ("--trainer.max_time 00:01:00:00", ["trainer.max_time", "killed at any moment and continued"]),
        ("--trainer.barebones true", ["trainer.barebones True"]),
        ("--trainer.enable_checkpointing true", ["trainer.enable_checkpointing True"]),
        ("--out FILE/run", ["out ", "FILE/run cannot be written: ", "FILE is a file; choose another folder"]),
        ("--config MISSING.yaml", ["MISSING.yaml does not exist: give a YAML file"]),
        ("--config BROKEN.yaml", ["line 1, column"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_quantize_bad_options_are_refused_with_reason(
    options: str, parts: list[str], folder: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "EMPTY.txt").write_text("")
    (folder / "BLANK.txt").write_text(" \n ")
    (folder / "SHORT.txt").write_text("a word\n\n")
    (folder / "FILE").write_text("")
    (folder / "BROKEN.yaml").write_text("a: [1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    named = {"EMPTY": "EMPTY.txt", "BLANK": "BLANK.txt", "SHORT": "SHORT.txt", "FILE/run": "FILE/run"}
    words = [
        str(folder / named.get(word, word)) if word in named or word in ("MISSING.yaml", "BROKEN.yaml") else word
        for word in options.split()
    ]
    message = refused(*words)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("accelerator", ["gpu", "cuda"])
def test_quantize_on_absent_gpu_is_refused(
    accelerator: str, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    message = refused("--trainer.accelerator", accelerator)
    assert f"trainer.accelerator '{accelerator}': no GPU is present; use cpu or auto" in message


def test_quantize_file_with_unknown_section_is_refused(refused: Callable[..., str]) -> None:
    assert "quantizer" in refused(config={"quantizer": {"bits": 3}})
    assert "lenght" in refused(config={"data": {"lenght": 3}})


def test_quantize_without_required_sections_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "model.path" in message  # the presets have stages, and the text of a preset is C4


@pytest.mark.parametrize("args", [[], ["quantise"], ["--config", "x.yaml"]])
def test_main_unknown_command_is_refused_in_one_line(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 2
    message = capsys.readouterr().err
    assert message.startswith("omniq: ")
    assert message.count("\n") == 1
