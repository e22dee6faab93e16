"""What the results of an evaluation say: means, paired bootstrap intervals, recovered headroom and
margins over the controls; and several evaluations as one.

Everything is computed from the datasets of results.json, so that the results of several generators,
as of k-fold experiments, are combined without running anything again.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from statistics import fmean, median
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from loragen.core.errors import UsageError, listing
from loragen.core.evaluation.contestants import BASE, CONTROLS, GENERATED, MEASURES, NAMES, ORACLE

CONFIDENCE = 0.95
REPLICATES = 4000
LEAST_HEADROOM = 0.15
"""The least lead of the oracle over the base for which a share of it is computed."""


class Estimate(NamedTuple):
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


class Bootstrap:
    """Paired replicates of mean accuracies: datasets, their rows and the draws of prompts are drawn
    again, with replacement. A replicate has the same datasets and rows for all columns.

    Rows and draws are drawn for each dataset, and datasets are drawn among the results (a nested
    bootstrap; Davison and Hinkley 1997). A single dataset is kept as it is.
    """

    def __init__(self, rows: Sequence[int], seed: int = 0) -> None:
        """`rows` are the numbers of tested rows of the datasets."""
        self.rows, self.seed = rows, seed

    def means(self, columns: Mapping[str, Sequence[np.ndarray]]) -> dict[str, np.ndarray]:
        """Returns ``[REPLICATES]`` for each column of ``[draws, rows]`` bool for each dataset:
        which rows are right."""
        inside = {name: np.empty((REPLICATES, len(self.rows))) for name in columns}
        for index, count in enumerate(self.rows):
            random = np.random.default_rng((self.seed, index))
            weights = random.multinomial(count, np.full(count, 1 / count), REPLICATES) / count
            for name, hits in columns.items():
                draws = len(hits[index])
                right = weights @ hits[index].T.astype(float)  # (REPLICATES, draws)
                if draws > 1:
                    again = random.multinomial(draws, np.full(draws, 1 / draws), REPLICATES)
                    inside[name][:, index] = (right * again).sum(1) / draws
                else:
                    inside[name][:, index] = right[:, 0]
        return {name: self.over_datasets(values) for name, values in inside.items()}

    def over_datasets(self, inside: np.ndarray) -> np.ndarray:
        """Returns ``[REPLICATES]``: means over datasets that are drawn again, of the replicates
        ``[REPLICATES, datasets]`` of each dataset."""
        drawn, of_dataset = self._drawn
        means: np.ndarray = inside[of_dataset, drawn].mean(1)
        return means

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """The datasets of each replicate, and the replicate of each of them; a dataset that is
        drawn twice has two different ones."""
        count = len(self.rows)
        random = np.random.default_rng((self.seed, count, 1))
        if count == 1:
            return np.zeros((REPLICATES, 1), int), np.arange(REPLICATES)[:, None]
        shape = (REPLICATES, count)
        return random.integers(count, size=shape), random.integers(REPLICATES, size=shape)

    def estimate(self, mean: float, replicates: np.ndarray) -> Estimate:
        """Returns the mean with the expanded percentile interval of its replicates (Hesterberg
        2015): plain percentiles are too narrow for few datasets. Those of two or three datasets
        span nearly all replicates."""
        count = len(self.rows)
        tail = (1 - CONFIDENCE) / 2
        if count > 1:
            tail = float(norm.cdf(np.sqrt(count / (count - 1)) * student.ppf(tail, count - 1)))
        low, high = np.quantile(replicates, (tail, 1 - tail))
        return Estimate(round(mean, 4), round(float(low), 4), round(float(high), 4))


def hits_of(dataset: Mapping[str, Any], column: str) -> np.ndarray:
    """Returns ``[draws, rows]`` bool: the rows that a column answers right."""
    return np.array([[bit == "1" for bit in bits] for bits in dataset["correct"][column]])


def bits_of(hits: Sequence[bool]) -> str:
    """Returns rows as results.json holds them: a digit for each, 1 if it is right."""
    return "".join("01"[hit] for hit in hits)


def summary(datasets: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """Returns what one dataset, or several, say of each column, as results.json holds it; a measure
    that some dataset lacks is left out."""
    found: dict[str, Any] = {}
    for measure in MEASURES:
        if all(measure in one for one in datasets):
            found[measure] = {
                name: round(fmean(one[measure][name] for one in datasets), 4) for name in columns
            }
    bootstrap = Bootstrap([one["rows"] for one in datasets])
    hits = {name: [hits_of(one, name) for one in datasets] for name in columns}
    means = {name: fmean(float(one.mean()) for one in of) for name, of in hits.items()}
    replicates = bootstrap.means(hits)
    found["interval"] = {
        name: list(bootstrap.estimate(means[name], replicates[name])[1:]) for name in columns
    }
    if GENERATED in columns:
        differences = {
            name: bootstrap.estimate(
                means[GENERATED] - means[name], replicates[GENERATED] - replicates[name]
            )
            for name in columns
            if name != GENERATED
        }
        found["differences"] = {name: one._asdict() for name, one in differences.items()}
        found["beats"] = [name for name, one in differences.items() if one.low > 0]
        found["beaten_by"] = [name for name, one in differences.items() if one.high < 0]
        if controls := [name for name in CONTROLS if name in columns]:
            found["margins"] = {name: _margin(datasets, name, bootstrap) for name in controls}
    if BASE in columns and ORACLE in columns:
        found["headroom"] = _headroom(datasets, columns)
    return found


def _margin(
    datasets: Sequence[Mapping[str, Any]], control: str, bootstrap: Bootstrap
) -> dict[str, float]:
    """Returns loss(control) - loss(generated) in nats, with its interval over datasets (none of a
    single one: rows have no losses of their own), and the share of datasets in which it is above
    0."""
    margins = np.array([one["loss"][control] - one["loss"][GENERATED] for one in datasets])
    positive = round(float((margins > 0).mean()), 4)
    if len(margins) == 1:
        return {"mean": round(float(margins[0]), 4), "positive": positive}
    again = bootstrap.over_datasets(np.broadcast_to(margins, (REPLICATES, len(margins))))
    return {**bootstrap.estimate(float(margins.mean()), again)._asdict(), "positive": positive}


def _headroom(datasets: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """Returns, for each column, the share (column - base) / (oracle - base) of the oracle's lead,
    over the datasets where that lead is large enough to divide by."""
    accuracies = [one["accuracy"] for one in datasets]
    leads = [(of, of[ORACLE] - of[BASE]) for of in accuracies]
    kept = [(of, lead) for of, lead in leads if lead >= LEAST_HEADROOM - 1e-9]
    document: dict[str, Any] = {"datasets": len(kept), "of": len(datasets), "columns": {}}
    for name in columns if kept else ():
        shares = [(of[name] - of[BASE]) / lead for of, lead in kept]
        document["columns"][name] = {
            "mean": round(fmean(shares), 4),
            "median": round(median(shares), 4),
            "positive": round(fmean(share > 0 for share in shares), 4),
        }
    return document


def summaries(datasets: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, Any]:
    """Returns {key of `summary`: {group: value}}, for each group of datasets."""
    by_group = {group: summary(of, columns) for group, of in grouped(datasets).items()}
    keys = dict.fromkeys(key for of in by_group.values() for key in of)
    return {key: {group: of[key] for group, of in by_group.items() if key in of} for key in keys}


def novelty_means(datasets: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Returns the mean novelty of each group of datasets."""
    measured = grouped([one for one in datasets if one["novelty"]])
    return {
        group: {key: round(fmean(one["novelty"][key] for one in of), 6) for key in of[0]["novelty"]}
        for group, of in measured.items()
    }


