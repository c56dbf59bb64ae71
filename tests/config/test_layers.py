# SPDX-License-Identifier: Apache-2.0
"""Configuration files on top of each other: the parts that a later file replaces or keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import yaml

from omniq.config.class_paths import allowed_imports
from omniq.config.compose import compose
from omniq.config.parse import parse_run, run_of
from omniq.errors import UserError
from omniq.stages import RTN, LearnedRounding

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


def test_parse_run_composes_files_and_options_override(folder: Path) -> None:
    """Later files replace keys and lists, ``stages+`` appends, and options override files."""
    (folder / "data.yaml").write_text("data: {samples: 7, seed: 5}")
    (folder / "stages.yaml").write_text("stages: [{class_path: omniq.stages.RTN}]")
    (folder / "more.yaml").write_text("stages+: [{class_path: omniq.stages.LearnedRounding, init_args: {epochs: 9}}]")
    run, settings = parse_run([folder / name for name in ("run.yaml", "data.yaml", "stages.yaml", "more.yaml")])
    assert (run.data.samples, run.data.seed, run.data.length) == (7, 5, 24)
    assert [type(stage) for stage in run.stages] == [RTN, LearnedRounding]
    assert run.stages[1].epochs == 9
    assert yaml.safe_load(settings)["data"]["samples"] == 7
    run, _ = parse_run([folder / "run.yaml", folder / "data.yaml"], {"data": {"samples": 2}, "seed": 8})
    assert (run.data.samples, run.data.seed, run.seed) == (2, 5, 8)


@pytest.mark.parametrize(
    "later",
    [
        "stages: [omniq.stages.RTN, omniq.stages.LearnedRounding]",
        "stages: [omniq.stages.OmniQuant]",
        "stages: [{class_path: omniq.stages.OmniQuant}]",
        "stages: [{class_path: omniq.stages.RTN}, {class_path: omniq.stages.LearnedRounding}]",
    ],
)
def test_later_file_list_of_stages_replaces_earlier_list(folder: Path, later: str) -> None:
    """The whole list is replaced; an option after it sets the last stage."""
    assert resolved(folder, LEARNED)["stages"][0]["init_args"]["epochs"] == 13
    last = resolved(folder, "stages: []", later)["stages"][-1]
    assert last["init_args"]["epochs"] in (10, 20)  # the defaults of LearnedRounding and OmniQuant
    assert resolved(folder, LEARNED, later)["stages"][-1] == last
    changed = resolved(folder, LEARNED, later, options=["--stages.epochs", "5"])["stages"][-1]
    assert changed == {**last, "init_args": {**last["init_args"], "epochs": 5}}


def test_later_file_without_list_of_stages_keeps_earlier_list(folder: Path) -> None:
    before = resolved(folder, LEARNED)["stages"]
    assert resolved(folder, LEARNED, "scheme: {name: W4A16}\ntrainer: {precision: 32-true}")["stages"] == before
    later = "stages+: [{class_path: omniq.stages.LearnedRounding}]\ndata: {source: Stdlib}"
    more = resolved(folder, LEARNED, later)["stages"]
    assert [*before, "omniq.stages.LearnedRounding"] == [*more[:-1], more[-1]["class_path"]]
    changed = resolved(folder, LEARNED, options=["--stages.clipping_lr", "0.02"])["stages"][0]
    assert changed["init_args"] == {**before[0]["init_args"], "clipping_lr": 0.02}


def test_later_file_list_entry_without_class_is_refused(folder: Path) -> None:
    (folder / "unnamed.yaml").write_text("stages: [{init_args: {epochs: 3}}]")
    with pytest.raises(UserError, match="Not a valid subclass of Stage"):
        parse_run([folder / "run.yaml", folder / "unnamed.yaml"])


def test_later_file_class_replaces_earlier_class_whole(folder: Path) -> None:
    """This holds for the same class too; settings without a class change the existing one."""
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


def test_later_file_trainer_and_loggers_compose_by_same_rule(folder: Path) -> None:

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


def test_demo_with_text_of_hub_uses_its_split() -> None:
    """The demo's own text has a split of another name."""
    for text in ("c4", "wikitext2"):
        run, _ = parse_run([ROOT / "configs/demo.yaml", ROOT / f"configs/data/{text}.yaml"])
        assert run.data.source.split == "train"


def test_parse_run_unknown_option_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="wbits"):
        parse_run([folder / "run.yaml"], {"scheme": {"wbits": 3}})
