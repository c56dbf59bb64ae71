# SPDX-License-Identifier: Apache-2.0
"""Programs that run an export, each asked for its next-token distributions.

A runtime that is not installed costs nothing: its package is imported only when a checkpoint is opened in it.

llama.cpp (``xllamacpp``) returns probabilities of generated tokens only, so each position is a request for one token.
OpenVINO converts the GGUF file in memory; its graph, which has the logits of all positions, is saved to a temporary
folder and opened again. It computes in float32 here, as omniq's reference does, and in bfloat16 by default.

Shapes: ``t`` tokens, ``v`` vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from omniq.export.containers.gguf_file import GgufReader
from omniq.export.containers.gguf_reader import FILE
from omniq.export.registry import container_of, find_format


@dataclass(frozen=True)
class Runtime:
    """A program that runs exports.

    Args:
        name: the name that users type.
        formats: the export formats that it opens.
        modules: Python modules that it needs.
        install: the command that installs it.
        log_probabilities: given a folder and int64 tokens ``[t]``, the logarithms of the probabilities of the next
            token after each of them, ``[t, v]``. Logits are accepted too: they are normalized.
    """

    name: str
    formats: tuple[str, ...]
    modules: tuple[str, ...]
    install: str
    log_probabilities: Callable[[Path, Tensor], Tensor]

    def lacking(self, path: Path, format: str, codec: Any) -> str | None:
        """The reason why a checkpoint cannot be opened here, with the remedy; None if it can."""
        if any(find_spec(module) is None for module in self.modules):
            return f"not installed: {self.install}"
        return find_format(format).container.lacks(codec, path) if self.name == "transformers" else None


@torch.no_grad()
def _transformers(path: Path, tokens: Tensor) -> Tensor:
    container = container_of(path)
    assert container is not None  # the caller has found it
    logits: Tensor = container.open(path)(tokens[None], use_cache=False).logits[0]
    return logits


def _llama_cpp(path: Path, tokens: Tensor) -> Tensor:
    runtime: Any = import_module("xllamacpp")
    params = runtime.CommonParams()
    params.model.path = str(path / FILE)
    params.n_ctx, params.n_parallel, params.warmup, params.verbosity = 4 * len(tokens) + 64, 1, False, -1
    server, rows = runtime.Server(params), []
    with GgufReader(path / FILE) as file:
        vocabulary = file.metadata["tokenizer.ggml.tokens"].decoded()
    # The generated token must be readable: llama.cpp sends no probabilities with the end or with half a character.
    # The probabilities are those before the bias.
    size = len(vocabulary)
    options = {"max_tokens": 1, "temperature": 0, "n_probs": size, "logit_bias": [[vocabulary.index("a"), 1e4]]}
    for length in range(1, len(tokens) + 1):
        answer = server.handle_completions({"prompt": tokens[:length].tolist(), **options})
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        row = torch.full((size,), -torch.inf)
        row[torch.tensor([entry["id"] for entry in found])] = torch.tensor([entry["logprob"] for entry in found])
        rows.append(row)
    return torch.stack(rows)


def _openvino(path: Path, tokens: Tensor) -> Tensor:
    genai: Any = import_module("openvino_genai")
    openvino: Any = import_module("openvino")
    with TemporaryDirectory() as folder:
        place = Path(folder, FILE)
        place.symlink_to((path / FILE).resolve())
        genai.LLMPipeline(str(place), "CPU", enable_save_ov_model=True)
        core = openvino.Core()
        hints = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}
        model = core.compile_model(core.read_model(Path(folder, "openvino_model.xml")), "CPU", hints)
        ids = tokens[None].numpy()
        given = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(tokens)[None].numpy(),
            "position_ids": torch.arange(len(tokens))[None].numpy(),
            "beam_idx": torch.zeros(1, dtype=torch.int32).numpy(),
        }
        request = model.create_infer_request()
        request.infer({name: given[name] for name in (entry.get_any_name() for entry in model.inputs)})
        return torch.tensor(request.get_output_tensor(0).data[0])


def _mlx(path: Path, tokens: Tensor) -> Tensor:
    core: Any = import_module("mlx.core")
    mlx_lm: Any = import_module("mlx_lm")
    if not core.metal.is_available():
        core.set_default_device(core.cpu)
    model, _ = mlx_lm.load(str(path))
    logits = model(core.array(tokens[None].numpy())).astype(core.float32)
    return torch.tensor(logits.tolist()[0])


RUNTIMES = (
    Runtime(
        "transformers",
        ("compressed-tensors", "omniq", "gptq", "awq", "auto-round", "gguf"),
        (),
        "pip install transformers",
        _transformers,
    ),
    Runtime("llama.cpp", ("gguf",), ("xllamacpp",), "pip install 'omniq[gguf]'", _llama_cpp),
    Runtime(
        "openvino",
        ("gguf",),
        ("openvino", "openvino_genai", "openvino_tokenizers"),
        "pip install 'omniq[openvino]'",
        _openvino,
    ),
    Runtime("mlx", ("mlx",), ("mlx", "mlx_lm"), "pip install 'omniq[mlx]'", _mlx),
)
