# SPDX-License-Identifier: Apache-2.0
"""Calibration windows that the full-precision model writes (``omniq.data.SelfGenerated``).

transformers opens the whole model once, and the model uses its own cache of keys and values. Each process writes its
share of the windows. The run directory keeps all windows in ``generated.safetensors``; a resumed run reads them. The
fingerprint of the run contains their digest.
"""

import logging
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from omniq.config.run import Run
from omniq.data.generated import SelfGenerated, draw_windows, first_tokens, text_tokens
from omniq.data.windows import Calibration, Windows
from omniq.distributed import collectives
from omniq.distributed.launch import launched_processes
from omniq.distributed.memory import free_host_memory, free_memory
from omniq.errors import CorruptFile, UserError
from omniq.models.locate import locate
from omniq.models.no_progress_bars import without_bars
from omniq.models.source import SourceModel
from omniq.models.transformers_io import open_weights
from omniq.report.console import plain_console
from omniq.storage.ownership import GENERATED
from omniq.storage.run_dir import RunDir
from omniq.storage.sealed import load_tensors, save_tensors

log = logging.getLogger("omniq")


def generated_windows(run: Run, source: SourceModel, device: torch.device) -> Windows:
    """Read the windows from the run directory, or let the model write them.

    Raises:
        UserError: the model does not fit in memory whole.
    """
    data = run.data
    tokens = collectives.broadcast_from_rank0(lambda: _read(run.out / GENERATED))
    if tokens is None:
        collectives.broadcast_from_rank0(lambda: check_memory(data, source, device))
        generator = torch.Generator().manual_seed(run.seed if data.seed is None else data.seed)
        size = (data.samples + data.held_out, data.length)
        uniforms = torch.rand(size, dtype=torch.float64, generator=generator)
        share = _generate(run, source, collectives.local_shard(uniforms), device)
        tokens = collectives.all_gather_samples(share).cpu()
    return Windows(tokens[: data.samples], tokens[data.samples :], distinct=data.samples)


def save_generated(folder: RunDir, windows: Windows) -> None:
    """Keep windows in the run directory, unless it holds them."""
    path = folder.path / GENERATED
    if folder.writes and not path.exists():
        save_tensors(path, {"tokens": torch.cat([windows.calibration, windows.held_out])}, {}, folder.owner(path))


def check_memory(data: Calibration, source: SourceModel, device: torch.device) -> None:
    """Refuse a model that does not fit in memory whole, with its cache of keys and values.

    Raises:
        UserError: names the required and the free bytes.
    """
    cache = _batch(data) * data.length * _cache_per_token(source)
    host, gpu = free_host_memory() // launched_processes()[1], device.type == "cuda"
    needs = {"host": (source.nbytes if gpu else source.nbytes + cache, host)}  # the weights pass through the host
    if gpu:
        needs["device"] = (source.nbytes + cache, free_memory(device))
    for place, (needed, free) in needs.items():
        if needed > free:
            raise UserError(
                f"data.source SelfGenerated: the whole model ({source.nbytes:,} bytes) and its cache for "
                f"{_batch(data)} windows ({cache:,} bytes) do not fit in the {free:,} free bytes of {place} memory: "
                "lower SelfGenerated.batch if the model alone fits, or let another program write text with this model, "
                "and give it as omniq.data.LocalText"
            )


def _cache_per_token(source: SourceModel) -> int:
    """Bytes of the keys and values of one token."""
    config = source.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * source.num_blocks * heads * width * source.dtype.itemsize


def _settings(data: Calibration) -> SelfGenerated:
    assert isinstance(data.source, SelfGenerated)
    return data.source


def _batch(data: Calibration) -> int:
    """The number of windows that the model writes at the same time."""
    return min(_settings(data).batch, data.samples + data.held_out)


def _read(path: Path) -> Tensor | None:
    """The windows in a run directory; None if they are missing or damaged."""
    if not path.exists():
        return None
    try:
        return load_tensors(path)[0]["tokens"]
    except CorruptFile as error:
        log.warning("%s; removed, the windows are drawn again", error)
        path.unlink()
        return None


@torch.no_grad()
def _generate(run: Run, source: SourceModel, uniforms: Tensor, device: torch.device) -> Tensor:
    """Write the windows of this process, int64 ``[n, t]``, in batches."""
    given, settings = run.model, _settings(run.data)
    folder, file = locate(given.path, given.gguf_file, given.trust_remote_code)
    options = {"attn_implementation": given.attention, "trust_remote_code": given.trust_remote_code}
    with without_bars():
        model: nn.Module = open_weights(folder, file, dtype=source.dtype, **options).eval()
    model.to(device)
    tokenizer, console = source.tokenizer(), plain_console(quiet=collectives.rank() > 0)
    allowed = text_tokens(tokenizer, source.config.get_text_config().vocab_size).to(device)
    first = first_tokens(tokenizer, run.data.add_special_tokens).to(device)
    windows: list[Tensor] = []
    started = time.monotonic()
    for part in uniforms.split(settings.batch):
        windows += draw_windows(_Writer(model), first, allowed, part.to(device), settings.greedy).cpu()
        seconds = time.monotonic() - started
        console.print(f"the model has written {len(windows)} of {len(uniforms)} windows ({seconds:.0f} s)")
    return torch.stack(windows)


class _Writer:
    """A model with its cache of keys and values, which starts empty."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Append tokens ``[b, n]``, and return the logits of the next token, ``[b, v]``."""
        found = self.model(tokens, past_key_values=self.cache, use_cache=True, return_dict=True)
        self.cache = found.past_key_values
        logits: Tensor = found.logits[:, -1]
        return logits
