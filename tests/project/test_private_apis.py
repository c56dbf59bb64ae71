# SPDX-License-Identifier: Apache-2.0
"""The private names of libraries that omniq uses, in one list.

A new version of a library may rename or remove a private name without notice. These tests then say which one is gone
and which file uses it. They also fail when omniq begins to use a private name that is not in the list.
"""

import ast
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTED = {"_exit", "_fields", "_make", "_replace"}  # by Python: os._exit and named tuples


class Private(NamedTuple):
    """A private name, and where omniq uses it.

    Attributes:
        owner: the module or class that has the name, in the notation of ``pkgutil.resolve_name``.
        signature: names of the parameters that omniq passes or overrides, in order; None for what is not called.
        instance: the name is an attribute of the instances of the class.
    """

    owner: str
    name: str
    file: str
    signature: tuple[str, ...] | None = None
    instance: bool = False

    @property
    def package(self) -> str:
        return self.owner.partition(".")[0].partition(":")[0]


USED = [
    Private("torch.distributed.distributed_c10d", "_get_default_store", "omniq/distributed/collectives.py", ()),
    Private("torch.nn:Module", "_non_persistent_buffers_set", "omniq/models/meta.py", instance=True),
    Private("torch.nn:Module", "_apply", "omniq/runtime/linear.py", ("self", "fn", "recurse")),
    Private("torch.utils._pytree", "tree_map_only", "omniq/models/verify_equivalences.py"),
    Private("transformers:PreTrainedModel", "_init_weights", "omniq/models/meta.py", ("self", "module")),
    Private("transformers:LlamaConfig", "_attn_implementation", "omniq/blocks/activation_hooks.py", instance=True),
    Private(
        "transformers.quantizers.base:HfQuantizer", "_process_model_before_weight_loading", "omniq/runtime/quantizer.py"
    ),
    Private(
        "transformers.quantizers.base:HfQuantizer", "_process_model_after_weight_loading", "omniq/runtime/quantizer.py"
    ),
    Private("transformers.quantizers.base:HfQuantizer", "_dequantize", "omniq/runtime/quantizer.py"),
    Private("transformers:PreTrainedModel", "_supports_sdpa", "omniq/models/meta.py"),
    Private("transformers.models.mixtral.modeling_mixtral:MixtralExperts", "_apply_gate", "omniq/models/experts.py"),
    Private("torch:Tensor", "_version", "omniq/models/trace.py"),
    Private("lightning.fabric.cli", "_main", "omniq/cli/lightning_run.py"),
    Private("jsonargparse._common", "parsing_settings", "omniq/config/class_paths.py"),
    Private("torchmetrics:MeanMetric", "_defaults", "omniq/evaluate/perplexity.py", instance=True),
    Private("torchmetrics:MeanMetric", "_computed", "omniq/evaluate/perplexity.py", instance=True),
    Private("torchmetrics:Metric", "_apply", "omniq/evaluate/perplexity.py"),
]


def names_of(tree: ast.AST) -> tuple[set[str], set[str]]:
    """Names that a source file reads from objects or imports, and names that it defines itself."""
    read: set[str] = set()
    own: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                own.add(name)
            case ast.Attribute(attr=name):
                read.add(name)
            case ast.ImportFrom(module=str(module), names=names):
                read |= {*module.split("."), *(alias.name for alias in names)}
    return read, own


@pytest.mark.parametrize("private", USED, ids=lambda private: f"{private.owner}.{private.name}")
def test_private_api_that_omniq_uses_exists(private: Private) -> None:
    if private.name == "_main":
        pytest.importorskip("click", reason="Lightning defines it only with click, and omniq says so")
    release = f"{private.package} {version(private.package)}"
    message = f"{release}: {private.owner} has no {private.name}: adapt {private.file}, or pin an earlier version"
    try:
        owner: Any = resolve_name(private.owner)
    except (ImportError, AttributeError):
        pytest.fail(message)
    assert hasattr(owner() if private.instance else owner, private.name), message
    if private.signature is not None:
        found = tuple(inspect.signature(getattr(owner, private.name)).parameters)
        assert found == private.signature, (
            f"{release}: {private.owner}.{private.name} takes {found}: adapt {private.file}"
        )


def test_private_apis_in_list_are_used() -> None:
    unused = [private for private in USED if private.name not in (ROOT / private.file).read_text()]
    assert not unused, "remove them from USED"


def test_private_apis_of_libraries_are_all_listed() -> None:
    read: dict[str, str] = {}
    own: set[str] = set()
    for path in (*ROOT.glob("omniq/**/*.py"), *ROOT.glob("callbacks/*.py")):
        found, defined = names_of(ast.parse(path.read_text()))
        read |= dict.fromkeys(found, str(path.relative_to(ROOT)))
        own |= defined
    listed = {name for private in USED for name in (private.name, *re.split("[.:]", private.owner))}
    private = {name: path for name, path in read.items() if name.startswith("_") and not name.startswith("__")}
    assert listed & private.keys()
    missing = {name: path for name, path in private.items() if name not in own | listed | DOCUMENTED}
    assert not missing, f"add these private names to USED, or do without them: {missing}"
