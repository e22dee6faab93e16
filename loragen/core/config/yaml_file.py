"""YAML files: read with the position of every key, written with a comment beside every key."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from loragen.core.contents import read_bytes, utf8_text
from loragen.core.errors import ConfigError, DataError

Loc = tuple[str | int, ...]
"""The keys and list indices that lead to a value, as in pydantic's errors."""
MAX_DEPTH = 50
"""The deepest nesting accepted."""
MAX_VALUES = 10_000
"""The most keys and values of a document, each anchor counted wherever it is used: a few lines of
anchors that hold each other several times would be more values than fit into memory."""
MERGE_TAG = "tag:yaml.org,2002:merge"


class AmbiguousNumberError(yaml.MarkedYAMLError):
    """A number that is not the one it looks like: `010` is 8, and `1:30` is 90."""


class TooMuchYAML(yaml.YAMLError):
    """The document, or a value, is YAML of more depth or values than any configuration has."""


class _Loader(yaml.SafeLoader):
    """A SafeLoader that records repeated keys and gives every error a position."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: dict[yaml.Node, yaml.Mark] = {}
        """The node of a repeated key -> the position of the first."""

    def get_single_node(self) -> yaml.Node | None:
        """Returns the document's root. Raises TooMuchYAML before any value is constructed."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _count_values(node, {}, ())
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        first: dict[str, yaml.Mark] = {}
        for key, _ in node.value:  # `<<` is resolved later, when the mapping is constructed
            if isinstance(key, yaml.ScalarNode) and key.tag != MERGE_TAG:
                if key.value in first:
                    self.repeated[key] = first[key.value]
                first.setdefault(key.value, key.start_mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            value = super().construct_object(node, deep)
            if type(value) in (int, float) and re.search(r"^[-+]?0[0-7_]+$|:", node.value):
                raise AmbiguousNumberError(
                    problem=f"{node.value} is {value} in YAML: write that, or put quotes around it",
                    problem_mark=node.start_mark,
                )
            return value
        except ValueError as error:  # a text that only looks like a date or number: 2025-13-01
            raise yaml.MarkedYAMLError(
                problem=f"{error}; put quotes around it", problem_mark=node.start_mark
            ) from None


def parse_yaml(text: str) -> Any:
    """Returns a value written as YAML. Raises yaml.YAMLError; MarkedYAMLError with a hint for what
    only looks like a date or a number, and for `010`, which is 8 in YAML."""
    return _Loader(text).get_single_data()


def _count_values(
    node: yaml.Node, counts: dict[yaml.Node, int], around: tuple[yaml.Node, ...]
) -> int:
    """Returns the number of keys and values of a node, those of an anchor as often as it is used.
    `counts` are those of nodes that are counted already, `around` the nodes that hold this one."""
    if node not in counts:
        if node in around or len(around) > MAX_DEPTH:
            raise TooMuchYAML(
                f"nested deeper than {MAX_DEPTH} sections; check for an anchor that contains itself"
            )
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [one for pair in node.value for one in pair]
            merged = [value for key, value in node.value if key.tag == MERGE_TAG]
            if merged == [node]:  # `a: &a {<<: *a}`, once, has no effect
                parts.remove(node)
        counts[node] = 1 + sum(_count_values(one, counts, (*around, node)) for one in parts)
        if counts[node] > MAX_VALUES:
            raise TooMuchYAML(
                f"more than {MAX_VALUES:,} values; check for anchors that contain each other"
            )
    return counts[node]


def read_yaml(
    file: Path, what: str = "configuration file"
) -> tuple[dict[str, Any], dict[Loc, str]]:
    """Reads a YAML mapping and the position (`file:line:column`) of each of its keys; `what` is the
    kind of file that a missing one would have been.

    Raises UsageError for a missing file and ConfigError for YAML that does not parse, is not a
    mapping, or has a key twice.
    """
    content = read_bytes(file, what)
    try:
        loader = _Loader(utf8_text(file, content))
        node = loader.get_single_node()
        tree = {} if node is None else loader.construct_document(node)  # resolves `<<` in `node`
    except TooMuchYAML as error:
        raise ConfigError(f"{file}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{file}:{mark.line + 1}:{mark.column + 1}" if mark else file
        if isinstance(error, AmbiguousNumberError):
            raise ConfigError(f"{place}: {error.problem}") from None
        raise ConfigError(f"{place}: not YAML: {error.problem or error.context}") from None
    except DataError as error:
        raise ConfigError(*error.problems) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{file}: not YAML: nested too deeply") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}:1: expected a mapping of settings, found {type(tree).__name__}")

    def position(mark: yaml.Mark) -> str:
        return f"{file}:{mark.line + 1}:{mark.column + 1}"

    origins: dict[Loc, str] = {}
    for keys, key in _nodes(node, ()):
        if key in loader.repeated:
            raise ConfigError(
                f"{position(key.start_mark)}: {dotted(keys)} is given twice; first at "
                f"{position(loader.repeated[key])}"
            )
        origins[keys] = position(key.start_mark)
    return tree, origins


def _nodes(node: yaml.Node | None, at: Loc) -> Iterator[tuple[Loc, yaml.Node]]:
    """Yields the path of every key and list item, with its node."""
    items: dict[str | int, tuple[yaml.Node, yaml.Node]] = {}
    if isinstance(node, yaml.MappingNode):  # its own keys follow, and replace, those merged in
        items = {key.value: (key, value) for key, value in node.value}
    elif isinstance(node, yaml.SequenceNode):
        items = {index: (item, item) for index, item in enumerate(node.value)}
    for name, (key, value) in items.items():
        yield (*at, name), key
        yield from _nodes(value, (*at, name))


def commented(tree: Mapping[str, Any], comment: Callable[[Loc], str], at: Loc = ()) -> str:
    """Returns the tree as block YAML, with `comment(keys)`, unless it is empty, behind each key."""
    lines = []
    for key, value in tree.items():
        keys = (*at, key)
        nested = isinstance(value, Mapping) and value
        text = f"{'  ' * len(at)}{inline(key)}:" + ("" if nested else f" {inline(value)}")
        remark = comment(keys)
        lines.append(f"{text}  # {remark}\n" if remark else f"{text}\n")
        if nested:
            lines.append(commented(value, comment, keys))
    return "".join(lines)


def inline(value: Any) -> str:
    """Returns a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def leaves(tree: Mapping[str, Any], at: Loc = ()) -> Iterator[tuple[Loc, Any]]:
    """Yields every value that is not a section, with its path; an empty section is a value."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from leaves(value, (*at, key))
        else:
            yield (*at, key), value


def paths(value: Any, at: Loc = ()) -> Iterator[Loc]:
    """Yields the path of a value and of everything in it."""
    yield at
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from paths(item, (*at, key))


def dotted(keys: Loc) -> str:
    """Returns `training.batch_size` for `("training", "batch_size")`."""
    return ".".join(map(str, keys))
