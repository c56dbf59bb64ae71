# SPDX-License-Identifier: Apache-2.0
"""The command line: how configurations compose, and the commands beside quantize."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import lightning as L
import pytest
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator

from omniq.cli.command import main
from omniq.cli.quiet import quiet
from omniq.config.class_paths import allowed_imports
from omniq.config.compose import compose
from omniq.config.parse import parse_run, run_of
from omniq.errors import UserError
from omniq.stages import RTN, OmniQuant
from tests.helpers.runs import QUICK, configuration, write_config

ROOT = Path(__file__).resolve().parents[2]
LEARNED = "stages: [{class_path: omniq.stages.OmniQuant, init_args: {epochs: 13, token_weights: relative}}]"
HUB = "source: {class_path: omniq.data.HubText, init_args: {path: wiki, split: held-out}}"
LOGGER = "trainer: {logger: {class_path: CSVLogger, init_args: {save_dir: here, name: mine}}}"
TRAINER = f"trainer: {{class_path: {__name__}.OwnTrainer, init_args: {{precision: 32-true, blocks: 3}}}}"


class OwnTrainer(L.Trainer):
    """A Trainer of the user's own package."""

    def __init__(self, precision: str = "bf16-mixed", accelerator: str = "cpu", blocks: int = 1, **others: Any) -> None:
        super().__init__(precision=precision, accelerator=accelerator, logger=blocks > 1, **others)


def resolved(folder: Path, *layers: str, options: Sequence[str] = ()) -> dict[str, Any]:
    """What a run on the command line is, by ``run.yaml`` and these files on top; and by Python alike."""
    files = [folder / "run.yaml"]
    for number, layer in enumerate(layers):
        files.append(folder / f"layer{number}.yaml")
        files[-1].write_text(layer)
    with allowed_imports([__name__]):
        _, shown = run_of(compose(files), options)
    if not options:
        assert parse_run(files, allow_import=[__name__])[1] == shown
        assert parse_run(files[:-1], yaml.safe_load(layers[-1]), allow_import=[__name__])[1] == shown
    return yaml.safe_load(shown)


