# SPDX-License-Identifier: Apache-2.0
"""A damaged generation config of the source model, which the export copies, is refused by name."""

from pathlib import Path

import pytest

from omniq.errors import UserError
from omniq.models.checks import check_generation_config


@pytest.mark.parametrize("content", [b"", b"{", b"[]", bytes(64), b"\xff\xfe", b"[" * 100_000])
def test_damaged_generation_config_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"generation_config\.json is not a JSON object: correct the file"):
        check_generation_config(tmp_path)


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_generation_config_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "generation_config.json"
    path.mkdir() if kind == "folder" else path.symlink_to("absent")
    with pytest.raises(UserError, match="is not a JSON object"):
        check_generation_config(tmp_path)


def test_sound_or_absent_generation_config_is_accepted(tmp_path: Path) -> None:
    check_generation_config(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    check_generation_config(tmp_path)
