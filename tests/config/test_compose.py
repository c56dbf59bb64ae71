# SPDX-License-Identifier: Apache-2.0
"""Rules by which configuration files compose, and YAML texts that are refused."""

from pathlib import Path
from typing import Any

import pytest

from omniq.config import yaml_text
from omniq.config.compose import compose, merge
from omniq.errors import UserError

A = {"class_path": "A", "init_args": {"x": 1, "inner": {"class_path": "B", "init_args": {"z": 3}}}}


@pytest.mark.parametrize(
    ("earlier", "later", "result"),
    [
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}, {"a": {"b": 3, "c": 2}}),
        ({"a": [1, 2]}, {"a": [3]}, {"a": [3]}),
        ({"a": [1]}, {"a+": [2, 3]}, {"a": [1, 2, 3]}),
        ({"a": [1]}, {"a+": 2}, {"a": [1, 2]}),
        ({}, {"a+": [2]}, {"a": [2]}),
        ({"a": A}, {"a": {"class_path": "A"}}, {"a": {"class_path": "A"}}),
        ({"a": A}, {"a": "C"}, {"a": "C"}),
        ({"a": "C"}, {"a": {"x": 1}}, {"a": {"class_path": "C", "init_args": {"x": 1}}}),
        ({"a": {"x": 1}}, {"a": {"init_args": {"y": 2}}}, {"a": {"init_args": {"x": 1, "y": 2}}}),
        ({"a": {"init_args": {"x": 1}}}, {"a": {"y": 2}}, {"a": {"init_args": {"x": 1, "y": 2}}}),
        ({"a": A}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": A}, {"a": A}),
        ({"a": A}, {}, {"a": A}),
    ],
)
def test_merge_replaces_lists_and_classes_and_merges_mappings(earlier: Any, later: Any, result: Any) -> None:
    assert merge(earlier, later) == result


def test_merge_inside_class_replaces_inner_class_and_keeps_rest() -> None:
    later = {"x": 2, "inner": {"class_path": "B"}}
    assert merge(A, later) == {"class_path": "A", "init_args": {"x": 2, "inner": {"class_path": "B"}}}
    assert merge(A, {"inner": {"z": 4}})["init_args"]["inner"] == {"class_path": "B", "init_args": {"z": 4}}
    assert A["init_args"] == {"x": 1, "inner": {"class_path": "B", "init_args": {"z": 3}}}


def bomb() -> str:
    text = "a: &a [x,x,x,x,x,x,x,x,x]\n"
    for new, old in zip("bcdefghij", "abcdefghi", strict=True):
        text += f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n"
    return text


def keyed_bomb() -> str:
    """The same text with mappings in place of lists."""
    text = "a: &a {p: 1, q: 1, r: 1, s: 1, t: 1, u: 1}\n"
    for new, old in zip("bcdefghij", "abcdefghi", strict=True):
        text += f"{new}: &{new} {{p: *{old}, q: *{old}, r: *{old}, s: *{old}, t: *{old}, u: *{old}}}\n"
    return text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (bomb(), "its aliases expand to more than 100,000 values"),
        (keyed_bomb(), "its aliases expand to more than 100,000 values"),
        ("a: &a {b: &b {c: 1}, d: [*a]}", "an alias refers to a node that contains it"),
        ("a: " + "[" * 60 + "]" * 60, "it is nested more than 50 deep"),
        ("a: " + "[" * 100_000 + "]" * 100_000, "it is nested more than 50 deep"),
        ("{a: " * 5_000 + "1" + "}" * 5_000, "it is nested more than 50 deep"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("a: 1\n---\nb: 2", "expected a single document"),
    ],
    ids=["list bomb", "mapping bomb", "circle", "deep", "very deep", "deep mappings", "python tag", "two documents"],
)
def test_compose_hostile_yaml_is_refused_in_one_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        compose([tmp_path / "x.yaml"])
    assert f"config {tmp_path / 'x.yaml'} is not valid YAML (" in str(caught.value)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_load_plain_aliases_and_merge_keys_are_read() -> None:
    assert yaml_text.load("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1},
    }


@pytest.mark.parametrize(
    "value", [5e-3, 1e10, "5e-3", "1.5", "null", "~", "true", "2024-01-01", 0.1, None, True, [1, {}]]
)
def test_dump_and_load_round_trip(value: object) -> None:
    read = yaml_text.load(yaml_text.dump({"a": value}))["a"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "value"), [("5e-3", 5e-3), ("1E5", 1e5), (".5", 0.5), ("-1.", -1.0), (".inf", float("inf"))]
)
def test_load_numbers_follow_yaml_1_2(text: str, value: float) -> None:
    assert yaml_text.load(text) == value
