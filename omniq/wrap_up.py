# SPDX-License-Identifier: Apache-2.0
"""After the last block: perplexity before and after, the checkpoint, its verification, and the summary of the run."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn
from transformers import AutoTokenizer

from omniq.config import Export
from omniq.data import digest
from omniq.data.text import one_line
from omniq.errors import UserError
from omniq.evaluate.perplexity import PerplexityResult, evaluate_streamed
from omniq.evaluate.streaming import Variant
from omniq.evaluate.table import perplexity_table
from omniq.export import (
    Opened,
    Report,
    VerificationError,
    earlier_export,
    export_checkpoint,
    find_format,
    mend_companions,
    verify_checkpoint,
)
from omniq.models.family import Family
from omniq.models.locate import public_name
from omniq.models.source import SourceModel
from omniq.preflight import Plan
from omniq.quantizers.hooks import attach
from omniq.quantizers.scheme import Activations, Scheme
from omniq.result import BlockResult, deploy
from omniq.run_dir import RunDir
from omniq.stages.rtn import rounded_to_nearest
from omniq.streams import Home

log = logging.getLogger("omniq")

VERIFICATION_TEXT = "A model is quantized block by block, and every code that was chosen is the code that is stored."
FULL, RTN, OURS = "full precision", "round to nearest", "omniq"
PERPLEXITY_TOLERANCE = 5e-3  # measured: 0.0; both compute in the dtype of the checkpoint


def wrap_up(plan: Plan, folder: RunDir, console: Console) -> None:
    """Evaluate, export, verify and summarize; what an earlier process finished is kept.

    Raises:
        UserError: the run has its checkpoint already, written with other settings.
    """
    check_export(folder, plan.run.export)
    facts = summary(plan, folder)
    if plan.evaluation is not None and plan.run.evaluation is not None:
        text = plan.run.evaluation.describe()
        facts["perplexity"] = {text: perplexities(plan, plan.evaluation, text, folder, console)}
    folder.write_json("summary.json", facts)
    if plan.run.export.format != "none":
        if not (folder.path / "model").exists():
            folder.save_record("export.json", layout_of(plan.run.export))
        out, window = folder.path / "model", None if plan.evaluation is None else plan.evaluation[:1]
        write_checkpoint(plan.source, folder, out, plan.run.export, plan.run.scheme, facts, console, window)
    folder.forget_streams()


def check_export(folder: RunDir, export: Export) -> None:
    """Refuse to take a checkpoint that was written with other settings for the one that is asked for.

    Raises:
        UserError: names the settings and two ways to go on.
    """
    model = folder.path / "model"
    written = folder.load_record("export.json") if model.exists() and export.format != "none" else None
    if written is None:
        return
    changed = [
        f"export.{key} was {written[key]!r}, now {value!r}"
        for key, value in layout_of(export).items()
        if written[key] != value
    ]
    if changed:
        raise UserError(
            f"{model} was written with other settings ({'; '.join(changed)}): remove it to have it written again, or "
            f"write another one: omniq export --run {folder.path} --out FOLDER --export.format {export.format}"
        )


def layout_of(export: Export) -> dict[str, Any]:
    """The settings that a checkpoint on disk depends on."""
    return {"format": export.format, "max_shard_size": export.max_shard_size}


def write_checkpoint(
    source: SourceModel,
    folder: RunDir,
    out: Path,
    export: Export,
    scheme: Scheme,
    facts: dict[str, Any],
    console: Console,
    window: Tensor | None = None,
) -> None:
    """Export a finished run, compare what was written with what was optimised, and let it speak.

    An export that is there already is kept if it is this one, and replaced if it is not: in another format, damaged, or
    of another run. Of one that is kept, what lies beside the weights is written anew where it differs.

    Args:
        window: of the evaluation, int64 ``[1, t]``, whose perplexity is compared where activations are quantized; a
            sentence if not given.
    """
    read, layout, size = block_reader(folder), export.format, int(export.max_shard_size * 1e9)
    if window is None or not scheme.activations.quantized:
        window = source.tokenizer()(VERIFICATION_TEXT, return_tensors="pt").input_ids
    opened = Opened(out, find_format(layout))

    def verify() -> str:
        report = verify_checkpoint(out, source, read, format=layout, scheme=scheme, windows=window, opened=opened)
        same = same_perplexity(report, source, read, scheme, window) if scheme.activations.quantized else ""
        return describe(report) + same

    earlier, report = None, None
    try:
        earlier = earlier_export(out)
        if earlier == layout and export.verify:
            report = verify()
    except Exception as error:  # a damaged file shows in many ways
        log.warning("%s is not what this run writes there (%s): it is replaced", out, one_line(error))
    own = out == folder.path / "model"  # anywhere else nothing but the codes tells whose it is
    if report is None and (earlier != layout or export.verify or not own):
        instead = f", in the place of an export in format {earlier}" if earlier is not None else ""
        console.print(f"writing {out} in format {layout}{instead}")
        export_checkpoint(source, read, out, format=layout, scheme=scheme, card=facts, max_shard_bytes=size)
        opened = Opened(out, find_format(layout))
        report = verify() if export.verify else None
    elif mended := mend_companions(source, out, format=layout, card=facts):
        console.print(f"written anew in {out}, where it was damaged or of other settings: {', '.join(mended)}")
    if report is not None:
        console.print(report)
    if export.prompt is not None:
        console.print(f"the checkpoint says{answer(opened, export.prompt)}")


def describe(report: Report) -> str:
    """What was verified, in one line."""
    way, why = ("through transformers", "") if report.lacking is None else ("block by block", f" ({report.lacking})")
    return (
        f"verified: {report.codes:,} codes of {report.linears} linears read back equal; "
        f"logits {way} within {report.relative_error:.1e} of omniq's{why}"
    )


def same_perplexity(
    report: Report, source: SourceModel, read: Callable[[int], BlockResult], scheme: Scheme, windows: Tensor
) -> str:
    """Hold the perplexity of a checkpoint against the one that omniq measures.

    Raises:
        VerificationError: they differ by more than 0.5 %.
    """
    variants = {OURS: quantized(read, source.family, scheme.activations)}
    ours = evaluate_streamed(as_deployed(source, scheme), windows, variants)[OURS].perplexity
    theirs, tokens = report.perplexity, windows.numel()
    both = f"perplexity of {tokens:,} tokens {theirs:.5g}, and {ours:.5g} by omniq's own evaluation"
    if not abs(theirs / ours - 1) <= PERPLEXITY_TOLERANCE:  # NaN must not pass
        raise VerificationError(f"the checkpoint is not the model that was measured: {both}")
    return f"; {both}"


def answer(opened: Opened, prompt: str, new_tokens: int = 24) -> str:
    """What the checkpoint answers, greedily, opened by plain transformers as any user would; or why it cannot."""
    model: Any = opened.model
    if model is None:
        return f" nothing: {opened.lacking}"
    tokenizer = AutoTokenizer.from_pretrained(opened.path)
    tokens = tokenizer(prompt, return_tensors="pt")
    said = model.generate(**tokens, max_new_tokens=new_tokens, do_sample=False)
    return f": {tokenizer.decode(said[0], skip_special_tokens=True)!r}"


def block_reader(folder: RunDir) -> Callable[[int], BlockResult]:
    """Finished blocks by index."""

    def read(index: int) -> BlockResult:
        return BlockResult.load(folder.block_path(index))

    return read


def perplexities(plan: Plan, windows: Tensor, text: str, folder: RunDir, console: Console) -> dict[str, Any]:
    """Perplexity of the full-precision, the round-to-nearest and the quantized model."""
    measured = folder.load_record("perplexity.json")
    about: dict[str, Any] = {"text": text, "tokens": digest(windows)}
    if measured is not None and about.items() <= measured.items():
        results = {name: PerplexityResult.from_json(entry) for name, entry in measured["models"].items()}
    else:
        results = measure(plan, windows, folder, console)
        folder.save_record("perplexity.json", about | {"models": {k: v.to_json() for k, v in results.items()}})
    console.print(perplexity_table(results, title=text))
    return {name: result.perplexity for name, result in results.items()}


def measure(plan: Plan, windows: Tensor, folder: RunDir, console: Console) -> dict[str, PerplexityResult]:
    """All three in one pass over the blocks, or in two if the quantized ones compute in another dtype."""
    full: dict[str, Variant] = {FULL: full_precision}
    ours = {RTN: rounded(plan), OURS: quantized(block_reader(folder), plan.source.family, plan.run.scheme.activations)}
    deployed = as_deployed(plan.source, plan.run.scheme)
    passes = [(plan.source, full | ours)] if deployed is plan.source else [(plan.source, full), (deployed, ours)]
    results: dict[str, PerplexityResult] = {}

    def home(size: int) -> Home:
        most = max(len(variants) for _, variants in passes)
        return Home.choose(plan.run.streams, plan.device, folder.path, size, count=most)

    with console.status("perplexity") as status:
        for source, variants in passes:
            results |= evaluate_streamed(
                source,
                windows,
                variants,
                device=plan.device,
                batch_size=plan.run.batch,
                home=home,
                progress=lambda done, total: status.update(f"perplexity: block {done}/{total}"),
            )
            source.release()
    return results


def as_deployed(source: SourceModel, scheme: Scheme) -> SourceModel:
    """The model to measure quantized variants on: where activations are integers, in the dtype of deployment.

    An activation near a tie that goes the other way is a perturbation like any other, and every layer behind it makes
    more of them. Two ways to compute one model, float32 and float16 for instance, have perplexities apart (SmolLM2-135M
    on 2040 tokens: 0.5 % at W8A8, 2 % at W6A6, 12 % at W4A4). So what is measured is what will run, operation by
    operation.
    """
    dtype = scheme.deploy_dtype
    return source.in_dtype(dtype) if scheme.activations.quantized and dtype != source.dtype else source


def full_precision(index: int, block: nn.Module) -> nn.Module:
    """The block as it is."""
    return block


def rounded(plan: Plan) -> Variant:
    """Every block rounded to nearest on the min-max grid of the run's scheme, its activations quantized as there.

    Where the scheme fixes the ranges of inputs, which only calibration can, each window has its own.
    """

    def variant(index: int, block: nn.Module) -> nn.Module:
        for name in plan.source.family.linears:
            linear: Any = block.get_submodule(name)
            weight = linear.weight.detach().float()
            linear.weight.data.copy_(rounded_to_nearest(weight, plan.run.scheme.grid))
        attach(block, plan.source.family, plan.run.scheme.activations)
        return block

    return variant


def quantized(read: Callable[[int], BlockResult], family: Family, activations: Activations) -> Variant:
    """Every block as the run left it, its activations quantized as the scheme says."""

    def variant(index: int, block: nn.Module) -> nn.Module:
        result = read(index)
        deploy(block, result)
        attach(block, family, activations, result.linears)
        return block

    return variant


def summary(plan: Plan, folder: RunDir) -> dict[str, Any]:
    """What the model card and summary.json tell: recipe, data, versions, losses, size."""
    read, blocks, bits, total = block_reader(folder), [], 0.0, 0
    for index in range(plan.source.num_blocks):  # one at a time: all codes of a large model do not fit into memory
        block = read(index)
        blocks.append(dict(block.summary))
        for linear in block.linears.values():
            bits += linear.bits_per_weight() * linear.codes.numel()
            total += linear.codes.numel()
    return {
        "base_model": public_name(plan.run.model.path),
        "scheme": plan.run.scheme.name,
        "method": " then ".join(type(stage).__name__ for stage in plan.run.stages),
        "recipe": (folder.path / "config.yaml").read_text(),
        "data": {"text": plan.run.data.describe(), "digest": plan.fingerprint["data digest"]},
        "source_digest": plan.fingerprint["model digest"],
        "seed": plan.run.seed,
        "bits_per_weight": round(bits / total, 3),
        "versions": dict(plan.environment),
        "blocks": blocks,
    }
