# SPDX-License-Identifier: Apache-2.0
"""The ``lightning`` command passes each command line to the right program and leaves ``sys.argv`` unchanged."""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest

from omniq.cli import lightning_run


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[str]]]:
    """What was called instead of omniq and of Fabric; no other distribution owns ``lightning``."""
    calls: list[tuple[str, Sequence[str]]] = []
    monkeypatch.setattr("omniq.cli.main", lambda args: calls.append(("omniq", args)))
    monkeypatch.setattr(lightning_run, "_fabric", lambda args: calls.append(("fabric", args)))
    monkeypatch.setattr(lightning_run, "entry_points", lambda **_: [])
    lightning_run.warn_if_contested.cache_clear()
    return calls


@pytest.fixture
def rival(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A real second distribution on the path that claims the script; returns its name."""
    info = tmp_path / "lightning_sdk-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lightning-sdk\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nlightning = rival_entry:main_cli\n")
    code = "import sys\ndef main_cli():\n    print('rival', sys.argv)\n    return 7\n"
    (tmp_path / "rival_entry.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    lightning_run.warn_if_contested.cache_clear()
    return "lightning-sdk"


@pytest.mark.parametrize(
    ("line", "target", "passed"),
    [
        ("run quantize --config a.yaml", "omniq", "quantize --config a.yaml"),
        ("run evaluate --model m.py", "omniq", "evaluate --model m.py"),
        ("run export", "omniq", "export"),
        ("run report --help", "omniq", "report --help"),
        ("run --config a.yaml --config b.yaml", "omniq", "quantize --config a.yaml --config b.yaml"),
        ("run --seed 3 --config=a.yaml", "omniq", "quantize --seed 3 --config=a.yaml"),
        ("run train.py --lr 1", "fabric", "train.py --lr 1"),
        ("run model train.py --lr 1", "fabric", "train.py --lr 1"),
        ("run model --devices 2 train.py", "fabric", "--devices 2 train.py"),
    ],
)
def test_lightning_run_line_reaches_its_target(
    calls: list[tuple[str, Sequence[str]]], line: str, target: str, passed: str
) -> None:
    assert lightning_run.main(line.split()) is None
    assert calls == [(target, passed.split())]


def test_lightning_run_passes_exit_status_on(calls: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("omniq.cli.main", lambda args: 2)
    assert lightning_run.main(["run", "quantize"]) == 2


def test_lightning_run_leaves_argv_for_other_ranks(
    calls: list[tuple[str, Sequence[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning starts ranks 1, 2, ... by running ``sys.argv`` again."""
    line = ["lightning", "run", "--config", "a.yaml"]
    monkeypatch.setattr(sys, "argv", line)
    lightning_run.main()
    assert calls == [("omniq", ["quantize", "--config", "a.yaml"])]
    assert sys.argv is line
    assert line == ["lightning", "run", "--config", "a.yaml"]


@pytest.mark.parametrize("line", ["", "run", "run model", "run job", "login", "run script.sh"])
def test_lightning_run_unknown_line_says_what_is_possible(
    calls: list[object], capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert lightning_run.main(line.split()) == 2
    error = capsys.readouterr().err
    assert f"`{' '.join(['lightning', *line.split()])}` is not a command of omniq" in error
    assert "lightning run --config FILE" in error
    assert not calls


@pytest.mark.parametrize("line", ["--help", "-h", "run --help", "run -h"])
def test_lightning_run_help_is_printed(calls: list[object], capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert lightning_run.main(line.split()) == 0
    assert "lightning run [model] SCRIPT.py" in capsys.readouterr().out
    assert not calls


def test_lightning_run_script_reaches_fabric_with_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fabric's own command line parses the arguments; only its launch is replaced."""
    seen: list[tuple[Namespace, list[str]]] = []
    monkeypatch.setattr("lightning.fabric.cli.main", lambda args, script_args: seen.append((args, script_args)))
    script = tmp_path / "train.py"
    script.touch()
    with pytest.raises(SystemExit) as stop:
        lightning_run.main(["run", "model", "--devices", "2", str(script), "--lr", "1"])
    assert stop.value.code == 0
    ((args, script_args),) = seen
    assert (args.script, args.devices, script_args) == (str(script), "2", ["--lr", "1"])


def test_lightning_run_script_without_click_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delattr("lightning.fabric.cli._main")
    assert lightning_run.main(["run", "train.py"]) == 2
    assert "pip install click" in capsys.readouterr().err


def test_lightning_run_other_command_goes_to_other_owner(
    rival: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning", "login", "--now"])
    assert lightning_run.other_owner() == rival
    assert lightning_run.main() == 7
    assert capsys.readouterr().out == "rival ['lightning', 'login', '--now']\n"


def test_lightning_run_contested_command_warns_once_on_first_rank(
    rival: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("omniq.cli.main", lambda args: 0)
    for _ in range(2):
        assert lightning_run.main(["run", "quantize"]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{rival} also installs a `lightning` command" in error
    lightning_run.warn_if_contested.cache_clear()
    monkeypatch.setenv("LOCAL_RANK", "1")
    lightning_run.main(["run", "quantize"])
    assert not capsys.readouterr().err


def test_lightning_run_without_other_owner_is_silent(calls: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    assert lightning_run.other_owner() is None
    lightning_run.warn_if_contested()
    assert not capsys.readouterr().err


def test_lightning_run_help_imports_no_torch() -> None:
    code = "import sys; from omniq.cli.lightning_run import main; main(['run', '-h']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0
