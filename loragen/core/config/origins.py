"""Where each value of a configuration comes from."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loragen.core.config.commands import MODELS
from loragen.core.config.load import ENV_PREFIX, layered, validated
from loragen.core.config.yaml_file import Loc, dotted

DEFAULT = "default"


@dataclass(frozen=True)
class Setting:
    key: str
    value: Any
    origin: str
    """`default`, `file:line:column`, `LORAGEN_...`, `--set`."""


def settings_of(
    command: str,
    file: Path | None = None,
    settings: Iterable[str] = (),
    environment: Mapping[str, str] | None = None,
) -> list[Setting]:
    """Every value of the configuration that `load` makes of the same. Raises as `load` does."""
    model = MODELS[command]
    given = layered(model, file, settings, environment=environment)
    config = validated(model, given).model_dump(mode="json")
    return [
        Setting(dotted(keys), value, _origin(keys, given.origins))
        for keys, value in _leaves(config, ())
    ]


def _leaves(tree: Mapping[str, Any], at: Loc) -> Iterator[tuple[Loc, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*at, key))
        else:
            yield (*at, key), value


def _origin(keys: Loc, origins: Mapping[Loc, str]) -> str:
    """An item of a list that a file gave may be another layer's: `sources` of both."""
    own = [origins[keys]] if keys in origins else []
    items = [
        origin
        for place, origin in origins.items()
        if place[: len(keys)] == keys and origin.startswith(("--", ENV_PREFIX))
    ]
    return ", ".join(dict.fromkeys(own + items)) or DEFAULT
