# SPDX-License-Identifier: Apache-2.0
"""The model card shows the facts that it is given and no local paths."""

import shlex
from pathlib import Path

import pytest

from omniq.export import FORMATS
from omniq.export.containers.card import model_card
from omniq.export.formats.compressed_tensors import CompressedTensors
from omniq.grid.scheme import Scheme


def test_model_card_shows_all_facts() -> None:
    facts = {
        "name": "tiny-W3A16g64",
        "base_model": "someone/tiny",
        "scheme": "W3A16g64",
        "format": "compressed-tensors",
        "requires": CompressedTensors.requires,
        "bits_per_weight": 3.296875,
        "perplexity": {"held-out": {"full precision": 21.9712, "learned": 42.9}, "other": {"learned": 50}},
        "blocks": [{"loss": 0.1 * index, "note": "a | b", "ok": True} for index in range(20)],
        "recipe": "scheme: W3A16g64\n",
        "seed": 3,
        "data": {"source": "a | b", "digest": "abc"},
        "versions": {"torch": "2.13.0"},
    }
    card = model_card(facts)
    assert card == model_card(dict(facts))
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: someone/tiny\n" in card
    assert "3.297 bits per weight" in card
    assert (
        "| text | full precision | learned |\n| --- | --- | --- |\n| held-out | 21.97 | 42.9 |\n| other |  | 50 |"
        in card
    )
    assert "| block | loss |" in card
    assert "| 7 | 0.7 |\n| … | … |\n| 12 | 1.2 |" in card
    assert "| calibration source | a \\| b |" in card
    assert "`pip install 'transformers>=5.17' 'compressed-tensors>=0.18'`, then\n" in card
    assert "```yaml\nscheme: W3A16g64\n```" in card


@pytest.mark.parametrize("name", FORMATS)
def test_model_card_requirements_are_those_of_omniq(name: str) -> None:
    """An older compressed-tensors silently reads other numbers from the same file."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 brings tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = sum(project["optional-dependencies"].values(), [])
    ours = {package.partition(",")[0] for package in project["dependencies"] + extras} | {project["name"]}
    card = model_card({"requires": FORMATS[name].codec(Scheme()).requires})
    assert set(shlex.split(card.partition("`pip install ")[2].partition("`")[0])) <= ours


def test_model_card_without_facts_shows_usage() -> None:
    assert "from_pretrained" in model_card({})


@pytest.mark.parametrize("base", ["/home/someone/tiny/", "./home/tiny", "package:home/tiny", "~/home/tiny"])
def test_model_card_of_local_model_has_no_path(base: str) -> None:
    card = model_card({"base_model": base})
    assert "home" not in card
    assert "base_model" not in card
    assert "\ntiny, quantized by omniq." in card
