# SPDX-License-Identifier: Apache-2.0
"""Sources of text: the documentation of Python, local files and the Hub."""

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from omniq.data import HubText, LocalText, Stdlib
from omniq.data import text as text_module
from omniq.errors import UserError

# --- the standard library's documentation


def test_stdlib_splits_are_disjoint_and_complete():
    from pydoc_data.topics import topics

    calibration, held_out = Stdlib().topics(), Stdlib("held-out").topics()
    assert not set(calibration) & set(held_out)
    # every word of Python's documentation is in one of them, and every topic that is not a copy of another
    words = {word for text in topics.values() for word in text.split()}
    assert words == {word for text in [*calibration.values(), *held_out.values()] for word in text.split()}
    gone = set(topics) - set(calibration) - set(held_out)
    every = " ".join(" ".join(text.split()) for text in calibration.values())
    every += " ".join(" ".join(text.split()) for text in held_out.values())
    paragraphs = [" ".join(part.split()) for name in gone for part in topics[name].split("\n\n")]
    assert all(part in every for part in paragraphs)


def test_stdlib_holds_out_a_fifth_that_calibration_never_quotes():
    calibration, held_out = Stdlib().documents(), Stdlib("held-out").documents()
    share = sum(map(len, held_out)) / sum(map(len, calibration + held_out))
    assert 0.18 <= share <= 0.2  # measured with Python 3.11: 0.2000
    seen = {" ".join(part.split()) for text in calibration for part in text.split("\n\n")}
    repeated = {" ".join(part.split()) for text in held_out for part in text.split("\n\n")} & seen
    assert all(len(part) < text_module.SHARED_PARAGRAPH for part in repeated)


def test_stdlib_in_another_process_has_same_text():
    command = (
        "from omniq.data import Stdlib; import hashlib; print(hashlib.sha256(Stdlib().text().encode()).hexdigest())"
    )
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(sys.path)}
    other = subprocess.run([sys.executable, "-c", command], env=env, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == hashlib.sha256(Stdlib().text().encode()).hexdigest()
    assert list(Stdlib().topics()) == sorted(Stdlib().topics())


# --- files


def test_local_text_plain_file_is_one_document(tmp_path):
    file = tmp_path / "a.md"
    file.write_bytes("\ufeffone\r\n\r\ntwo é".encode())
    assert LocalText(str(file)).documents() == ["one\n\ntwo é"]  # no byte order mark, one kind of line end


def test_local_text_rows_are_documents_joined_by_blank_line(tmp_path):
    rows = [{"text": "a", "other": 1}, {"text": "b", "other": "x"}, {"text": "c", "other": [1]}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["a", "b", "c"]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        source = LocalText(str(tmp_path / name))
        assert source.documents() == ["a", "b", "c"]
        assert source.text() == "a\n\nb\n\nc"
        assert LocalText(str(tmp_path / name), separator=" ", max_documents=2).text() == "a b"


def test_local_text_edit_with_same_size_and_time_is_seen(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "old"}\n')
    stamp = file.stat().st_mtime_ns
    assert LocalText(str(file)).documents() == ["old"]
    before = LocalText(str(file)).describe()
    file.write_text('{"text": "new"}\n')
    os.utime(file, ns=(stamp, stamp))
    assert LocalText(str(file)).documents() == ["new"]
    assert LocalText(str(file)).describe() != before


def test_text_source_description_has_no_machine_path(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("text")
    assert LocalText(str(file)).describe() == "a.txt (SHA-256 982d9e3eb996f559)"
    assert HubText("allenai/c4", data_files="en/x.gz", max_documents=5).describe() == (
        "allenai/c4 en/x.gz (train split, first 5 documents)"
    )
    assert HubText(str(tmp_path)).describe() == f"{tmp_path.name} (train split)"
    assert "held-out split" in Stdlib("held-out").describe()


def write(folder: Path, name: str, content: bytes) -> str:
    (folder / name).write_bytes(content)
    return str(folder / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.csv",
            b"x",
            r"LocalText\.path: '.*a\.csv' has an unknown extension; known are \.txt, .*parquet",
        ),
        ("a.txt", b"", r"LocalText\.path: '.*a\.txt' is empty; give a file with text in it"),
        ("a.txt", b" \n\n ", r"LocalText\.path: '.*a\.txt' holds no text"),
        ("a.txt", b"caf\xe9", r"LocalText\.path: '.*a\.txt' cannot be read as text: 'utf-8' codec"),
        ("a.jsonl", b"", r"LocalText\.path: '.*a\.jsonl' is empty"),
        ("a.jsonl", b"\n\n", r"LocalText\.path: '.*a\.jsonl' "),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"LocalText\.path: '.*a\.jsonl' cannot be read as json: "),
        ("a.jsonl", b"hello\n", r"LocalText\.path: '.*a\.jsonl' cannot be read as json: "),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}\n',
            r"field: '.*a\.jsonl' has no field 'text'; set it to one of 'body', 'id'",
        ),
        ("a.jsonl", b'{"text": 1}\n', r"field: '.*a\.jsonl' row 1 has 1 where 'text' should be text"),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', r"row 2 has None where 'text' should be text"),
        ("a.json", b'[{"text": ""}]', r"LocalText\.path: '.*a\.json' holds no text"),
        ("a.parquet", b"PAR1 no", r"LocalText\.path: '.*a\.parquet' cannot be read as parquet: "),
    ],
)
def test_local_text_bad_file_is_refused_in_one_line(tmp_path, capfd, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(UserError, match=message) as refused:
        LocalText(path).documents()
    assert "\n" not in str(refused.value)
    assert not capfd.readouterr().err  # datasets' own log would say it twice


def test_local_text_missing_file_or_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"LocalText\.path: '/no/a\.txt' does not exist; give a file of text \(\.txt, "):
        LocalText("/no/a.txt").documents()
    with pytest.raises(UserError, match=r"LocalText\.path: '.*' is a folder, not a file; give a file of text"):
        LocalText(str(tmp_path)).documents()