def test_print_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is shown, defaults included, and what is shown is itself a configuration."""
    with pytest.raises(SystemExit) as caught:
        main(["quantize", "--config", str(folder / "run.yaml"), "--print_config"])
    assert caught.value.code == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown["scheme"]["name"] == "W3A16g16"
    assert shown["scheme"]["symmetric"] is False
    assert shown["stages"][0]["init_args"]["clipping_lr"] == 0.01
    assert shown["trainer"]["init_args"]["accelerator"] == "cpu"

    (folder / "shown.yaml").write_text(yaml.safe_dump(shown))
    assert parse_run([folder / "shown.yaml"])[1] == parse_run([folder / "run.yaml"])[1]


def test_files_compose_and_options_override(folder: Path) -> None:
    """Later files win key by key, lists are replaced, ``stages+`` appends, options have the last word."""
    (folder / "data.yaml").write_text("data: {samples: 7, seed: 5}")
    (folder / "stages.yaml").write_text("stages: [{class_path: omniq.stages.RTN}]")
    (folder / "more.yaml").write_text("stages+: [{class_path: omniq.stages.OmniQuant, init_args: {epochs: 9}}]")
    run, settings = parse_run([folder / name for name in ("run.yaml", "data.yaml", "stages.yaml", "more.yaml")])
    assert (run.data.samples, run.data.seed, run.data.length) == (7, 5, 24)
    assert [type(stage) for stage in run.stages] == [RTN, OmniQuant]
    assert run.stages[1].epochs == 9
    assert yaml.safe_load(settings)["data"]["samples"] == 7
    run, _ = parse_run([folder / "run.yaml", folder / "data.yaml"], {"data": {"samples": 2}, "seed": 8})
    assert (run.data.samples, run.data.seed, run.seed) == (2, 5, 8)


@pytest.mark.parametrize(
    "later",
    [
        "stages: [{class_path: omniq.stages.LearnedRounding}]",
        "stages: [omniq.stages.LearnedRounding]",
        "stages: [{class_path: omniq.stages.OmniQuant}]",
        "stages: [{class_path: omniq.stages.RTN}, {class_path: omniq.stages.LearnedRounding}]",
    ],
)
def test_a_later_list_of_stages_starts_afresh(folder: Path, later: str) -> None:
    """Whatever was there; an option after it sets the last stage."""
    assert resolved(folder, LEARNED)["stages"][0]["init_args"]["epochs"] == 13
    last = resolved(folder, "stages: []", later)["stages"][-1]
    assert last["init_args"]["epochs"] in (10, 20)  # the defaults of LearnedRounding and OmniQuant
    assert resolved(folder, LEARNED, later)["stages"][-1] == last
    changed = resolved(folder, LEARNED, later, options=["--stages.epochs", "5"])["stages"][-1]
    assert changed == {**last, "init_args": {**last["init_args"], "epochs": 5}}


def test_a_later_file_that_gives_no_list_of_stages_keeps_it(folder: Path) -> None:
    before = resolved(folder, LEARNED)["stages"]
    assert resolved(folder, LEARNED, "scheme: {name: W4A16}\ntrainer: {precision: 32-true}")["stages"] == before
    more = resolved(folder, LEARNED, "stages+: [{class_path: omniq.stages.RTN}]\ndata: {source: Stdlib}")["stages"]
    assert more == [*before, {"class_path": "omniq.stages.RTN", "init_args": {}}]
    changed = resolved(folder, LEARNED, options=["--stages.clipping_lr", "0.02"])["stages"][0]
    assert changed["init_args"] == {**before[0]["init_args"], "clipping_lr": 0.02}


def test_an_entry_of_a_later_list_names_its_class(folder: Path) -> None:
    (folder / "unnamed.yaml").write_text("stages: [{init_args: {epochs: 3}}]")
    with pytest.raises(UserError, match="Not a valid subclass of Stage"):
        parse_run([folder / "run.yaml", folder / "unnamed.yaml"])


def test_class_in_a_later_file_replaces_the_earlier_one_whole(folder: Path) -> None:
    """The same class too; settings without a class change the one that is there."""
    text = f"data: {{{HUB}}}\nevaluation: {{{HUB}, length: 9}}"
    stdlib = {"class_path": "omniq.data.Stdlib", "init_args": {"split": "calibration"}}
    for later in ("source: {class_path: omniq.data.Stdlib}", "source: Stdlib"):
        found = resolved(folder, text, f"data: {{{later}}}\nevaluation: {{{later}}}")
        assert (found["data"]["source"], found["evaluation"]["source"]) == (stdlib, stdlib)
        assert found["evaluation"]["length"] == 9
    for name in ("class_path: omniq.data.HubText, ", "class_path: HubText, "):
        later = f"data: {{source: {{{name}init_args: {{path: mine}}}}}}"
        given = resolved(folder, text, later)["data"]["source"]["init_args"]
        assert (given["path"], given["split"]) == ("mine", "train")
    for later in ("data: {source: {init_args: {path: mine}}}", "data: {source: {path: mine}}"):
        given = resolved(folder, text, later)["data"]["source"]["init_args"]
        assert (given["path"], given["split"]) == ("mine", "held-out")


def test_trainer_and_its_loggers_in_later_files_follow_the_same_rule(folder: Path) -> None:

    def trainer(*layers: str) -> dict[str, Any]:
        return resolved(folder, *layers)["trainer"]["init_args"]

    found = trainer(LOGGER, "trainer: {logger: {init_args: {save_dir: there}}, precision: 32-true}")
    assert found["accelerator"] == "cpu"  # of run.yaml
    assert (found["logger"]["init_args"]["save_dir"], found["logger"]["init_args"]["name"]) == ("there", "mine")
    other = "{class_path: TensorBoardLogger, init_args: {save_dir: there}}"
    for layer in (f"trainer: {{logger: {other}}}", f"trainer: {{init_args: {{logger: {other}}}}}"):
        assert trainer(LOGGER, layer)["logger"]["init_args"]["name"] == "lightning_logs"
    lists = [
        f"trainer: {{logger: [{{class_path: CSVLogger, init_args: {{save_dir: {x}}}}}]}}" for x in ("a, name: b", "c")
    ]
    for earlier in (LOGGER, lists[0]):
        assert trainer(earlier, lists[1])["logger"][0]["init_args"]["name"] == "lightning_logs"
    found = trainer(LOGGER, TRAINER)
    assert (found["precision"], found["accelerator"], found["blocks"]) == ("32-true", "cpu", 3)
    assert trainer("trainer: {accelerator: gpu}", TRAINER)["accelerator"] == "cpu"  # of OwnTrainer
    assert trainer(TRAINER, "trainer: {accelerator: auto}")["blocks"] == 3
    found = trainer(TRAINER, "trainer: {class_path: lightning.pytorch.Trainer}")
    assert "precision" not in found  # which is not shown where it is None
    assert found["accelerator"] == "auto"


def test_the_demo_on_a_text_of_the_hub() -> None:
    """Its own text has a split of another name."""
    for text in ("c4", "wikitext2"):
        run, _ = parse_run([ROOT / "configs/demo.yaml", ROOT / f"configs/data/{text}.yaml"])
        assert run.data.source.split == "train"


def test_options_on_the_command_line(folder: Path, tmp_path: Path) -> None:
    """Nested keys, keys of the last stage, and another class in place of the one in the file."""
    args = ["quantize", "--config", str(folder / "run.yaml"), "--out", str(tmp_path / "run")]
    args += ["--scheme.name", "W4A16", "--data.samples=2", "--stages.init_args.epochs", "1"]
    args += ["--export.format", "none", "--evaluation", "null"]
    args += ["--stages.init_args.clipping.init_args.initial", "omniq.quantizers.clipping.Searched"]
    assert main(args) == 0
    settings = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert settings["scheme"]["name"] == "W4A16"
    assert settings["data"]["samples"] == 2
    assert settings["stages"][0]["init_args"]["epochs"] == 1
    assert "Searched" in str(settings["stages"][0])


def test_evaluate_export_report(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run without a checkpoint is exported later; what is measured on it is what the run measured."""
    run, out = tmp_path / "run", tmp_path / "exported"
    args = write_config(
        tmp_path / "run.yaml",
        configuration(folder, export={"format": "none"}, scheme={"name": "W4A16", "dtype": "float32"}),
    )
    assert main(["export", "--run", str(run), "--out", str(out)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert main([*args, "--out", str(run)]) == 0
    assert main(["export", "--run", str(run), "--out", str(out)]) == 0
    assert main(["report", "--run", str(run)]) == 0
    shown = capsys.readouterr().out
    assert "relative" in shown
    assert "…" not in shown  # no header is cut
    assert "round to nearest" in shown
    text = yaml.safe_dump({"evaluation": configuration(folder)["evaluation"]})
    (tmp_path / "text.yaml").write_text(text)
    measured = json.loads((run / "perplexity.json").read_text())["models"]
    for model, name in ((folder / "source", "full precision"), (out, "omniq")):
        evaluate = ["evaluate", "--config", str(tmp_path / "text.yaml"), "--model.path", str(model), "--device", "cpu"]
        assert main([*evaluate, "--out", str(tmp_path / "result.json")]) == 0
        found = json.loads((tmp_path / "result.json").read_text())
        assert f"{measured[name]['perplexity']:.2f}" in capsys.readouterr().out
        assert str(round(measured[name]["perplexity"], 3))[:6] in json.dumps(found)


def test_export_over_an_earlier_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What is there of another format or another run is replaced, and that is said; the same export is kept."""
    run, out = tmp_path / "run", tmp_path / "exported"

    def export(*options: str, run: Path = run) -> str:
        assert main(["export", "--run", str(run), "--out", str(out), *options]) == 0
        said = capsys.readouterr()
        return "".join((said.out + said.err).split())  # a terminal's width breaks lines anywhere

    args = write_config(tmp_path / "run.yaml", configuration(folder, **QUICK))
    assert main([*args, "--out", str(run)]) == 0
    assert main([*args, "--out", str(tmp_path / "other"), "--seed", "5"]) == 0
    capsys.readouterr()
    out.mkdir()
    assert f"writing{out}informatcompressed-tensorsverified" in export()
    said = export("--export.format", "omniq")
    assert said.startswith(f"writing{out}informatomniq,intheplaceofanexportinformatcompressed-tensorsverified")
    before = (out / "model.safetensors").stat().st_ino
    assert export("--export.format", "omniq").startswith("verified")
    assert (out / "model.safetensors").stat().st_ino == before
    said = export("--export.format", "omniq", "--export.verify", "false", run=tmp_path / "other")
    assert said == f"writing{out}informatomniq,intheplaceofanexportinformatomniq"
    assert (out / "model.safetensors").stat().st_ino != before
    assert not caplog.text
    assert "writing" in export("--export.format", "omniq")
    assert f"{out} is not the checkpoint of this run (" in caplog.text


def test_export_refuses_before_it_opens_the_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = write_config(tmp_path / "run.yaml", configuration(folder, **QUICK))
    assert main([*args, "--out", str(tmp_path / "run")]) == 0
    monkeypatch.setattr("omniq.run.saved.open_model", lambda _: pytest.fail("opened"))
    export = ["export", "--run", str(tmp_path / "run"), "--out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    assert main([*export, str(tmp_path / "mine")]) == 2
    assert "it holds something that omniq did not export; choose an empty" in capsys.readouterr().err
    assert main([*export, str(tmp_path / "out"), "--export.format", "none"]) == 2
    assert "export format 'none' is not known: choose one of compressed-tensors, omniq" in capsys.readouterr().err


def test_parse_run_refuses_in_one_line(folder: Path) -> None:
    with pytest.raises(UserError, match="wbits"):
        parse_run([folder / "run.yaml"], {"scheme": {"wbits": 3}})


def test_report_changes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a damaged record either: it is named, after what can be shown."""
    run = tmp_path / "run"
    args = write_config(tmp_path / "run.yaml", configuration(folder, export={"format": "none"}))
    assert main([*args, "--out", str(run)]) == 0
    record = run / "perplexity.json"
    record.write_text(record.read_text().replace("1", "2"))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["report", "--run", str(run)]) == 2
    said, errors = capsys.readouterr()
    assert "seconds" in said
    assert f"{record}: the checksum does not match its content; run the quantize command again" in errors
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("command", ["quantize", "evaluate", "export", "report"])
def test_interruption(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only a run is continued by the same command."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    for place in (
        "run.loop.quantize",
        "cli.evaluate.evaluate_checkpoint",
        "run.saved.export_run",
        "cli.report.show_run",
    ):
        monkeypatch.setattr(f"omniq.{place}", interrupt)
    (folder / "text.yaml").write_text(yaml.safe_dump({"evaluation": configuration(folder)["evaluation"]}))
    options = {
        "quantize": ["--config", str(folder / "run.yaml")],
        "evaluate": ["--config", str(folder / "text.yaml"), "--model.path", "x"],
        "export": ["--run", "x", "--out", "y"],
        "report": ["--run", "x"],
    }
    assert main([command, *options[command]]) == 130
    continues = "; the same command continues this run" if command == "quantize" else ""
    assert capsys.readouterr().err == f"omniq: interrupted{continues}\n"


def test_only_own_warnings_are_said_in_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root, own = logging.getLogger(), logging.getLogger("omniq")
    monkeypatch.setattr(root, "handlers", [])  # pytest has one there
    monkeypatch.setattr(own, "handlers", [])
    for _ in range(2):
        quiet()
    own.warning("mind this")
    logging.getLogger("omniq.models.source").warning("and this")
    logging.getLogger("somebody.else").warning("retrying")
    assert capsys.readouterr().err == "omniq: mind this\nomniq: and this\nretrying\n"
    assert not root.handlers


def test_no_line_for_every_block_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning tells which devices it sees whenever a Trainer begins."""
    log, told = logging.getLogger(CUDAAccelerator.__module__), Mock(level=logging.NOTSET)
    monkeypatch.setattr(log, "handlers", [told])
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    log.setLevel(logging.NOTSET)
    CUDAAccelerator.set_nvidia_flags(0)
    assert told.handle.call_count == 1
    quiet()
    CUDAAccelerator.set_nvidia_flags(0)
    assert told.handle.call_count == 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a: \xff\xfe", "is not UTF-8 text ("),
        (b"", "holds no settings: give a YAML file"),
        (b"# nothing yet\n", "holds no settings: give a YAML file"),
        (b"- 1\n", "holds no settings: give a YAML file"),
        (b"a:\n\t- b", "is not valid YAML (while scanning for the next token"),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "evaluate"])
def test_a_config_that_cannot_be_read_is_named(
    command: str, content: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes(content)
    assert main([command, "--config", str(file)]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"omniq: config {file} {reason}")
    assert message.count("\n") == 1
    with pytest.raises(UserError, match="mine.yaml"):
        parse_run([file])


@pytest.mark.parametrize(
    ("config", "reason"), [("-", "does not exist: give"), (".", "cannot be read ("), ("a\0b", "is not UTF-8 text (")]
)
def test_config_that_is_no_file_is_refused(config: str, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "--config", config]) == 2
    assert f"omniq: config {config} {reason}" in capsys.readouterr().err
