# SPDX-License-Identifier: Apache-2.0
"""Write the checkpoint of a finished run, verify it, and generate text with it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from omniq.config.run import Export, Run
from omniq.errors import CorruptFile, UserError, one_line
from omniq.evaluate.perplexity import evaluate_streamed
from omniq.evaluate.variants import in_export_dtype, quantized_variant
from omniq.export import (
    ReopenedCheckpoint,
    Report,
    VerificationError,
    earlier_export,
    export_checkpoint,
    find_format,
    mend_companions,
    verify_checkpoint,
)
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_tokenizer
from omniq.models.weight_files import weight_file
from omniq.storage.block_result import BlockResult
from omniq.storage.run_dir import RunDir

log = logging.getLogger("omniq")

VERIFICATION_TEXT = "A model is quantized block by block, and every code that was chosen is the code that is stored."
FULL, RTN, OURS = "full precision", "round to nearest", "omniq"
PERPLEXITY_TOLERANCE = 5e-3  # measured: 0.0; both compute in the dtype of the checkpoint


def check_export(folder: RunDir, export: Export) -> None:
    """Refuse to keep a checkpoint that was written with other export settings.

    Raises:
        UserError: names the settings and two remedies.
    """
    model = folder.path / "model"
    written = folder.load_record("export.json") if model.exists() else None
    if written is None:
        return
    changed = [
        f"export.{key} was {written.get(key)!r}, now {value!r}"  # earlier versions recorded no container_bits
        for key, value in settings_of(export).items()
        if written.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{model} was written with other settings ({'; '.join(changed)}): remove it to write it again, or "
            f"write another checkpoint: omniq export --run {folder.path} --out FOLDER --export.format {export.format}"
        )


def settings_of(export: Export) -> dict[str, Any]:
    """Return the settings that a checkpoint on disk depends on."""
    settings = {"format": export.format, "max_shard_size": export.max_shard_size}
    return settings | {"container_bits": export.container_bits}


def write_checkpoint(
    source: SourceModel,
    folder: RunDir,
    out: Path,
    export: Export,
    run: Run,
    facts: dict[str, Any],
    console: Console,
    window: Tensor | None = None,
) -> None:
    """Export a finished run, compare the checkpoint with the optimized model, and complete a prompt with it.

    An export that is already in ``out`` is kept if it is the export of this run; its files beside the weights are
    rewritten where they differ. An export in another format, of another run, or with damage is replaced. ``window`` is
    one evaluation sequence, int64 ``[1, t]``, whose perplexity is compared if activations are quantized.
    """
    read, scheme, size = block_reader(folder, run), run.scheme, int(export.max_shard_size * 1e9)
    chosen = find_format(export.format)
    if window is None or not scheme.activations.quantized:
        window = source.tokenizer()(VERIFICATION_TEXT, return_tensors="pt").input_ids
    layout: dict[str, Any] = {"format": chosen.name, "scheme": scheme, "container_bits": export.container_bits}
    opened = ReopenedCheckpoint(out, chosen.container, chosen.codec(scheme))

    def verify() -> str:
        report = verify_checkpoint(out, source, read, **layout, windows=window, opened=opened)
        same = same_perplexity(report, source, read, scheme, window) if scheme.activations.quantized else ""
        return describe(report) + same

    earlier, report = _check_earlier(out, chosen.name, verify if export.verify else None)
    elsewhere = out != folder.path / "model"  # where only the codes identify the run
    if report is None and (earlier != chosen.name or export.verify or elsewhere):
        instead = f", replacing an export in format {earlier}" if earlier is not None else ""
        console.print(f"writing {out} in format {chosen.name}{instead}")
        export_checkpoint(source, read, out, **layout, card=facts, max_shard_bytes=size)
        opened = ReopenedCheckpoint(out, chosen.container, chosen.codec(scheme))
        report = verify() if export.verify else None
    elif mended := mend_companions(source, out, **layout, card=facts):
        console.print(f"rewritten in {out}, because damaged or made with other settings: {', '.join(mended)}")
    if report is not None:
        console.print(report)
    if export.prompt is not None:
        console.print(answer(opened, export.prompt))


def _check_earlier(out: Path, name: str, verify: Callable[[], str] | None) -> tuple[str | None, str | None]:
    """Return the format of the export in ``out``, and the report of its verification if it passes."""
    earlier = None
    try:
        earlier = earlier_export(out)
        if earlier == name and verify is not None:
            return earlier, verify()
    except (CorruptFile, VerificationError) as error:
        log.warning("%s is not the checkpoint of this run (%s): replacing it", out, one_line(error))
    return earlier, None


def describe(report: Report) -> str:
    """Describe the verification in one line."""
    way, why = ("through transformers", "") if report.lacking is None else ("block by block", f" ({report.lacking})")
    return (
        f"verified: {report.codes:,} codes of {report.linears} linears read back equal; "
        f"logits {way} within {report.relative_error:.1e} of omniq's{why}"
    )


def same_perplexity(
    report: Report, source: SourceModel, read: Callable[[int], BlockResult], scheme: Scheme, windows: Tensor
) -> str:
    """Compare the perplexity of a checkpoint with the perplexity that omniq measures.

    Returns:
        Both perplexities in words, for the line that reports the verification.

    Raises:
        VerificationError: the perplexities differ by more than 0.5 %.
    """
    variants = {OURS: quantized_variant(read, source, scheme)}
    ours = evaluate_streamed(in_export_dtype(source, scheme), windows, variants)[OURS].perplexity
    theirs, tokens = report.perplexity, windows.numel()
    both = f"perplexity of {tokens:,} tokens {theirs:.5g}, by omniq's own evaluation {ours:.5g}"
    if not abs(theirs / ours - 1) <= PERPLEXITY_TOLERANCE:  # NaN must not pass
        raise VerificationError(f"the checkpoint is not the model that was measured: {both}")
    return f"; {both}"


def answer(opened: ReopenedCheckpoint, prompt: str, new_tokens: int = 24) -> str:
    """Complete a prompt greedily with the checkpoint as plain transformers opens it, or say why that is impossible."""
    model: Any = opened.model
    if model is None:
        return f"the checkpoint does not complete the prompt: {opened.lacking}"
    file = weight_file(opened.path)
    tokenizer = open_tokenizer(opened.path, file if file.endswith(".gguf") else None)
    tokens: Any = tokenizer(prompt, return_tensors="pt")
    said = model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False)
    return f"the checkpoint says: {tokenizer.decode(said[0], skip_special_tokens=True)!r}"


def block_reader(folder: RunDir, run: Run) -> Callable[[int], BlockResult]:
    """Make a function that reads a finished block by its index, with what the stages of the whole model changed."""
    return lambda index: folder.final_block(index, run.model_stages)
