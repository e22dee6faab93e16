"""What a sweep searches: the `--param` options, as values to try. Light."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import isfinite
from typing import Any

import yaml

from loragen.core.config.yaml_file import AmbiguousNumberError, inline, parse_yaml
from loragen.core.errors import UsageError, did_you_mean, listing

KINDS = {
    "float": "float:LOW:HIGH",
    "log": "log:LOW:HIGH",
    "int": "int:LOW:HIGH or int:LOW:HIGH:STEP",
    "logint": "logint:LOW:HIGH",
    "choice": "choice:A,B,...",
}
"""{kind of a range: how it is written}"""
EXAMPLE = "--param training.learning_rate=log:1e-5:1e-3"
MOST_CORNERS = 64
"""The most combinations of ends and choices that are validated before the first trial."""


@dataclass(frozen=True)
class Param:
    """A setting, and the values that trials may give it."""

    key: str
    kind: str
    spec: str
    """As it was given, after the `=`."""
    low: float = 0
    high: float = 0
    step: int = 1
    choices: tuple[Any, ...] = ()

    @property
    def ends(self) -> Sequence[Any]:
        """All choices, or both ends of the range: if these are valid, those between are."""
        return self.choices or (self.low, self.high)

    def suggested(self, trial: Any) -> Any:
        """Returns the value of an Optuna trial."""
        if self.kind == "choice":  # a choice may be a list, of which Optuna keeps the text
            return parse_yaml(trial.suggest_categorical(self.key, [*map(inline, self.choices)]))
        log = self.kind.startswith("log")
        if self.kind in ("int", "logint"):
            step = 1 if log else self.step
            return trial.suggest_int(self.key, int(self.low), int(self.high), step=step, log=log)
        return trial.suggest_float(self.key, self.low, self.high, log=log)

    def value_of(self, stored: Any) -> Any:
        """Returns a value as the configuration has it, of what Optuna has stored."""
        return parse_yaml(stored) if self.kind == "choice" else stored


def parse_params(texts: Iterable[str]) -> tuple[list[Param], list[str]]:
    """Returns the parameters that can be read, and everything wrong with the others."""
    found: dict[str, Param] = {}
    problems = []
    for text in texts:
        try:
            param = _parsed(text)
            if param.key in found:
                raise UsageError(f"{param.key} is given twice; give one range")
            found[param.key] = param
        except UsageError as error:
            problems.append(f"--param {text}: {error}")
    if not found and not problems:
        problems.append(f"nothing to search: give a setting and its range, such as {EXAMPLE}")
    return list(found.values()), problems


def corners(params: Sequence[Param]) -> Iterator[dict[str, Any]]:
    """Yields what to validate before the first trial: all combinations of the ends, the first
    ends first; of many, those that differ from the first ends in one setting."""
    first = {param.key: param.ends[0] for param in params}
    count = 1
    for param in params:
        count *= len(param.ends)
    if count <= MOST_CORNERS:
        for values in product(*(param.ends for param in params)):
            yield dict(zip(first, values, strict=True))
        return
    yield first
    for param in params:
        yield from ({**first, param.key: end} for end in param.ends[1:])


def described(values: Mapping[str, Any]) -> str:
    """Returns `lora.rank=8 training.batch_size=16`, with numbers cut to six digits."""
    shown = {key: f"{v:.6g}" if isinstance(v, float) else inline(v) for key, v in values.items()}
    return " ".join(f"{key}={text}" for key, text in shown.items())


def _parsed(text: str) -> Param:
    key, equals, spec = text.partition("=")
    kind, colon, rest = spec.partition(":")
    if not (key.strip() and equals):
        raise UsageError(f"expected KEY=RANGE, such as {EXAMPLE.removeprefix('--param ')}")
    if kind not in KINDS or not colon:
        raise UsageError(
            f"'{kind}' is no range.{did_you_mean(kind, KINDS)} Known: {listing([*KINDS.values()])}"
        )
    if kind == "choice":
        return Param(key.strip(), kind, spec, choices=_choices(rest))
    parts = rest.split(":")
    if len(parts) != 2 and not (kind == "int" and len(parts) == 3):
        raise UsageError(f"expected {KINDS[kind]}")
    whole = kind in ("int", "logint")
    numbers = [_number(part, whole) for part in parts]
    low, high, step = numbers[0], numbers[1], int(numbers[2]) if len(numbers) > 2 else 1
    if low >= high:
        raise UsageError(f"the range is empty: {parts[0]} is not below {parts[1]}")
    if kind.startswith("log") and low <= 0:
        raise UsageError(f"a logarithmic range begins above 0 (got {parts[0]})")
    if len(parts) == 3 and not 0 < step <= high - low:
        raise UsageError(f"the step has to be between 1 and {high - low:g} (got {parts[2]})")
    if step > 1:  # the end that Optuna reaches
        high = low + (high - low) // step * step
    return Param(key.strip(), kind, spec, low, high, step)


def _number(text: str, whole: bool) -> float:
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        raise UsageError(f"'{text}' is no {'whole ' if whole else ''}number") from None
    if not isfinite(number):
        raise UsageError(f"'{text}' is not finite")
    return number


def _choices(text: str) -> tuple[Any, ...]:
    try:
        values = parse_yaml(f"[{text}]")
    except AmbiguousNumberError as error:
        raise UsageError(str(error.problem)) from None
    except (yaml.YAMLError, RecursionError):
        raise UsageError("the choices are not YAML; put quotes around them") from None
    texts = [inline(value) for value in values]
    if len(set(texts)) < len(texts):
        raise UsageError("a choice is given twice")
    if len(texts) < 2:
        raise UsageError("give two choices at least; a single value is a --set")
    return tuple(values)
