# SPDX-License-Identifier: Apache-2.0
"""The container of mlx-lm: a Hugging Face folder whose ``config.json`` also says ``quantization``.

mlx-lm reads config, tokenizer, chat template and generation config under their usual names. transformers refuses the
folder, because it does not know this layout, so omniq verifies it with its own reader.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from omniq.export.containers.container import Results
from omniq.export.containers.folder_reader import FolderCodec
from omniq.export.containers.huggingface import HuggingFaceFolder
from omniq.export.containers.shards import writing
from omniq.grid.scheme import Scheme
from omniq.models.source import SourceModel


class MlxFolder(HuggingFaceFolder):
    """Implements ``omniq.export.containers.container.Container``."""

    def write(
        self,
        source: SourceModel,
        results: Results,
        codec: FolderCodec,
        folder: Path,
        *,
        format: str,
        scheme: Scheme,
        max_shard_bytes: int,
    ) -> dict[str, Any]:
        """Write a Hugging Face folder, then copy the grids to the key that MLX reads."""
        facts = super().write(
            source, results, codec, folder, format=format, scheme=scheme, max_shard_bytes=max_shard_bytes
        )
        file = folder / "config.json"
        content = json.loads(file.read_text(encoding="utf-8"))
        grids = content["quantization_config"].items()
        content["quantization"] = {key: value for key, value in grids if key != "symmetric"}
        with writing(file):
            file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return facts

    def write_companions(self, source: SourceModel, facts: Mapping[str, Any], folder: Path) -> None:
        """Write generation config, tokenizer, recipe and model card."""
        place = facts.get("name", "path/to/this/folder")
        usage = (
            "On a Mac: `pip install mlx-lm`; on Linux: `pip install 'mlx[cpu]' mlx-lm`; then\n\n"
            f'```\nmlx_lm.generate --model {place} --prompt "The capital of France is"\n```'
        )
        super().write_companions(source, {**facts, "usage": usage, "library": "mlx"}, folder)

    def lacks(self, codec: FolderCodec, path: Path | None = None) -> str | None:
        """The reason why transformers cannot open the folder."""
        return "transformers does not read the layout of MLX"

    def open(self, path: Path) -> PreTrainedModel:
        """Not possible."""
        raise NotImplementedError(f"{path}: transformers does not read the layout of MLX")
