# SPDX-License-Identifier: Apache-2.0
"""The run directory: everything needed to reproduce or resume a run.

    config.yaml          the resolved configuration, sufficient to repeat the run
    fingerprint.json     settings, and digests of data and model, that must not change before a resume
    environment.json     versions and machine, for the record
    companions.json      digests of the source model's tokenizer files and generation config
    generated.safetensors  the calibration windows, if the model wrote them (``omniq.data.SelfGenerated``)
    lock                 held by the process that works in this directory
    blocks/007.safetensors   a finished block (its presence marks the block as finished)
    blocks/007.0.csv     the losses of every step in its first stage
    blocks/007.2.safetensors   what the third stage, a stage of the whole model, changed in the block
    blocks/model.2.csv   the losses of this stage
    tensorboard/         the same losses for TensorBoard, if it is installed
    current/             the block in progress: last.ckpt, and the results of its earlier stages
    streams.safetensors  both activation streams at a block boundary, until the run is finished
    perplexity.json  summary.json  model/
    export.json          the settings of the export in model/
    model_stages.json    the stages of the whole model that are finished

With several processes, rank 0 holds the lock and writes, and all ranks read. Activation streams with ``streams: disk``
are files without a name.

All files except the losses are written atomically. The files that a resumed run starts from (blocks, the block in
progress, streams, perplexities) and export.json carry a checksum. omniq reports and removes a damaged file, and
computes it again from the last intact state. It refuses a damaged fingerprint. Every start rewrites the other records.

``omniq.storage.ownership`` decides which folders and entries belong to a run.
"""

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from omniq.storage.ownership import check_empty_or_run, check_entries, is_block_file, remove_partial_files
from omniq.storage.sealed import Owner, load_state, load_tensors, save_state, save_tensors
from omniq.storage.writer import Writer

log = logging.getLogger("omniq")


