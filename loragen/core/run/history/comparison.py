"""What differs between runs: their settings, what they read, and their metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

from loragen.core.config import load
from loragen.core.config.schema import MODELS
from loragen.core.config.yaml_file import dotted, leaves, read_yaml
from loragen.core.contents import read_json
from loragen.core.errors import LoragenError, UsageError, did_you_mean, listing
from loragen.core.run import CONFIG, MANIFEST
from loragen.core.run.history.summary import LOSS, ListedRun
from loragen.core.run.metrics import METRICS, read_metrics

RECORDED = (
    "base_fingerprint",
    "base_dtype",
    "dataset.sha256",
    "dataset.rows",
    "encoder_fingerprint",
)
"""What a manifest records of what a run has read."""
WHERE = ("runs_dir", "experiments_dir")
"""Settings that say where a run lies, and nothing of what it is."""


@dataclass(frozen=True)
class OpenedRun:
    """A run whose manifest, settings and metrics are read."""

    run: ListedRun

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """Its manifest. Raises DataError if that is damaged."""
        return dict(read_json(self.run.path / MANIFEST))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """{key: value} of its config.yaml, and of what its manifest records; of settings that
        cannot be read there are none."""
        try:
            document = read_yaml(self.run.path / CONFIG)[0]
        except LoragenError:
            document = {}
        found = {dotted(keys): value for keys, value in leaves(document)}
        for key in RECORDED:
            value: Any = self.manifest
            for part in key.split("."):
                value = value.get(part) if isinstance(value, Mapping) else None
            if value:
                found[key] = value
        plugins = self.manifest.get("plugins") or []
        return found | {
            f"version of {one['kind']} {one['name']}": f"{one['distribution']} {one['version']}"
            for one in plugins
            if isinstance(one, dict) and {"kind", "name", "distribution", "version"} <= one.keys()
        }

    @cached_property
    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """{metric: (steps, values)}, without those of the hardware and values that are no number;
        a step that was logged twice counts once, as it was last."""
        file = self.run.path / METRICS
        points: dict[str, dict[int, float]] = {}
        for entry in read_metrics(file) if file.is_file() else []:
            for name, value in entry.items():
                if name != "step" and not name.startswith("hardware/") and isfinite(value):
                    points.setdefault(name, {})[int(entry["step"])] = value
        return {
            name: (sorted(of), [of[step] for step in sorted(of)]) for name, of in points.items()
        }


def differing_settings(runs: Sequence[OpenedRun]) -> dict[str, list[Any]]:
    """Returns {key: the value of each run} of the settings that are not the same in all of them;
    None where a run has none."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in WHERE)
    found = {key: [run.settings.get(key) for run in runs] for key in keys}
    return {key: values for key, values in found.items() if any(v != values[0] for v in values)}


def changed_settings(run: OpenedRun) -> dict[str, Any]:
    """Returns the settings that are not the defaults of this loragen."""
    command = run.run.command.partition(" ")[0]
    if command not in MODELS:
        return {}
    defaults = load(MODELS[command], environment={}).model_dump(mode="json")
    known = {dotted(keys): value for keys, value in leaves(defaults)}
    return {
        key: value
        for key, value in run.settings.items()
        if key not in RECORDED
        and not key.startswith("version of ")
        and (key not in known or known[key] != value)
    }


def run_labels(count: int) -> list[str]:
    """Returns short names of so many runs: A, B, ..., Z, A1, B1, ..."""
    return [chr(65 + i % 26) + (str(i // 26) if i >= 26 else "") for i in range(count)]


def chosen_metrics(runs: Sequence[OpenedRun], names: Sequence[str]) -> list[str]:
    """Returns the metrics to be drawn: those named, else the loss and what each run is chosen by.

    Raises UsageError for a name that none of the runs has logged.
    """
    known = list(dict.fromkeys(name for run in runs for name in run.curves))
    for name in names:
        if name not in known:
            raise UsageError(
                f"--metric {name}: logged by none of the runs, but {listing(known)}."
                f"{did_you_mean(name, known)}"
            )
    wanted = names or [LOSS, *(run.run.metric for run in runs)]
    return [name for name in dict.fromkeys(wanted) if name in known]


def last_and_lowest(run: OpenedRun, name: str) -> tuple[float, float, int] | None:
    """Returns the last value of a metric, the lowest, and the step of that; None if it was not
    logged."""
    steps, values = run.curves.get(name, ([], []))
    if not values:
        return None
    at = min(range(len(values)), key=values.__getitem__)
    return values[-1], values[at], steps[at]