def grouped(datasets: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Returns the datasets of each group."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for one in datasets:
        groups.setdefault(one["group"], []).append(one)
    return groups


def combine(documents: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the results of several evaluations, as of the generators of a k-fold experiment, as
    one document: all their datasets, in the columns that all of them have, with new statistics.

    Raises UsageError if there are none, if they are of several base models or were made with
    different options, or if two have the same dataset.
    """
    if not documents:
        raise UsageError("no results to combine")
    bases = sorted({one["base_model"] for one in documents})
    if len(bases) > 1:
        raise UsageError(f"results of several base models cannot be combined: {listing(bases)}")
    options = [one["options"] for one in documents]
    different = [key for key in options[0] if any(of.get(key) != options[0][key] for of in options)]
    if different := [key for key in different if key != "seed"]:
        raise UsageError(f"results with different {listing(different)} cannot be combined")
    columns = [name for name in NAMES if all(name in one["columns"] for one in documents)]
    others = [name for name in documents[0]["columns"] if name not in NAMES]
    columns += [name for name in others if all(name in one["columns"] for one in documents)]
    datasets = [one for document in documents for one in document["datasets"]]
    keys = [(one["group"], one["name"]) for one in datasets]
    if twice := sorted({name for group, name in keys if keys.count((group, name)) > 1}):
        raise UsageError(f"{listing(twice)}: in several of the results to combine")
    parts = [(one, len(one["datasets"])) for one in documents]

    def mean(values: Sequence[tuple[float | None, int]]) -> float | None:
        """Returns the mean of the values that are known, weighted by their datasets."""
        known = [(value, weight) for value, weight in values if value is not None]
        total = sum(weight for _, weight in known)
        return round(sum(v * w for v, w in known) / total, 4) if known else None

    seconds: dict[str, Any] = {
        key: mean([(one["seconds"][key], weight) for one, weight in parts])
        for key in ("train_adapter", "generate_adapter")
    }
    trained, generated = seconds.values()
    seconds["ratio"] = round(trained / generated, 1) if trained and generated else None
    seconds["obtain"] = {
        name: mean([(one["seconds"]["obtain"][name], weight) for one, weight in parts])
        for name in columns
    }
    novel = [(one["novelty"], weight) for one, weight in parts if one["novelty"]]
    collected = {
        key: mean([(one["collected"].get(key), weight) for one, weight in novel])
        for key in dict.fromkeys(key for one, _ in novel for key in one["collected"])
    }
    means = novelty_means(datasets)
    return {
        "generators": [one.get("generator") for one in documents],
        "base_model": bases[0],
        "columns": columns,
        **summaries(datasets, columns),
        "seconds": seconds,
        "multi_task": [one["multi_task"] for one in documents if one["multi_task"]] or None,
        "novelty": {"collected": collected, "groups": means} if novel else None,
        "options": documents[0]["options"],
        "datasets": datasets,
    }
