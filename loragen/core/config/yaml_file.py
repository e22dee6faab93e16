"""YAML in, with the place of every key; YAML out, with a comment beside every key."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from loragen.core.errors import ConfigError, UsageError
from loragen.core.files import absent

Loc = tuple[str | int, ...]
DEEPEST = 50
"""Sections in one another; `a: &a [*a]` would have no end."""
MERGE = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """Tells where a value stands that only looks like a date or a number, such as 2025-13-01."""

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except ValueError as error:
            raise yaml.MarkedYAMLError(
                problem=f"{error}; put quotes around it", problem_mark=node.start_mark
            ) from None


def read_yaml(file: Path) -> tuple[dict[str, Any], dict[Loc, str]]:
    """A YAML mapping and the place (`file:line:column`) of each of its keys.

    Raises UsageError for a missing file and ConfigError for YAML that does not parse, is not a
    mapping, or says a key twice.
    """
    if not file.is_file():
        raise UsageError(absent(file, "configuration file"))
    try:
        text = file.read_text(encoding="utf-8-sig")  # editors on Windows may add the mark
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: not YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ConfigError(f"{file}: not YAML: nested too deeply") from None
    if node is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}:1: expected a mapping of settings, found {type(tree).__name__}")
    origins: dict[Loc, str] = {}
    for keys, mark in _places(node, ()):
        if len(keys) > DEEPEST:
            raise ConfigError(
                f"{file}: deeper than {DEEPEST} sections; does an anchor hold itself?"
            )
        place = f"{file}:{mark.line + 1}:{mark.column + 1}"
        if keys in origins:
            raise ConfigError(f"{place}: {dotted(keys)} is given twice; first at {origins[keys]}")
        origins[keys] = place
    return tree, origins


def _places(node: yaml.Node, keys: Loc) -> Iterator[tuple[Loc, yaml.Mark]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in _items(node):
            yield (*keys, key.value), key.start_mark
            yield from _places(value, (*keys, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield (*keys, index), value.start_mark
            yield from _places(value, (*keys, index))


def _items(
    node: yaml.MappingNode, around: tuple[yaml.Node, ...] = ()
) -> list[tuple[yaml.Node, yaml.Node]]:
    """A mapping's own keys, and those that `<<` merges in where it has none of that name.

    `around`: mappings that merge this one in; one that merges itself in adds nothing.
    """
    items = [(key, value) for key, value in node.value if key.tag != MERGE]
    for merge in [value for key, value in reversed(node.value) if key.tag == MERGE]:
        for merged in merge.value if isinstance(merge, yaml.SequenceNode) else [merge]:
            there = {key.value for key, _ in items}
            if merged not in (*around, node):
                more = _items(merged, (*around, node))
                items += [item for item in more if item[0].value not in there]
    return items


def commented(tree: Mapping[str, Any], comment: Callable[[Loc], str], at: Loc = ()) -> str:
    """The tree as block YAML; `comment` tells what stands behind the key at a path, "" nothing."""
    return "".join(f"{line}\n" for line in _lines(tree, comment, at))


def _lines(tree: Mapping[str, Any], comment: Callable[[Loc], str], at: Loc) -> Iterator[str]:
    for key, value in tree.items():
        keys = (*at, key)
        told = f"  # {comment(keys)}" if comment(keys) else ""
        if isinstance(value, Mapping) and value:
            yield f"{'  ' * len(at)}{inline(key)}:{told}"
            yield from _lines(value, comment, keys)
        else:
            yield f"{'  ' * len(at)}{inline(key)}: {inline(value)}{told}"


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    return text.removesuffix("...\n").strip()


def paths(value: Any, at: Loc = ()) -> Iterator[Loc]:
    """The path of a value and of everything in it."""
    yield at
    if isinstance(value, list):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from paths(item, (*at, key))


def dotted(keys: Loc) -> str:
    return ".".join(map(str, keys))
