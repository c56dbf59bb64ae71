# SPDX-License-Identifier: Apache-2.0
"""Parse YAML text into plain values, with limits on depth and size.

Numbers are read as jsonargparse reads them: ``5e-3`` is a number, and a date is text. A short text can expand to very
many values, because an alias repeats the content of its anchor. ``load`` therefore counts the expanded values before it
constructs any of them.
"""

import re
from typing import Any

import yaml

MAX_DEPTH = 50
"""Maximum nesting of lists and mappings. Configurations have about 8 levels."""

MAX_VALUES = 100_000
"""Maximum number of values; an alias counts each time it is used. Configurations have about 100 values."""

_FLOAT = re.compile(
    r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
    |\.[0-9_]+(?:[eE][-+][0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.X,
)
_DROPPED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")


class _Loader(yaml.SafeLoader):
    """Loader that reads numbers as YAML 1.2 does."""


class _Dumper(yaml.SafeDumper):
    """Dumper that quotes text which ``_Loader`` would read as a number, and writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    _kind.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _DROPPED]
        for first, resolvers in _kind.yaml_implicit_resolvers.items()
    }
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def load(text: str) -> Any:
    """Parse a YAML document.

    Raises:
        yaml.YAMLError: the text is not YAML.
        ValueError: the document is nested too deeply, holds too many values, or contains itself.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    finally:
        loader.dispose()


def dump(content: Any) -> str:
    """Write plain values as YAML that ``load`` reads back."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False)


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Count the values that a node expands to. ``known`` maps node ids to counts; the count of an open node is 0."""
    if depth > MAX_DEPTH:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias refers to a node that contains it")
        return known[id(node)]
    known[id(node)] = 0
    children: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        children = node.value
    elif isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    total = 1 + sum(_count(child, known, depth + 1) for child in children)
    if total > MAX_VALUES:
        raise ValueError(f"its aliases expand to more than {MAX_VALUES:,} values")
    known[id(node)] = total
    return total
