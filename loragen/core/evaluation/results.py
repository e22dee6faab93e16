"""From scores to what is told: means, intervals, who beats whom, what it cost. Plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from statistics import fmean
from typing import Any

from loragen.core.errors import LoragenError
from loragen.core.evaluation.bench import Bench
from loragen.core.evaluation.columns import GENERATED
from loragen.core.evaluation.contest import Cell, Outcome
from loragen.core.evaluation.intervals import interval
from loragen.core.evaluation.measures import MEASURES
from loragen.core.evaluation.novelty import Spread
from loragen.core.generator.collections.sources import Collection
from loragen.core.manifests import LoraManifest, read_manifest
from loragen.core.runs import run_directory_of


def document(outcomes: Sequence[Outcome], bench: Bench, spread: Spread | None) -> dict[str, Any]:
    """What results.json holds. Averages are over a group's datasets, each weighing the same."""
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.target.group, []).append(outcome)
    summaries = {group: _summary(members) for group, members in groups.items()}
    keys = dict.fromkeys(chain.from_iterable(summaries.values()))
    options = asdict(bench.options)
    del options["keep"], options["prompts"]
    return {
        "base_model": bench.base.name,
        "columns": list(outcomes[0].cells),
        **{key: {group: of[key] for group, of in summaries.items() if key in of} for key in keys},
        "seconds": _seconds(outcomes, bench.sources),
        "multi_task": {"steps": bench.multi_task.steps} if bench.multi_task else None,
        "novelty": spread.as_dict() if spread else None,
        "options": options,
        "datasets": [_row(outcome, bench, spread) for outcome in outcomes],
    }


def _summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """Of one dataset, or averaged over several: a measure that some dataset lacks is left out."""
    columns = list(outcomes[0].cells)
    told: dict[str, Any] = {}
    for measure in MEASURES:
        of = {
            name: _values([outcome.cells[name] for outcome in outcomes], measure.field)
            for name in columns
        }
        if None not in of.values():
            told[measure.name] = {
                name: round(fmean(map(fmean, values or ())), 4) for name, values in of.items()
            }
    if GENERATED in columns:
        told |= _claims(outcomes, told["accuracy"])
    return told


def _claims(outcomes: Sequence[Outcome], accuracy: Mapping[str, float]) -> dict[str, Any]:
    """The interval of what was generated; a column is beaten that lies below all of it. Compared
    as they are printed: rounding is no victory."""
    values = _values([outcome.cells[GENERATED] for outcome in outcomes], "exact_match")
    rows = [len(outcome.target.rows) for outcome in outcomes]
    low, high = (round(bound, 4) for bound in interval(values or [], rows)[1:])
    others = {name: value for name, value in accuracy.items() if name != GENERATED}
    return {
        "interval": {GENERATED: [low, high]},
        "beats": [name for name, value in others.items() if value < low],
        "beaten_by": [name for name, value in others.items() if value > high],
    }


def _values(cells: Sequence[Cell], field: str) -> list[list[float]] | None:
    """``[datasets][draws]`` of a measure; None where some dataset does not have it."""
    found = [cell.values(field) for cell in cells]
    return [values for values in found if values is not None] if None not in found else None


def _row(outcome: Outcome, bench: Bench, spread: Spread | None) -> dict[str, Any]:
    target = outcome.target
    new = [one for one in spread.novelties if one.target == target] if spread else []
    generated = outcome.cells.get(GENERATED)
    return {
        "name": target.name,
        "group": target.group,
        "source": target.source,
        "rows": len(target.rows),
        "prompts": len(bench.draws(target)[0]),
        "prompts_from": target.prompts_from,
        **_summary([outcome]),
        "draws": generated.values("exact_match") if generated else None,
        "novelty": {"nearest": new[0].nearest, "to_nearest": new[0].to_nearest,
                    "to_mean": new[0].to_mean} if new else None,
    }  # fmt: skip


def _seconds(outcomes: Sequence[Outcome], sources: Sequence[Collection]) -> dict[str, Any]:
    """To obtain an adapter, the mean over the datasets, and what training costs more."""
    obtain = {}
    for name in outcomes[0].cells:
        seconds = [second for outcome in outcomes for second in outcome.cells[name].seconds]
        obtain[name] = round(fmean(seconds), 4) if seconds else None
    trained, made = _training_seconds(sources), obtain.get(GENERATED)
    return {
        "train_adapter": trained,
        "generate_adapter": made,
        "ratio": round(trained / made, 1) if trained and made else None,
        "obtain": obtain,
    }


def _training_seconds(sources: Sequence[Collection]) -> float | None:
    """Of one of the generator's training adapters, the mean, as their manifests say."""
    try:
        runs = [run_directory_of(source.checkpoints[0]) for source in sources]
        seconds = [read_manifest(run, LoraManifest).seconds for run in runs]
    except LoragenError:  # adapters without a run
        return None
    known = [second for second in seconds if second]
    return round(fmean(known), 3) if known else None
