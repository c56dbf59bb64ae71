# SPDX-License-Identifier: Apache-2.0
"""After the last block: perplexity before and after, the checkpoint, its verification, and the summary of the run."""

from typing import Any

from rich.console import Console
from torch import Tensor

from omniq.blocks.grids import scheme_layout
from omniq.blocks.placement import ActivationPlacement
from omniq.data import Bos, digest
from omniq.evaluate.perplexity import evaluate_streamed
from omniq.evaluate.result import PerplexityResult
from omniq.evaluate.streaming import Variant
from omniq.evaluate.variants import full_precision_variant, in_export_dtype, quantized_variant, rounded_variant
from omniq.models.locate import public_name
from omniq.report.table import perplexity_table
from omniq.run.checkpoint import FULL, OURS, RTN, block_reader, check_export, settings_of, write_checkpoint
from omniq.run.plan import Plan
from omniq.storage.ownership import MODEL_STAGES
from omniq.storage.run_dir import RunDir


def finish(plan: Plan, folder: RunDir, console: Console) -> None:
    """Evaluate, export, verify and summarize. Results of an earlier process are reused.

    Raises:
        UserError: the run already has a checkpoint that was written with other settings.
    """
    if plan.run.export.format != "none":
        check_export(folder, plan.run.export)
    facts = summary(plan, folder)
    if plan.evaluation is not None and plan.run.evaluation is not None:
        text = plan.run.evaluation.describe(places_of_bos(plan)["evaluation"])
        facts["perplexity"] = {text: perplexities(plan, plan.evaluation, text, folder, console)}
    folder.write_json("summary.json", facts)
    if plan.run.export.format != "none" and not (folder.path / "model").exists():
        folder.save_record("export.json", settings_of(plan.run.export))
    window = None if plan.evaluation is None else plan.evaluation[:1]
    for export in plan.run.exports:
        out = plan.run.folder_of(export)
        write_checkpoint(plan.source, folder, out, export, plan.run, facts, console, window)
    folder.remove_streams()


def places_of_bos(plan: Plan) -> dict[str, Bos]:
    """Where windows begin with BOS, for calibration and evaluation."""
    tokenizer, kind = plan.source.tokenizer(), plan.source.config.model_type
    places: dict[str, Bos] = {}
    if plan.generated is None:  # generated windows say themselves how they begin
        places["calibration"] = plan.run.data.place_of_bos(tokenizer, kind)
    if plan.run.evaluation is not None:
        places["evaluation"] = plan.run.evaluation.place_of_bos(tokenizer, kind)
    return places


def perplexities(plan: Plan, windows: Tensor, text: str, folder: RunDir, console: Console) -> dict[str, Any]:
    """Return the perplexity of the full-precision, the round-to-nearest and the quantized model, by name."""
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
    """Measure the three models in one pass over the blocks, or in two if the quantized models use another dtype."""
    full: dict[str, Variant] = {FULL: full_precision_variant}
    scheme = plan.run.scheme
    ours = {
        RTN: rounded_variant(plan.source, scheme),
        OURS: quantized_variant(block_reader(folder, plan.run), plan.source, scheme),
    }
    exported = in_export_dtype(plan.source, scheme)
    passes = [(plan.source, full | ours)] if exported is plan.source else [(plan.source, full), (exported, ours)]
    results: dict[str, PerplexityResult] = {}

    def placement(size: int) -> ActivationPlacement:
        most = max(len(variants) for _, variants in passes)
        return ActivationPlacement.choose(plan.run.streams, plan.device, folder.path, size, count=most)

    with console.status("perplexity") as status:
        for source, variants in passes:
            results |= evaluate_streamed(
                source,
                windows,
                variants,
                device=plan.device,
                batch_size=plan.run.batch,
                placement=placement,
                progress=lambda done, total: status.update(f"perplexity: block {done}/{total}"),
            )
            source.release()
    return results


def summary(plan: Plan, folder: RunDir) -> dict[str, Any]:
    """Collect the content of the model card and of summary.json: recipe, data, versions, losses, size."""
    read, blocks, bits, total = block_reader(folder, plan.run), [], 0.0, 0
    kept: dict[str, str] = {}
    for index in range(plan.source.num_blocks):  # one block at a time: the codes of a large model exceed the memory
        block = read(index)
        blocks.append(dict(block.summary))
        for linear in block.linears.values():
            bits += linear.bits_per_weight() * linear.codes.numel()
            total += linear.codes.numel()
        reasons = scheme_layout(plan.source, plan.run.scheme, index).kept
        kept |= {f"{plan.source.block_name(index)}.{name}": reason for name, reason in reasons.items()}
    return {
        "base_model": public_name(plan.run.model.path),
        "scheme": str(plan.run.scheme),
        "method": " then ".join(type(stage).__name__ for stage in plan.run.stages),
        "recipe": (folder.path / "config.yaml").read_text(encoding="utf-8"),
        "data": {"text": plan.run.data.describe(), "digest": plan.fingerprint["data digest"]},
        "bos": places_of_bos(plan),
        "source_digest": plan.fingerprint["model digest"],
        "seed": plan.run.seed,
        "bits_per_weight": round(bits / total, 3),  # of the quantized linears
        **({"kept": kept} if kept else {}),
        "versions": dict(plan.environment),
        "blocks": blocks,
        **({"model_stages": stages} if (stages := folder.load_record(MODEL_STAGES)) else {}),
    }
