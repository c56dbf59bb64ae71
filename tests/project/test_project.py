# SPDX-License-Identifier: Apache-2.0
"""The project as a package: its layout, its wheel, its pinned versions and its dependencies."""

import ast
import shutil
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import omniq

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def run(*command: str) -> str:
    """Output of a Python command in the checkout; its errors are shown when it fails."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def walk(path: Path) -> list[ast.AST]:
    """Every node of a source file."""
    return list(ast.walk(ast.parse(path.read_text())))


def test_callbacks_package_is_top_level_folder() -> None:
    import omniq.callbacks

    assert omniq.callbacks.__file__ is not None
    assert Path(omniq.callbacks.__file__).resolve() == ROOT / "callbacks" / "__init__.py"
    assert (ROOT / "omniq" / "callbacks").readlink() == Path("../callbacks")


def test_recipes_of_package_are_top_level_folder() -> None:
    assert (ROOT / "omniq" / "configs").readlink() == Path("../configs")


def test_import_of_omniq_loads_no_torch() -> None:
    loaded = run("-c", "import sys, omniq; print(*sys.modules)").split()
    assert "omniq" in loaded
    assert not {"torch", "lightning", "transformers"} & set(loaded)


def test_omniq_offers_quantize_and_load_lazily() -> None:
    from omniq import api

    assert omniq.quantize is api.quantize
    assert omniq.load is api.load
    assert {"quantize", "load"} <= set(dir(omniq))
    with pytest.raises(AttributeError, match="module 'omniq' has no attribute 'pack'"):
        _ = omniq.pack


def test_source_files_name_their_license() -> None:
    sources = [path for room in ("omniq", "callbacks", "tests", "benchmarks") for path in (ROOT / room).rglob("*.py")]
    bare = [path for path in sources if not path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")]
    assert sources
    assert not bare


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_begin_with_their_purpose(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# ")
    assert isinstance(yaml.safe_load(text), dict)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_configs_parse_over_the_demo(path: Path, tmp_path: Path) -> None:
    """Each file composes with a complete run, the demo; the recorded config.yaml parses to the same run."""
    from omniq.config.parse import parse_run

    run, resolved = parse_run([ROOT / "configs" / "demo.yaml", path])
    run.check()
    record = tmp_path / "config.yaml"
    record.write_text(resolved)
    assert parse_run([record])[1] == resolved


def test_dependencies_are_pinned_within_their_ranges() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [Requirement(line) for line in project["dependencies"]]
    asked += [Requirement(line) for lines in project["optional-dependencies"].values() for line in lines]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {pin.name.lower(): pin for pin in map(Requirement, (x for x in lines if x and not x.startswith("#")))}
    for requirement in asked:
        if requirement.name != "omniq":
            (pin,) = pins[requirement.name.lower()].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), requirement


def test_imports_are_declared_dependencies() -> None:
    """A package that another package happens to install is not enough."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    nodes = [x for path in (*ROOT.glob("omniq/**/*.py"), *ROOT.glob("callbacks/*.py")) for x in walk(path)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}
    roots = {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"omniq", "triton"}  # torch's own
    owners = packages_distributions()
    assert "torch" in roots
    assert not [name for name in roots if asked.isdisjoint(map(canonicalize_name, owners.get(name, [name])))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """A wheel built from a copy, so that no build folder is left in the checkout."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__")
    for room in ("omniq", "callbacks", "configs"):
        shutil.copytree(ROOT / room, copy / room, symlinks=True, ignore=ignore)
    run("-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(copy / "dist"), str(copy))
    (path,) = (copy / "dist").iterdir()
    return ZipFile(path)


def test_wheel_holds_every_module(wheel: ZipFile) -> None:
    held = {name for name in wheel.namelist() if name.endswith(".py")}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "omniq").rglob("*.py")}
    callbacks = {f"omniq/{path.relative_to(ROOT)}" for path in (ROOT / "callbacks").rglob("*.py")}
    assert "omniq/callbacks/__init__.py" in callbacks
    assert held == modules | callbacks  # a module is missing here if its folder has no __init__.py
    assert "omniq/py.typed" in wheel.namelist()


def test_wheel_holds_every_recipe(wheel: ZipFile) -> None:
    held = {name: wheel.read(name) for name in wheel.namelist() if name.endswith(".yaml")}
    assert held == {f"omniq/{path.relative_to(ROOT)}": path.read_bytes() for path in CONFIGS}


def test_wheel_metadata_names_version_license_and_commands(wheel: ZipFile) -> None:
    info = f"omniq-{omniq.__version__}.dist-info"
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert f"\nVersion: {omniq.__version__}\n" in metadata
    assert "\nLicense-Expression: Apache-2.0\n" in metadata
    assert wheel.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    scripts = ConfigParser()
    scripts.read_string(wheel.read(f"{info}/entry_points.txt").decode())
    assert dict(scripts["console_scripts"]) == {"omniq": "omniq.cli:main", "lightning": "omniq.cli.lightning_run:main"}