def test_local_text_parquet_without_field_or_text_is_refused(tmp_path):
    pq.write_table(pa.table({"body": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"has no field 'text'; set it to one of 'body', 'id'"):
        LocalText(str(tmp_path / "a.parquet")).documents()
    pq.write_table(pa.table({"text": pa.array([], pa.string())}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"LocalText\.path: '.*b\.parquet' "):
        LocalText(str(tmp_path / "b.parquet")).documents()


# --- the hub


@pytest.fixture
def offline(monkeypatch):
    """The state after ``HF_HUB_OFFLINE=1`` was set before Python started."""
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_text_offline_is_refused_at_once(offline, streaming, monkeypatch):
    """No connection is tried, so there is no wait between retries."""
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked"))
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("something was waited for"))
    source = HubText("Salesforce/no-such-text", "wikitext-2-raw-v1", streaming=streaming)
    with pytest.raises(
        UserError, match=r"HubText\.path: 'Salesforce/no-such-text' .*HF_HUB_OFFLINE=1.*LocalText.*FILE"
    ):
        source.documents()


def test_hub_text_unreachable_hub_is_refused_with_remedy(monkeypatch, caplog):
    import datasets

    def refuse(*args: object, **kwargs: object) -> None:
        logging.getLogger("datasets.load").warning("not there")
        logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
        raise ConnectionError("Couldn't reach")

    for name in ("datasets", "huggingface_hub"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)  # to where caplog listens
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    levels = [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")]
    with pytest.raises(UserError, match=r"'x/y' cannot be fetched: the Hugging Face Hub is unreachable; .*LocalText"):
        HubText("x/y").documents()
    assert not caplog.records  # the one line says it
    assert [logging.getLogger(name).level for name in ("datasets", "huggingface_hub")] == levels


def test_hub_text_of_local_folder_reads_documents(tmp_path, offline):
    pq.write_table(pa.table({"text": ["", "a", "b"]}), tmp_path / "train.parquet")
    folder = str(tmp_path)
    assert HubText(folder, streaming=True).documents() == ["", "a", "b"]
    assert HubText(folder, streaming=True, max_documents=2).text() == "\n\na"
    assert HubText(folder, streaming=True, data_files="train.parquet", split="mine").documents() == ["", "a", "b"]
    with pytest.raises(UserError, match=r"has no field 'body'; set it to one of 'text'"):
        HubText(folder, field="body", streaming=True).documents()
    with pytest.raises(UserError, match=r"HubText\.path: .* cannot be read: .*split.*\['train'\]"):
        HubText(folder, split="mine", streaming=True).documents()
    with pytest.raises(UserError, match=r"holds no text in split 'train'; name another split"):
        HubText(folder, max_documents=1, streaming=True).documents()
