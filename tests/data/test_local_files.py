# SPDX-License-Identifier: Apache-2.0
"""Local paths are literal, local files need no cache, and damaged files end in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omniq.data import HubText, LocalText
from omniq.data.rows import READERS
from omniq.errors import UserError

PATTERNS = ["t[1]", "t*", "t?", "a::t", "{t,u}", "**", "file:t", "t%201", "~t"]
DEEP = 100_000


def save(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".txt", ".md"):
        path.write_text(text)
    elif path.suffix == ".parquet":
        pq.write_table(pa.table({"text": [text]}), path)
    else:
        path.write_text(json.dumps({"text": text}) + "\n")
    return path


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("name", PATTERNS)
def test_local_text_path_with_pattern_characters_is_literal(name: str, suffix: str, tmp_path: Path) -> None:
    for sibling in ("t1", "t", "u", "tx"):
        save(tmp_path / f"{sibling}{suffix}", "a sibling")
        save(tmp_path / f"folder1/{sibling}{suffix}", "a sibling")
    for folder in (tmp_path, tmp_path / "folder[1]"):
        named = save(folder / f"{name}{suffix}", "the right file")
        assert LocalText(str(named)).documents() == ["the right file"]
        named.unlink()
        with pytest.raises(UserError, match="does not exist"):
            LocalText(str(named)).documents()


@pytest.mark.parametrize("name", ["f[1]", "f*", "f?", "a::f"])
def test_hub_text_folder_with_pattern_characters_is_literal(name: str, tmp_path: Path) -> None:
    for folder in ("f1", "f", "fx"):
        save(tmp_path / folder / "train.jsonl", "a sibling")
    save(tmp_path / name / "train.jsonl", "the right folder")
    source = HubText(str(tmp_path / name))
    assert source.documents() == ["the right folder"]
    assert source.describe() == f"{name} (train split)"


def test_hub_text_data_files_is_a_pattern(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1"):
        save(tmp_path / f"f[1]/{name}.jsonl", name)
    assert HubText(str(tmp_path / "f[1]"), data_files="a*.jsonl").documents() == ["a1", "a2"]


def test_local_sources_read_without_a_cache_that_can_be_written(tmp_path: Path) -> None:
    for suffix in READERS:
        save(tmp_path / f"files/train{suffix}", "text")
    save(tmp_path / "set/train.jsonl", "text")
    code = (
        "import sys; from pathlib import Path; from omniq.data import HubText, LocalText\n"
        "here = Path(sys.argv[1])\n"
        "for file in (here / 'files').iterdir(): assert LocalText(str(file)).documents() == ['text'], file\n"
        "assert HubText(str(here / 'set')).documents() == ['text']\n"
    )
    nowhere = {"HOME": "/proc/none", "HF_HOME": "/proc/none/hf", "XDG_CACHE_HOME": "/proc/none/cache"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={**os.environ, **nowhere}, check=True)


def test_hub_text_names_the_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "none/hf"))
    for place in (tmp_path / "none", tmp_path / "none/hf/datasets/x.lock"):

        def refuse(*_: object, place: Path = place, **__: object) -> None:
            raise PermissionError(13, "Permission denied", str(place))

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(UserError, match=r"cache of Hugging Face cannot be written .*: set HF_HOME to a folder"):
            HubText("x/y").documents()


@pytest.mark.parametrize("error", [RuntimeError, RecursionError, KeyError, NotImplementedError, TypeError, EOFError])
def test_hub_text_any_error_of_the_library_is_one_line(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise error("first\nsecond")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(UserError, match=r"^HubText\.path: 'x/y' cannot be read: .*first.*second") as refused:
        HubText("x/y").documents()
    assert "\n" not in str(refused.value)


def test_hub_text_loading_script_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "ptb").mkdir()
    (tmp_path / "ptb/ptb.py").write_text("import datasets\n")
    with pytest.raises(UserError, match=r"ptb' has a loading script.*HubText\.revision to refs/convert/parquet"):
        HubText(str(tmp_path / "ptb")).documents()


def test_hub_text_nested_line_is_refused_before_the_parser_ends_the_process(tmp_path: Path) -> None:
    save(tmp_path / "train.jsonl", "[{" * DEEP)
    assert HubText(str(tmp_path)).documents() == ["[{" * DEEP]  # brackets in a string are no levels
    (tmp_path / "train.jsonl").write_text('{"text": "a", "x": ' + "[" * DEEP + "]" * DEEP + "}\n")
    with pytest.raises(UserError, match=r"cannot be read: train\.jsonl line 1 is nested too deeply; remove that line"):
        HubText(str(tmp_path)).documents()


LAYOUTS = {
    "lines": '{"text": "a"}\n\n{"text": "b"}',
    "carriage returns": '{"text": "a"}\r\n{"text": "b"}\r\n',
    "byte order mark": '\ufeff{"text": "a"}\n{"text": "b"}\n',
    "list": '[{"text": "a"}, {"text": "b"}]',
    "list of several lines": '\n [\n{"text":\n "a"},\n{"text": "b"}\n]\n',
    "list of strings": '["a", "b"]',
    "objects of several lines": '{\n"text": "a"\n}\n{\n"text": "b"\n}\n',
    "other line separators": '{"text": "a", "x": "\u2028\x85"}\n{"text": "b"}\n',
}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("content", LAYOUTS.values(), ids=LAYOUTS)
def test_local_text_reads_every_layout_of_json(content: str, suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"a{suffix}").write_bytes(content.encode())
    assert LocalText(str(tmp_path / f"a{suffix}")).documents() == ["a", "b"]
    assert LocalText(str(tmp_path / f"a{suffix}"), max_documents=1).documents() == ["a"]


DAMAGED = {
    "nested in the first line": (".jsonl", b'{"text": ' + b"[" * DEEP + b"]" * DEEP + b"}\n", "line 1 is nested too"),
    "nested later": (".jsonl", b'{"text": "a"}\n{"x": ' + b"[" * DEEP + b"]" * DEEP + b"}\n", "line 2 is nested too"),
    "nested objects": (".json", b'{"x":' * DEEP + b"1" + b"}" * DEEP, "line 1 is nested too"),
    "nested lines": (".json", b"[\n" * DEEP + b"]\n" * DEEP, "as json: it is nested too deeply"),
    "nested value": (".jsonl", b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}\n", "row 1 has .* should be text"),
    "a number": (".jsonl", b"1\n", "row 1 is 1, which is not an object"),
    "lists": (".jsonl", b'{"text": "a"}\n[{"text": "b"}]\n', "row 2 is .*, which is not an object"),
    "field missing later": (".jsonl", b'{"text": "a"}\n{"x": 1}\n', "row 2 has no field 'text'; set it to one of 'x'"),
    "empty row": (".jsonl", b"{}\n", "set it to one of none, the row is empty"),
    "half a surrogate": (".jsonl", b'{"text": "\\ud800"}\n', "row 1 has half a surrogate pair"),
    "huge number": (".jsonl", b'{"text": ' + b"1" * 5000 + b"}\n", "cannot be read as json"),
    "binary json": (".jsonl", b"\x80\x81\x00", "cannot be read as json: 'utf-8' codec"),
    "cut": (".json", b'[{"text": "a"}, {"te', "cannot be read as json: Unterminated string"),
    "NUL": (".txt", b"\0" * 4096, "cannot be read as text: it holds NUL characters"),
    "UTF-16": (".md", "text".encode("utf-16"), "cannot be read as text: 'utf-8' codec"),
    "cut parquet": (".parquet", b"PAR1\0\0\0\0PAR1", "cannot be read as parquet"),
}


@pytest.mark.parametrize(("suffix", "content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_local_text_damaged_file_is_refused_in_one_line(
    suffix: str, content: bytes, message: str, tmp_path: Path
) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        LocalText(str(file)).documents()
    assert "\n" not in str(refused.value)
    assert str(file) in str(refused.value)
    assert len(str(refused.value)) < 600


def test_local_text_damaged_bytes_of_parquet_end_in_text_or_one_line(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.parquet", "text " * 50).read_bytes()
    refused: list[str] = []
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "a.parquet").write_bytes(damaged)
        try:
            LocalText(str(tmp_path / "a.parquet")).documents()
        except UserError as error:
            refused.append(str(error))
    assert refused
    assert not any("\n" in message for message in refused)


def test_local_text_what_is_no_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "link.txt").symlink_to(tmp_path / "gone.txt")
    (tmp_path / "ring.txt").symlink_to(tmp_path / "ring.txt")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "file.txt").write_text("text")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, reason in {
        "link.txt": "is a link to a file that does not exist",
        "ring.txt": r"cannot be opened \(.*Too many levels",
        "folder.jsonl": "is a folder, not a file",
        "pipe.txt": "is a device or a pipe, not a file",
        "file.txt/a.txt": r"cannot be opened \(.*Not a directory",
    }.items():
        with pytest.raises(UserError, match=reason + r".*; give a file of text \(\.txt") as refused:
            LocalText(str(tmp_path / name)).documents()
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("name", "reason"), [("a" * 300 + ".txt", "too long"), ("a\0.txt", "null character")])
def test_local_text_path_that_cannot_be_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason) as refused:
        LocalText(str(tmp_path / name)).documents()
    assert "\n" not in str(refused.value)


def test_local_text_parquet_reads_only_its_field(tmp_path: Path) -> None:
    rows = {"text": ["a", "b"], "a.b": ["c", "d"], "more": [{"text": "x"}, None]}
    pq.write_table(pa.table(rows), tmp_path / "a.parquet")
    assert LocalText(str(tmp_path / "a.parquet")).documents() == ["a", "b"]
    assert LocalText(str(tmp_path / "a.parquet"), field="a.b").documents() == ["c", "d"]
    with pytest.raises(UserError, match=r"row 1 has \{'text': 'x'\} where 'more' should be text"):
        LocalText(str(tmp_path / "a.parquet"), field="more").documents()
