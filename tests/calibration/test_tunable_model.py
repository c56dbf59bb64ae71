# SPDX-License-Identifier: Apache-2.0
"""A resident and a streamed model have the loss of the evaluated model, and the same gradients."""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniq.calibration.settings import Memory
from omniq.calibration.tunable_block import change_shapes
from omniq.calibration.tunable_model import ResidentModel, StreamedModel, is_streamed
from omniq.errors import UserError
from omniq.evaluate.streaming import stream_logits
from omniq.evaluate.variants import full_precision_variant, quantized_variant
from omniq.grid.scheme import Scheme
from omniq.storage.block_result import BlockResult
from tests.helpers.finished_block import random_changes
from tests.helpers.model_task import TinyModel, tiny_model_task

STATIC = Scheme("W8A8", activation_range="tensor")
CASES = {
    "llama": ("llama", Scheme("W3A16g16")),
    "opt": ("opt", Scheme("W3A16")),
    "qwen3": ("qwen3", Scheme("W3A16g16", symmetric=True)),
    "phi3": ("phi3", Scheme("W3A16g16")),
    "gemma": ("gemma", Scheme("W4A16g16", dtype="bfloat16")),
    "llama W4A8": ("llama", Scheme("W4A8")),
    "opt W4A8": ("opt", Scheme("W4A8")),
    "qwen3 KV": ("qwen3", Scheme("W4A6KV4", queries=True)),
    "llama KV alone": ("llama", Scheme("W4A16KV4")),
    "llama static": ("llama", STATIC),
    "opt static": ("opt", STATIC),
}
ALL = pytest.mark.parametrize(("family", "scheme"), CASES.values(), ids=CASES)


def some_changes(tiny: TinyModel, codes: bool = False, size: float = 0.02) -> list[dict[str, Tensor]]:
    shapes = [change_shapes(result, codes) for result in tiny.results]
    changes = [random_changes(each, size, index) for index, each in enumerate(shapes)]
    return [{key: value.requires_grad_() for key, value in each.items()} for each in changes]


