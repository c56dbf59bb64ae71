# SPDX-License-Identifier: Apache-2.0
"""The command line: its options, the commands beside quantize, and what reaches the terminal."""

import json
import logging
from pathlib import Path
from unittest.mock import Mock

import pytest
import yaml
from lightning.pytorch.accelerators import CUDAAccelerator

from omniq.cli.command import main
from omniq.cli.quiet import quiet
from omniq.config.parse import parse_run
from omniq.errors import UserError
from omniq.storage.records import save_record
from tests.helpers.runs import QUICK, configuration, write_config


def test_print_config_shows_complete_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output includes all defaults and is itself a configuration."""
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


def test_quantize_options_on_command_line_set_nested_keys(folder: Path, tmp_path: Path) -> None:
    """Options set nested keys, keys of the last stage, and another class than that of the file."""
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


def test_export_evaluate_and_report_repeat_measured_perplexity(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without a checkpoint is exported later; the export has the perplexity that the run measured."""
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


def test_export_over_earlier_export_replaces_different_one_only(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """An export of another format or run is replaced with a warning; an identical export is kept."""
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
    assert said.startswith(f"writing{out}informatomniq,replacinganexportinformatcompressed-tensorsverified")
    before = (out / "model.safetensors").stat().st_ino
    assert export("--export.format", "omniq").startswith("verified")
    assert (out / "model.safetensors").stat().st_ino == before
    said = export("--export.format", "omniq", "--export.verify", "false", run=tmp_path / "other")
    assert said == f"writing{out}informatomniq,replacinganexportinformatomniq"
    assert (out / "model.safetensors").stat().st_ino != before
    assert not caplog.text
    assert "writing" in export("--export.format", "omniq")
    assert f"{out} is not the checkpoint of this run (" in caplog.text


def test_export_to_unusable_place_or_format_is_refused_before_opening_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = write_config(tmp_path / "run.yaml", configuration(folder, **QUICK))
    assert main([*args, "--out", str(tmp_path / "run")]) == 0
    monkeypatch.setattr("omniq.run.saved.open_model", lambda _: pytest.fail("opened"))
    export = ["export", "--run", str(tmp_path / "run"), "--out"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").touch()
    assert main([*export, str(tmp_path / "mine")]) == 2
    assert "it is not an omniq export: choose an empty" in capsys.readouterr().err
    assert main([*export, str(tmp_path / "out"), "--export.format", "none"]) == 2
    assert (
        "export format 'none' is not known: choose one of auto-round, awq, compressed-tensors"
        in capsys.readouterr().err
    )


def test_report_of_damaged_record_names_it_and_changes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report first shows the undamaged records, then names the damaged one."""
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
    save_record(record, {"format": "omniq"})  # such as export.json in its place
    assert main(["report", "--run", str(run)]) == 2
    assert f"{record}: it is the content of another file of a run; run the quantize" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["quantize", "evaluate", "export", "report"])
def test_command_interrupted_says_so_in_one_line(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only an interrupted ``quantize`` can be continued by the same command."""

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


def test_quiet_prefixes_own_warnings_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_quiet_silences_devices_line_of_lightning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning logs the visible devices for each Trainer, that is, for each block."""
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
def test_command_config_with_bad_content_is_named(
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
def test_quantize_config_that_is_no_file_is_refused(
    config: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["quantize", "--config", config]) == 2
    assert f"omniq: config {config} {reason}" in capsys.readouterr().err