class RunDir:
    """The directory of one run, as a context manager that holds its lock.

    Args:
        path: the run directory. It is created if it does not exist.

    Raises:
        UserError: the folder cannot be written, does not belong to a run, or is in use by another process.
    """

    _block: Future[None] | None  # the write of the last finished block

    def __init__(self, path: Path) -> None:
        self.path = path
        self.writes = collectives.rank() == 0
        self._lock: int | None = None
        self._writer, self._block = Writer(), None

    def __enter__(self) -> "RunDir":
        collectives.broadcast_from_rank0(self._open)
        return self

    def _open(self) -> None:
        check_empty_or_run(self.path)
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

    # -- background writes --------------------------------------------------------------------------------------

    def save_block_async(self, index: int, result: BlockResult) -> None:
        """Call ``save_block`` in the background. The caller must not modify ``result`` afterwards."""
        # NOTE: the writer must not call CUDA
        self._block = self._writer.start(self.save_block, index, result.on_host())

    def save_streams_async(self, index: int, full_precision: Tensor, quantized: Tensor) -> None:
        """Call ``save_streams`` in the background, after the pending writes."""
        self._writer.start(self.save_streams, index, full_precision, quantized)

    def settle(self) -> None:
        """Wait until the last finished block is on the disk: files of the next block depend on it."""
        block, self._block = self._block, None
        if block is not None:
            block.result()

    def flush(self) -> None:
        """Wait until all background writes are done."""
        self._block = None
        self._writer.wait()

    # -- identity and records -----------------------------------------------------------------------------------

    def claim(self, fingerprint: Mapping[str, Any], config: str) -> bool:
        """Start a run here, or check that the existing run is the same (``omniq.storage.claim``).

        Args:
            fingerprint: flat mapping of all settings and digests that determine the result.
            config: the resolved configuration as YAML.

        Returns:
            True if the command continues an existing run.

        Raises:
            UserError: the directory holds a run with other settings; names each key with both values.
        """
        resumed = collectives.broadcast_from_rank0(lambda: claim(self.path, fingerprint, config))
        self.__dict__.pop("_identity", None)
        return resumed

    def write_json(self, name: str, content: Any) -> None:
        """Write a record for people and tools, such as ``summary.json``. Numbers that are not finite become null."""
        if self.writes:
            atomic_write(
                self.path / name, json.dumps(records.without_non_finite(content), indent=1, allow_nan=False).encode()
            )

    def save_record(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a record that a later process relies on, sealed by a checksum."""
        if self.writes:
            records.save_record(self.path / name, content)

    def load_record(self, name: str) -> dict[str, Any] | None:
        """Read a record of ``save_record``; None if it is missing. A damaged file is reported and removed."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return records.load_record(path)
        except CorruptFile as error:
            self._discard(path, error, "it is written again")
            return None

    def owner(self, path: Path) -> Owner:
        """Return the owner of a file, which its seal covers besides its content: the run, and the file's path in it."""
        run, strict = self._identity
        return Owner(f"{run}/{path.relative_to(self.path)}" if run else "", strict)

    @cached_property
    def _identity(self) -> tuple[str, bool]:
        return identity(self.path)

    # -- finished blocks ----------------------------------------------------------------------------------------

    def block_path(self, index: int | None, suffix: str = "safetensors") -> Path:
        """Return the path of a file of a block, such as ``blocks/007.safetensors``, or without index of the model."""
        return records.block_path(self.path, index, suffix)

    def finished(self) -> list[int]:
        """Return the indices of the finished blocks."""
        return records.finished_blocks(self.path)

    def load_block(self, index: int) -> BlockResult | None:
        """Load a finished block; None if it is missing. A damaged file is reported and removed."""
        return self.load_result(self.block_path(index))

    def read_block(self, index: int) -> BlockResult:
        """Read a finished block.

        Raises:
            CorruptFile: the file is missing or damaged, or belongs to another block or run.
        """
        path = self.block_path(index)
        return BlockResult.load(path, self.owner(path))

    def final_block(self, index: int, stages: Iterable[int]) -> BlockResult:
        """Read a finished block with what some stages of the whole model changed in it.

        Args:
            index: the index of the block.
            stages: positions of these stages in the list of stages.

        Raises:
            CorruptFile: a file is missing or damaged, or belongs to another block, to another run or to other codes.
        """
        result, before = self.read_block(index), self.block_path(index)
        for stage in stages:
            path = self.block_path(index, f"{stage}.safetensors")
            tensors, head = load_tensors(path, self.owner(path))
            if head.get("block") != records.header_digest(before):
                raise CorruptFile(f"{path}: the file was made for other codes or scales of its block")
            result, before = result.with_tensors(tensors), path
        return result

    def save_changes(self, index: int, stages: Sequence[int], tensors: Mapping[str, Tensor]) -> None:
        """Write what the last of some stages of the whole model changed in a block.

        Args:
            index: the index of the block.
            stages: positions of these stages in the list of stages.
            tensors: the changed tensors, by their names in a block result.
        """
        if self.writes:
            *earlier, path = (self.block_path(index, f"{stage}.safetensors") for stage in stages)
            head = {"block": records.header_digest(earlier[-1] if earlier else self.block_path(index))}
            save_tensors(path, tensors, head, self.owner(path))

    def load_result(self, path: Path) -> BlockResult | None:
        """Load a block result; None if it is missing. A damaged file is reported and removed."""
        if not path.exists():
            return None
        try:
            return BlockResult.load(path, self.owner(path))
        except CorruptFile as error:
            self._discard(path, error, "the block is calibrated again")
            return None

    def save_block(self, index: int, result: BlockResult) -> None:
        """Write a finished block, and remove the files of its calibration."""
        if self.writes:
            result.save(self.block_path(index), self.owner(self.block_path(index)))
            for path in (self.path / "current").glob(
                f"{index:03d}.*"
            ):  # NOTE: files of the next block may already exist
                path.unlink()

    # -- the block in progress ----------------------------------------------------------------------------------

    def current(self, index: int | None, stage: int, name: str) -> Path:
        """Return the path of a file of the block or model in progress, such as ``current/007.0.last.ckpt``."""
        return self.path / "current" / f"{records.task_name(index)}.{stage}.{name}"

    def load_current(self, path: Path) -> Any | None:
        """Load state of the block in progress; None if it is missing. A damaged file is reported and removed."""
        if not path.exists():
            return None
        try:
            return load_state(path, owner=self.owner(path))
        except CorruptFile as error:
            self.discard_current(path, error)
            return None

    def discard_current(self, path: Path, error: CorruptFile) -> None:
        """Report a damaged file of the block in progress, and remove it."""
        self._discard(path, error, "this stage of the block starts over")

    def save_current(self, path: Path, state: Any) -> None:
        """Save state of the block in progress."""
        if self.writes:
            self.settle()
            save_state(path, state, self.owner(path))

    def save_current_result(self, path: Path, result: BlockResult) -> None:
        """Save the result of an earlier stage of the block in progress."""
        if self.writes:
            self.settle()
            result.save(path, self.owner(path))

    def clear_current(self, keep: int) -> None:
        """Remove the state of all blocks except ``keep``. It is obsolete, or depends on a damaged block."""
        if self.writes:
            for path in (self.path / "current").iterdir():
                if is_block_file(path) and not path.name.startswith(f"{keep:03d}."):
                    path.unlink()

    # -- streams ------------------------------------------------------------------------------------------------

    def load_streams(self, keep: Callable[[Tensor], Tensor]) -> tuple[int, Tensor, Tensor] | None:
        """Load the saved streams; None if they are missing. A damaged file is reported and removed.

        Args:
            keep: copies the samples that this process needs. Its argument is a stream mapped from the file.

        Returns:
            The index of the block that the streams enter, the full-precision stream and the quantized stream.
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
        """Save both streams, with the samples of all processes, as they enter block ``index``."""
        tensors = {"full_precision": full_precision, "quantized": quantized}
        path = self.path / "streams.safetensors"
        save_tensors(path, tensors, {"index": str(index)}, self.owner(path))

    def remove_streams(self) -> None:
        """Remove the streams of a finished run. They can be computed again from the finished blocks."""
        (self.path / "streams.safetensors").unlink(missing_ok=True)

    def _discard(self, path: Path, error: Exception, consequence: str) -> None:
        if self.writes:
            log.warning("%s; removed, %s", error, consequence)
            path.unlink(missing_ok=True)
