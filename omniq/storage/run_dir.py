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

Every file but the losses is written beside its name, flushed and renamed. What a resume goes on from (blocks, the block
in progress, streams, perplexities) and export.json carry a checksum: a damaged one is named, removed and computed again
from the last good point. A damaged fingerprint is refused. The other records are written anew by every start.

Whose folder it is, and what in it is a run's, ``omniq.storage.ownership`` says.
"""

import json
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from omniq.distributed import collectives
from omniq.errors import CorruptFile, UserError
from omniq.storage import records
from omniq.storage.atomic import atomic_write
from omniq.storage.block_result import BlockResult
from omniq.storage.claim import claim, identity
from omniq.storage.lock import lock
from omniq.storage.ownership import check_entries, check_own, is_block_file, remove_partial_files
from omniq.storage.sealed import Owner, load_state, load_tensors, save_state, save_tensors
from omniq.storage.writer import Writer

log = logging.getLogger("omniq")


class RunDir:
    """One run on disk; used as a context manager that holds the lock.

    Args:
        path: folder of the run; made if missing.

    Raises:
        UserError: the folder cannot be written or is not a run's, or another process works in it.
    """

    _block: Future[None] | None  # the finished block that is being written

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = collectives.rank() == 0
        self._lock: int | None = None
        self._writer, self._block = Writer(), None

    def __enter__(self) -> "RunDir":
        collectives.broadcast_from_rank0(self._open)
        return self

    def _open(self) -> None:
        check_own(self.path)
        check_entries(self.path)
        try:
            for folder in (self.path, self.path / "blocks", self.path / "current"):
                folder.mkdir(parents=True, exist_ok=True)
            self._lock = lock(self.path / "lock")
        except OSError as error:
            raise UserError(f"out {self.path} cannot be written: {error.strerror}; choose another folder") from error
        remove_partial_files(self.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._writer.__exit__(kind, error, trace)
        finally:
            if self._lock is not None:
                os.close(self._lock)  # closing releases the lock
                self._lock = None

    # -- beside the calibration ---------------------------------------------------------------------------------

    def keep_block(self, index: int, result: BlockResult) -> None:
        """``save_block`` while the caller goes on. Nothing of ``result`` may change after this."""
        # NOTE: the writer must not call CUDA
        self._block = self._writer.start(self.save_block, index, result.on_host())

    def keep_streams(self, index: int, full_precision: Tensor, quantized: Tensor) -> None:
        """``save_streams`` while the caller goes on, after the block before them."""
        self._writer.start(self.save_streams, index, full_precision, quantized)

    def settle(self) -> None:
        """Return when the last finished block is written: what the next one saves must not come before it."""
        block, self._block = self._block, None
        if block is not None:
            block.result()

    def flush(self) -> None:
        """Return when everything is written."""
        self._block = None
        self._writer.wait()

    # -- what the run is ----------------------------------------------------------------------------------------

    def claim(self, fingerprint: Mapping[str, Any], config: str) -> bool:
        """Start a run here, or make sure that the one that started here is the same (``omniq.storage.claim``).

        Args:
            fingerprint: flat mapping of everything that determines the result.
            config: the resolved configuration as YAML.

        Returns:
            True if a run is being continued.

        Raises:
            UserError: a run with other settings lives here; names each key with both values.
        """
        resumed = collectives.broadcast_from_rank0(lambda: claim(self.path, fingerprint, config))
        self.__dict__.pop("_identity", None)
        return resumed

    def write_json(self, name: str, content: Any) -> None:
        """A record for people and tools, such as ``summary.json``; null where a number is not finite."""
        if self.writes:
            atomic_write(self.path / name, json.dumps(records.finite(content), indent=1, allow_nan=False).encode())

    def save_record(self, name: str, content: Mapping[str, Any]) -> None:
        """A record that a later process goes by, sealed by a checksum."""
        if self.writes:
            records.save_record(self.path / name, content)

    def load_record(self, name: str) -> dict[str, Any] | None:
        """What ``save_record`` wrote, or None; a damaged file is reported and removed."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return records.load_record(path)
        except CorruptFile as error:
            self._discard(path, error, "it is made again")
            return None

    def owner(self, path: Path) -> Owner:
        """What the seal of a file of this run covers besides its content: the run, and the file's place in it."""
        run, strict = self._identity
        return Owner(f"{run}/{path.relative_to(self.path)}" if run else "", strict)

    @cached_property
    def _identity(self) -> tuple[str, bool]:
        return identity(self.path)

    # -- finished blocks ----------------------------------------------------------------------------------------

    def block_path(self, index: int, suffix: str = "safetensors") -> Path:
        """``blocks/007.safetensors``."""
        return records.block_path(self.path, index, suffix)

    def finished(self) -> list[int]:
        """Indices of the blocks that are done."""
        return records.finished_blocks(self.path)

    def load_block(self, index: int) -> BlockResult | None:
        """The finished block, or None; a damaged file is reported and removed."""
        return self.load_result(self.block_path(index))

    def read_block(self, index: int) -> BlockResult:
        """A finished block.

        Raises:
            CorruptFile: its file is missing or damaged, or belongs to another block or run.
        """
        path = self.block_path(index)
        return BlockResult.load(path, self.owner(path))

    def load_result(self, path: Path) -> BlockResult | None:
        """A block result, or None; a damaged file is reported and removed."""
        if not path.exists():
            return None
        try:
            return BlockResult.load(path, self.owner(path))
        except CorruptFile as error:
            self._discard(path, error, "the block is calibrated again")
            return None

    def save_block(self, index: int, result: BlockResult) -> None:
        """Record a block as done and forget how it came about."""
        if self.writes:
            result.save(self.block_path(index), self.owner(self.block_path(index)))
            for path in (self.path / "current").glob(f"{index:03d}.*"):  # NOTE: the next block's may be there by now
                path.unlink()

    # -- the block in progress ----------------------------------------------------------------------------------

    def current(self, index: int, stage: int, name: str) -> Path:
        """A file of the block in progress, such as ``current/007.0.last.ckpt``."""
        return self.path / "current" / f"{index:03d}.{stage}.{name}"

    def load_current(self, path: Path) -> Any | None:
        """State of the block in progress, or None; a damaged file is reported and removed."""
        if not path.exists():
            return None
        try:
            return load_state(path, owner=self.owner(path))
        except CorruptFile as error:
            self.discard_current(path, error)
            return None

    def discard_current(self, path: Path, error: CorruptFile) -> None:
        """Report and remove state of the block in progress."""
        self._discard(path, error, "this stage of the block starts over")

    def save_current(self, path: Path, state: Any) -> None:
        """Keep state of the block in progress."""
        if self.writes:
            self.settle()
            save_state(path, state, self.owner(path))

    def save_current_result(self, path: Path, result: BlockResult) -> None:
        """Keep the result of an earlier stage of the block in progress."""
        if self.writes:
            self.settle()
            result.save(path, self.owner(path))

    def clear_current(self, but: int) -> None:
        """Remove what is there of other blocks: it belongs to a finished one, or stands on one that was damaged."""
        if self.writes:
            for path in (self.path / "current").iterdir():
                if is_block_file(path) and not path.name.startswith(f"{but:03d}."):
                    path.unlink()

    # -- streams ------------------------------------------------------------------------------------------------

    def load_streams(self, keep: Callable[[Tensor], Tensor]) -> tuple[int, Tensor, Tensor] | None:
        """The streams at the last saved boundary, or None; a damaged file is reported and removed.

        Args:
            keep: makes a copy of what this process needs of a stream; what it is given is mapped from the file.
        """
        path = self.path / "streams.safetensors"
        if not path.exists():
            return None
        try:
            tensors, head = load_tensors(path, self.owner(path))
        except CorruptFile as error:
            self._discard(path, error, "the streams are computed again through the finished blocks")
            return None
        return int(head["index"]), keep(tensors["full_precision"]), keep(tensors["quantized"])

    def save_streams(self, index: int, full_precision: Tensor, quantized: Tensor) -> None:
        """Keep both streams, with the samples of all processes, as they enter block ``index``."""
        tensors = {"full_precision": full_precision, "quantized": quantized}
        path = self.path / "streams.safetensors"
        save_tensors(path, tensors, {"index": str(index)}, self.owner(path))

    def forget_streams(self) -> None:
        """Remove the streams, which a finished run no longer needs: the finished blocks give them again."""
        (self.path / "streams.safetensors").unlink(missing_ok=True)

    def _discard(self, path: Path, error: Exception, consequence: str) -> None:
        if self.writes:
            log.warning("%s; removed, %s", error, consequence)
            path.unlink(missing_ok=True)
