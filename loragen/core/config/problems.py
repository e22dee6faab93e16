"""What is wrong with a configuration: one line per value, with its place and what exists."""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from loragen.core.config.yaml_file import Loc, dotted
from loragen.core.errors import UsageError, did_you_mean, listing

Misplaced = tuple[Loc, str]
"""The keys of a value that names something that is not there, and what is wrong with it."""


def refused(keys: Loc, look: Callable[[], object]) -> list[Misplaced]:
    """What a look at the place that a value names has to complain of."""
    try:
        look()
    except UsageError as error:
        return [(keys, problem) for problem in error.problems]
    return []


def problems_of(
    model: type[BaseModel], error: ValidationError, origins: Mapping[Loc, str], prefix: Loc = ()
) -> list[str]:
    """One line per value; a value that fits none of several types gets their reasons in one."""
    reasons: dict[Loc, list[str]] = {}
    given: dict[Loc, str] = {}
    for detail in error.errors():
        keys = (*prefix, *detail["loc"])
        if detail["type"] == "extra_forbidden":
            known = _known_keys(model, detail["loc"][:-1])
            hint = did_you_mean(str(keys[-1]), known)
            reason = f"unknown key.{hint} Known: {listing(known, 20)}"
        elif detail["type"] == "value_error":
            reason = str(detail["ctx"]["error"])
        elif detail["type"] == "model_type":
            keys = _without_type_tags(keys, origins)
            known = _known_keys(model, detail["loc"])
            reason = f"has to be a section with keys of its own: {listing(known, 20)}"
            given[keys] = f" (got {detail['input']!r})"
        elif detail["type"] == "missing":
            reason = "is required"
        else:
            keys = _without_type_tags(keys, origins)
            reason = f"{detail['msg'][0].lower()}{detail['msg'][1:]}"
            given[keys] = f" (got {detail['input']!r})"
        reasons.setdefault(keys, []).append(reason)
    return [
        (f"{place_of(keys, origins)}{dotted(keys)}: " if keys else "")
        + " or ".join(dict.fromkeys(of))
        + given.get(keys, "")
        for keys, of in reasons.items()
    ]


def place_of(keys: Loc, origins: Mapping[Loc, str]) -> str:
    """Where the value at `keys`, or the nearest section around it, was given; ends in `: `."""
    origin = origin_of(keys, origins)
    return f"{origin}: " if origin else ""


def origin_of(keys: Loc, origins: Mapping[Loc, str]) -> str | None:
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return origins[keys[:length]]
    return None


def has_key(model: type[BaseModel], keys: Loc) -> bool:
    """Whether the schema itself has this key; the options of plugins are not in it."""
    for part in keys[:-1]:
        section = _section(model, part)
        if section is None:
            return False
        model = section
    return keys[-1] in model.model_fields


def _without_type_tags(keys: Loc, origins: Mapping[Loc, str]) -> Loc:
    """pydantic appends the tried type to the place of a union's value: `devices.int`."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in origins:
            return keys[:length]
    return keys


def _known_keys(model: type[BaseModel], loc: Loc) -> list[str]:
    """The keys of the section at `loc`; walks models, lists of models and optional ones."""
    for part in loc:
        model = _section(model, part) or model
    return list(model.model_fields)


def _section(model: type[BaseModel], key: Any) -> type[BaseModel] | None:
    """The model of a field, or of its items; None where the field is a plain value."""
    if not isinstance(key, str) or key not in model.model_fields:
        return None
    annotation = model.model_fields[key].annotation
    nested = [annotation, *getattr(annotation, "__args__", ())]
    return next((t for t in nested if isinstance(t, type) and issubclass(t, BaseModel)), None)