def gradients(changes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    found = {}
    for index, each in enumerate(changes):
        for key, value in each.items():
            assert value.grad is not None, key
            found[f"{index}/{key}"], value.grad = value.grad, None
    return found


def streamed_kl(tiny: TinyModel) -> tuple[float, float]:
    """The KL of the learned and of the held-out samples by the logits of the exported model, in float64."""
    dtype = tiny.scheme.export_dtype

    def read(index: int) -> BlockResult:
        result = tiny.results[index]
        return replace(result, tensors={name: value.to(dtype) for name, value in result.tensors.items()})

    variants = {"full": full_precision_variant, "ours": quantized_variant(read, tiny.source, tiny.scheme)}
    logits: dict[str, list[Tensor]] = {name: [] for name in variants}
    for name, part, _ in stream_logits(tiny.source, tiny.tokens, variants):
        logits[name].append(part.double())
    full, ours = (torch.cat(logits[name]).log_softmax(-1) for name in variants)
    each = (full.exp() * (full - ours)).sum(-1).mean(-1)
    samples = tiny.task.samples
    return each[:samples].mean().item(), each[samples:].mean().item()


@ALL
def test_model_without_changes_has_kl_of_evaluated_logits(tmp_path: Path, family: str, scheme: Scheme) -> None:
    tiny = tiny_model_task(tmp_path, family, scheme)
    zeros = [
        {key: torch.zeros(shape, requires_grad=True) for key, shape in change_shapes(result, False).items()}
        for result in tiny.results
    ]
    seen, held_out = streamed_kl(tiny)
    assert held_out > 0
    resident = ResidentModel(tiny.task, False)
    inputs, targets = tiny.task.inputs[: tiny.task.samples], tiny.task.targets[: tiny.task.samples]
    assert resident.loss(inputs, targets, zeros).item() == pytest.approx(seen, rel=2e-3)
    assert resident.held_out(zeros).item() == pytest.approx(held_out, rel=2e-3)
    loss, judged = StreamedModel(tiny.task, False).gradients(zeros)
    assert loss.item() == pytest.approx(seen, rel=2e-3)
    assert judged.item() == pytest.approx(held_out, rel=2e-3)


@ALL
def test_streamed_model_has_loss_and_gradients_of_resident_one(tmp_path: Path, family: str, scheme: Scheme) -> None:
    """With static ranges, too: each sample runs alone in both, so quantizers see the same samples."""
    tiny = tiny_model_task(tmp_path, family, scheme)
    changes, task = some_changes(tiny, codes=True), tiny.task
    resident = ResidentModel(task, True)
    losses = []
    for index in range(task.samples):
        part = slice(index, index + 1)
        losses.append(resident.loss(task.inputs[part], task.targets[part], changes))
    torch.stack(losses).mean().backward()
    wanted = gradients(changes)
    loss, held_out = StreamedModel(task, True).gradients(changes)
    assert loss.item() == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert held_out.item() == pytest.approx(resident.held_out(changes).item(), rel=1e-5)
    found = gradients(changes)
    largest = max(value.norm() for value in wanted.values())
    for key, value in found.items():
        assert (value - wanted[key]).norm() < 1e-4 * wanted[key].norm() + 1e-6 * largest, key


def test_streamed_model_does_not_depend_on_batch_nor_on_earlier_call(tmp_path: Path) -> None:
    tiny = tiny_model_task(tmp_path)
    changes, found = some_changes(tiny), []
    model = StreamedModel(tiny.task, False)
    for each in (model, model, StreamedModel(tiny.task, False, batch=2)):
        each.gradients(changes)
        found.append(gradients(changes))
    for key, value in found[0].items():
        assert torch.equal(found[1][key], value), key
        assert (found[2][key] - value).norm() < 1e-4 * value.norm() + 1e-9, key


def test_resident_gradient_equals_difference_of_losses(tmp_path: Path) -> None:
    """Along the gradient of the norms, which the export dtype float32 does not round."""
    tiny = tiny_model_task(tmp_path, scheme=Scheme("W3A16g16", dtype="float32"))
    changes, task = some_changes(tiny), tiny.task
    model = ResidentModel(task, False)
    model.loss(task.inputs, task.targets, changes).backward()
    slopes = gradients(changes)
    length = torch.stack([value.square().sum() for value in slopes.values()]).sum().sqrt()
    ends = []
    for step in (1e-2, -1e-2):
        moved = [
            {key: value.detach() + step * slopes[f"{index}/{key}"] / length for key, value in each.items()}
            for index, each in enumerate(changes)
        ]
        ends.append(model.loss(task.inputs, task.targets, moved).item())
    assert (ends[0] - ends[1]) / 2e-2 == pytest.approx(length.item(), rel=2e-2)


@pytest.mark.parametrize("family", ["llama", "opt", "qwen3", "phi3", "gemma"])
def test_models_in_bfloat16_agree_with_float32(tmp_path: Path, family: str) -> None:
    """As a run with ``trainer.precision: bf16-mixed`` computes."""
    precision = partial(torch.autocast, "cpu", torch.bfloat16)
    scheme = Scheme("W3A16g16", dtype="bfloat16")
    exact = tiny_model_task(tmp_path / "exact", family, scheme)
    tiny = tiny_model_task(tmp_path / "half", family, scheme, dtype="bfloat16", precision=precision)
    changes = some_changes(tiny)
    wanted = ResidentModel(exact.task, False).held_out(changes).item()
    assert ResidentModel(tiny.task, False).held_out(changes).item() == pytest.approx(wanted, rel=0.15)
    loss, held_out = StreamedModel(tiny.task, False).gradients(changes)
    assert held_out.item() == pytest.approx(wanted, rel=0.15)
    assert loss.isfinite()
    ours = gradients(changes)
    StreamedModel(exact.task, False).gradients(changes)
    theirs = gradients(changes)
    a, b = (torch.cat([value.flatten() for value in each.values()]) for each in (ours, theirs))
    assert torch.cosine_similarity(a, b, 0) > 0.95


@pytest.mark.parametrize(("memory", "streamed"), [("auto", (False, True)), ("block", (True, True))])
def test_model_is_streamed_if_asked_or_if_it_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: Memory, streamed: tuple[bool, bool]
) -> None:
    tiny = tiny_model_task(tmp_path)
    for free, wanted in zip((2**40, 2**20), streamed, strict=True):
        monkeypatch.setattr("omniq.distributed.memory.free_host_memory", lambda free=free: free)
        assert is_streamed(tiny.task, 18_432, 1, memory) == wanted


def test_model_that_does_not_fit_is_refused_if_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = tiny_model_task(tmp_path)
    monkeypatch.setattr("omniq.distributed.memory.free_host_memory", lambda: 2**20)
    with pytest.raises(
        UserError, match=r"EndToEnd.memory model: .* needs about .* GiB.*: set memory to block, or lower"
    ):
        is_streamed(tiny.task, 18_432, 1, "model")
