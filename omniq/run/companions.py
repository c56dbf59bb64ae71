# SPDX-License-Identifier: Apache-2.0
"""The files beside the weights of the source model that an export takes over: tokenizer and generation config.

The model digest covers config and weights only. The first start of a run records a digest of each of the other files in
``companions.json``. A later start and ``omniq export`` report the files that have changed since then. They do not
refuse them, because codes and scales do not depend on them: a change that alters the calibration tokens changes the
data digest, and omniq refuses it there. A run of a version that made no record gets one at its next start.
"""

import logging

from omniq.models.checkpoint import file_digest
from omniq.models.source import SourceModel
from omniq.storage.run_dir import RunDir

log = logging.getLogger("omniq")

RECORD = "companions.json"
_NAMES = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)


def check_companions(folder: RunDir, source: SourceModel) -> None:
    """Warn about companion files of the source model that have changed since the run recorded them.

    Args:
        folder: the run directory. It gets a record if it holds none.
        source: the opened model.
    """
    if not folder.writes:
        return
    recorded, now = (folder.load_record(RECORD) or {}).get("files"), companion_digests(source)
    if recorded is None:
        folder.save_record(RECORD, {"files": now})
        return
    changed = [
        f"{name} ({'added' if name not in recorded else 'changed' if name in now else 'removed'})"
        for name in sorted(recorded.keys() | now.keys())
        if recorded.get(name) != now.get(name)
    ]
    if changed:
        log.warning(
            "%s: files of the model differ from those at the start of the run: %s; the checkpoint gets the present "
            "ones, so restore the earlier ones if you want those",
            *(source.folder, ", ".join(changed)),
        )


def companion_digests(source: SourceModel) -> dict[str, str]:
    """Return the SHA-256 of each companion file of a model that exists, by its path in the folder of the model."""
    templates = sorted(source.folder.glob("additional_chat_templates/*.jinja"))
    files = {source.folder / name for name in (*_NAMES, *source.tokenizer().vocab_files_names.values())}
    present = sorted(file for file in (*files, *templates) if file.is_file())
    return {file.relative_to(source.folder).as_posix(): file_digest(file).hex() for file in present}
