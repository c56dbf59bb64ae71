# SPDX-License-Identifier: Apache-2.0
"""The run directory: the whole truth of a run, and why the same command continues it.

    config.yaml          the resolved configuration, repeatable by itself
    fingerprint.json     what must not change between start and resume: settings, data, model
    environment.json     versions and machine, for the record
    lock                 held by the one run that works here
    blocks/007.safetensors   a finished block (its presence means done)
    blocks/007.0.csv     its losses in its first stage, step by step
    tensorboard/         the same for TensorBoard, where that is installed
    current/             the block in progress: last.ckpt, and the results of its earlier stages
    streams.safetensors  both activation streams at a block boundary, until the run is finished
    perplexity.json  summary.json  model/
    export.json          the settings that model/ is written with

Of several processes the first holds the lock and writes; all read. Activation streams on disk are files without a name.

Every file is written beside its name, flushed and renamed, and carries a checksum. A damaged one is named, removed
and computed again from the last good point.
"""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from omniq import processes
from omniq.errors import UserError
from omniq.files import CorruptFile, atomic_write, load_state, load_tensors, save_state, save_tensors
from omniq.result import BlockResult
from omniq.streams import Streams

log = logging.getLogger("omniq")


def check_writable(path: Path) -> None:
    """Refuse a run directory that could not be made, without making it.

    Raises:
        UserError: a file is in the way, or there is no permission.
    """
    path = path.expanduser().absolute()
    there = next(place for place in (path, *path.parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"out {path} cannot be written: {there} is a file; choose another folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"out {path} cannot be written: no permission in {there}; choose another folder")


class RunDir:
    """One run on disk; used as a context manager that holds the lock.

    Args:
        path: folder of the run; made if missing.

    Raises:
        UserError: the folder cannot be written, or another process works in it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = processes.rank() == 0
        self._lock: int | None = None

    def __enter__(self) -> "RunDir":
        processes.first(self._open)
        return self

    def _open(self) -> None:
        try:
            for folder in (self.path, self.path / "blocks", self.path / "current"):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise UserError(f"out {self.path} cannot be written: {error.strerror}; choose another folder") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            self._lock = None
            raise UserError(
                f"out {self.path} is in use by another omniq process: wait for it, or give this run its own folder"
            ) from error
        for leftover in self.path.rglob(".*.partial"):  # of a process that was killed while it wrote
            leftover.unlink()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock is not None:
            os.close(self._lock)  # closing releases the lock
            self._lock = None

    # -- what the run is ----------------------------------------------------------------------------------------

    def claim(self, fingerprint: Mapping[str, Any], config: str) -> bool:
        """Start a run here, or make sure that the one that started here is the same.

        Args:
            fingerprint: flat mapping of everything that determines the result.
            config: the resolved configuration as YAML.

        Returns:
            True if a run is being continued.

        Raises:
            UserError: a run with other settings lives here; names each key with both values.
        """
        return processes.first(lambda: self._claim(fingerprint, config))

    def _claim(self, fingerprint: Mapping[str, Any], config: str) -> bool:
        path = self.path / "fingerprint.json"
        wanted = json.loads(json.dumps(fingerprint))
        if not path.exists():
            atomic_write(self.path / "config.yaml", config.encode())
            atomic_write(path, json.dumps(wanted, indent=1).encode())
            return False
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path} is damaged ({error}): remove {self.path} to start over") from error
        changed = [
            f"{key} (was {found.get(key)!r}, now {wanted.get(key)!r})"
            for key in sorted(found.keys() | wanted.keys())
            if found.get(key) != wanted.get(key)
        ]
        if changed:
            raise UserError(
                f"out {self.path} holds a run with other settings: {'; '.join(changed)}. "
                "Give this run another out, or remove that folder"
            )
        return True

    def write_json(self, name: str, content: Any) -> None:
        """A record for people and tools, such as ``perplexity.json``."""
        if self.writes:
            atomic_write(self.path / name, json.dumps(content, indent=1).encode())

    def save_record(self, name: str, content: Mapping[str, Any]) -> None:
        """A record that a later process goes by, sealed by a checksum."""
        self.write_json(name, {**content, "sha256": _seal(content)})

    def load_record(self, name: str) -> dict[str, Any] | None:
        """What ``save_record`` wrote, or None; a damaged file is reported and removed."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_bytes())
        except ValueError:
            content = None
        if isinstance(content, dict) and content.pop("sha256", None) == _seal(content):
            return content
        self._discard(path, CorruptFile(f"{path}: the checksum does not match its content"), "it is made again")
        return None

    # -- finished blocks ----------------------------------------------------------------------------------------

    def block_path(self, index: int, suffix: str = "safetensors") -> Path:
        """``blocks/007.safetensors``."""
        return self.path / "blocks" / f"{index:03d}.{suffix}"

    def finished(self) -> list[int]:
        """Indices of the blocks that are done."""
        return sorted(int(path.stem) for path in (self.path / "blocks").glob("[0-9]*.safetensors"))

    def load_block(self, index: int) -> BlockResult | None:
        """The finished block, or None; a damaged file is reported and removed."""
        return self.load_result(self.block_path(index))

    def load_result(self, path: Path) -> BlockResult | None:
        """A block result, or None; a damaged file is reported and removed."""
        if not path.exists():
            return None
        try:
            return BlockResult.load(path)
        except CorruptFile as error:
            self._discard(path, error, "the block is calibrated again")
            return None

    def save_block(self, index: int, result: BlockResult) -> None:
        """Record a block as done and forget how it came about."""
        if self.writes:
            result.save(self.block_path(index))
            self.clear_current()

    # -- the block in progress ----------------------------------------------------------------------------------

    def current(self, index: int, stage: int, name: str) -> Path:
        """A file of the block in progress, such as ``current/007.0.last.ckpt``."""
        return self.path / "current" / f"{index:03d}.{stage}.{name}"

    def load_current(self, path: Path) -> Any | None:
        """State of the block in progress, or None; a damaged file is reported and removed."""
        if not path.exists():
            return None
        try:
            return load_state(path)
        except CorruptFile as error:
            self.discard_current(path, error)
            return None

    def discard_current(self, path: Path, error: CorruptFile) -> None:
        """Report and remove state of the block in progress."""
        self._discard(path, error, "this stage of the block starts over")

    def save_current(self, path: Path, state: Any) -> None:
        """Keep state of the block in progress."""
        if self.writes:
            save_state(path, state)

    def save_current_result(self, path: Path, result: BlockResult) -> None:
        """Keep the result of an earlier stage of the block in progress."""
        if self.writes:
            result.save(path)

    def clear_current(self) -> None:
        """Remove everything about the block in progress."""
        shutil.rmtree(self.path / "current", ignore_errors=True)
        (self.path / "current").mkdir(exist_ok=True)

    # -- streams ------------------------------------------------------------------------------------------------

    def load_streams(self, keep: Callable[[Tensor], Tensor]) -> Streams | None:
        """The streams at the last saved boundary, or None; a damaged file is reported and removed.

        Args:
            keep: makes a copy of what this process needs of a stream; what it is given is mapped from the file.
        """
        path = self.path / "streams.safetensors"
        if not path.exists():
            return None
        try:
            tensors, head = load_tensors(path)
        except CorruptFile as error:
            self._discard(path, error, "the streams are computed again through the finished blocks")
            return None
        return Streams(int(head["index"]), keep(tensors["full_precision"]), keep(tensors["quantized"]))

    def save_streams(self, streams: Streams) -> None:
        """Keep both streams, with the samples of all processes, as they enter block ``streams.index``."""
        tensors = {"full_precision": streams.full_precision, "quantized": streams.quantized}
        save_tensors(self.path / "streams.safetensors", tensors, {"index": str(streams.index)})

    def forget_streams(self) -> None:
        """Remove the streams, which a finished run no longer needs: the finished blocks give them again."""
        (self.path / "streams.safetensors").unlink(missing_ok=True)

    def _discard(self, path: Path, error: Exception, consequence: str) -> None:
        if self.writes:
            log.warning("%s; removed, %s", error, consequence)
            path.unlink(missing_ok=True)


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
