# SPDX-License-Identifier: Apache-2.0
"""Class paths of a configuration are refused before they are imported or instantiated."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml
from jsonargparse._common import get_parsing_setting

from omniq.cli.command import main
from omniq.config.class_paths import VARIABLE
from omniq.config.parse import parse_run
from omniq.errors import UserError

RUN: dict[str, Any] = {
    "model": {"path": "x"},
    "data": {"source": "omniq.data.Stdlib"},
    "stages": ["omniq.stages.RTN"],
}


def named(path: str, /, **arguments: Any) -> dict[str, Any]:
    return {"class_path": path, "init_args": arguments}


def inside(stage: dict[str, Any]) -> dict[str, Any]:
    return {"stages": [stage]}


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that leaves a mark when it is imported, and more of them when it is used."""
    name = f"package_of_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(
        "from pathlib import Path\nimport lightning as L\nfrom lightning.pytorch.callbacks import Callback\n"
        f"Path({str(tmp_path / 'imported')!r}).touch()\n"
        "class Own(L.Trainer):\n    pass\n"
        "class Other:\n    def __init__(self):\n        raise SystemExit(9)\n"
        "def make(**arguments) -> L.Trainer:\n    return L.Trainer(**arguments)\n"
        "def unsaid(**arguments):\n    raise SystemExit(9)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize(
    "sections",
    [
        {"trainer": named("os.system", command="touch MARK")},
        {"trainer": "os.system"},
        {"trainer": named("subprocess.Popen", args="touch MARK")},
        {"callbacks": [named("os.system", command="touch MARK")]},
        {"callbacks": ["os.abort"]},
        {"stages": [named("os.system", command="touch MARK")]},
        {"stages": ["os.abort"]},
        {"data": {"source": named("os.system", command="touch MARK")}},
        {"evaluation": {"source": named("os.system", command="touch MARK")}},
        {"trainer": {"logger": named("os.system", command="touch MARK")}},
        {"trainer": {"logger": [named("subprocess.Popen", args="touch MARK")]}},
        {"trainer": {"profiler": named("shutil.rmtree", path="MARK")}},
        {"callbacks": [named("lightning.pytorch.callbacks.LambdaCallback", on_fit_start="os.abort")]},
        inside(named("omniq.stages.OmniQuant", clipping=named("os.system", command="touch MARK"))),
        inside(named("omniq.stages.QuantEase", clipping="os.abort")),
    ],
    ids=str,
)
def test_class_path_outside_the_allowed_packages_is_refused_in_one_line(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**RUN, **sections}))
    assert main(["quantize", "--config", "run.yaml"]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "outside the packages that a configuration may name" in message
    assert "--allow_import" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize(
    ("sections", "reason"),
    [
        (
            {"trainer": named("omniq.cli.command.main", args=["report"])},
            "trainer: omniq.cli.command.main is neither a subclass of",
        ),
        ({"trainer": "omniq.cli.command.main"}, "to be a function that returns"),
        ({"trainer": named("omniq.data.Stdlib")}, "Trainer"),
        (
            {"callbacks": [named("omniq.cli.command.main", args=[])]},
            "callbacks.0: omniq.cli.command.main is neither a subclass",
        ),
        ({"callbacks": ["omniq.stages.RTN"]}, "Callback"),
        ({"stages": [named("omniq.data.Stdlib")]}, "does not correspond to a subclass of Stage"),
        ({"data": {"source": named("omniq.stages.RTN")}}, "does not correspond to a subclass of TextSource"),
    ],
    ids=str,
)
def test_class_path_of_another_type_is_refused(sections: dict[str, Any], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_run([], {**RUN, **sections})
    assert reason in str(caught.value)


def test_class_path_of_users_package_is_imported_when_allowed(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {**RUN, "trainer": named(f"{package}.Own", accelerator="cpu")}
    with pytest.raises(UserError, match="is not allowed"):
        parse_run([], own)
    assert not (tmp_path / "imported").exists()
    assert package not in sys.modules
    assert parse_run([], own, allow_import=[package])[0].trainer(logger=False).__class__.__name__ == "Own"
    assert (tmp_path / "imported").exists()
    with pytest.raises(UserError, match="is not allowed"):  # what one call allows, the next does not
        parse_run([], own)
    monkeypatch.setenv(VARIABLE, f"numpy,{package}")
    assert parse_run([], own)[0].trainer(logger=False).__class__.__name__ == "Own"
    assert parse_run([], {**RUN, "trainer": f"{package}.make"})[0].trainer(logger=False).__class__ is L.Trainer


@pytest.mark.parametrize("name", ["Other", "unsaid", "make"])
def test_class_path_of_users_class_of_another_type_is_refused(package: str, name: str) -> None:
    """A function with arguments is refused too: parsing the configuration would call it."""
    with pytest.raises(UserError):
        parse_run([], {**RUN, "trainer": named(f"{package}.{name}")}, allow_import=[package])


@pytest.mark.parametrize("name", ["", "jsonargparse", "a/b", "*", "os system"])
def test_allow_import_of_no_package_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="is not possible: give the name of your package"):
        parse_run([], RUN, allow_import=[name])


def test_parse_run_restores_import_policy() -> None:
    before = get_parsing_setting("import_path_verdicts")
    parse_run([], RUN)
    assert get_parsing_setting("import_path_verdicts") == before
