"""The contest: every contestant answers every dataset's questions, on one model."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from loragen.core.adapters import Adapter, attach_adapter, module_scaling, swap_adapter
from loragen.core.evaluation.bench import Bench
from loragen.core.evaluation.columns import GENERATED, Column, contestant_class
from loragen.core.evaluation.contestants import Contestant, Entry
from loragen.core.evaluation.targets import Target
from loragen.core.lora.evaluate import Scores, evaluate

log = logging.getLogger(__name__)


@dataclass
class Cell:
    """What one contestant reached on one dataset: a score for each of its entries."""

    scores: list[Scores] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """To obtain each adapter; none where nothing had to be obtained."""

    def values(self, measure: str) -> list[float] | None:
        """A measure's value for each entry; None where the dataset does not have it."""
        found = [getattr(score, measure) for score in self.scores]
        return None if None in found else found


@dataclass(frozen=True)
class Outcome:
    """A row of the table: one dataset."""

    target: Target
    cells: dict[str, Cell]


def hold(
    bench: Bench,
    columns: Sequence[Column],
    targets: Sequence[Target],
    among: Sequence[Target] | None = None,
) -> list[Outcome]:
    """Every column's score on every dataset; the base is handed back as it was.

    `among` are all datasets of the evaluation, where `targets` are only a part of them: parts held
    one by one have the outcomes of the whole.

    Raises LoragenError where an adapter does not fit the base, UsageError where a dataset has too
    few prompts.
    """
    contestants: dict[str, Contestant] = {
        column.name: contestant_class(column)(bench) for column in columns
    }
    model = attach_adapter(bench.base.model, bench.mean_adapter(), "the mean adapter")
    outcomes = []
    try:
        for number, target in enumerate(targets, start=1):
            cells = {
                name: _cell(model, bench, target, contestant.entries(target, among or targets))
                for name, contestant in contestants.items()
            }
            outcomes.append(Outcome(target, cells))
            log.info("%d/%d %s", number, len(targets), in_brief(outcomes[-1]))
    finally:
        model.unload()
    return outcomes


def _cell(model: Any, bench: Bench, target: Target, entries: Iterable[Entry]) -> Cell:
    cell = Cell()
    for entry in entries:
        cell.scores.append(score(model, bench, target, entry))
        if entry.seconds is not None:
            cell.seconds.append(entry.seconds)
    return cell


def score(model: Any, bench: Bench, target: Target, entry: Entry) -> Scores:
    """An entry on one model with an adapter attached, whose weights are swapped."""
    rows = target.rows if entry.rows is None else entry.rows
    with ExitStack() as stack:
        if entry.adapter is None:
            stack.enter_context(model.disable_adapter())
        else:
            adapter = scaled_as(entry.adapter, bench.generator.adapter_config)
            swap_adapter(model, adapter, f"an adapter for {target.name}")
        return evaluate(
            model,
            bench.base.tokenizer,
            rows,
            bench.options.batch_size,
            choices=bench.options.choices,
            closed=target.closed,
        )


def scaled_as(adapter: Adapter, config: Mapping[str, Any]) -> Adapter:
    """The same ΔW under the scaling of `config`: only weights are swapped, and the model keeps the
    alpha that it was attached with. Where both agree, the adapter itself."""
    ratios = {
        key: module_scaling(adapter.config, module) / module_scaling(config, module)
        for key in adapter.tensors
        for module, _, factor in [key.removeprefix("base_model.model.").rpartition(".lora_")]
        if factor.startswith("B")
    }
    if all(ratio == 1 for ratio in ratios.values()):
        return adapter
    return Adapter(
        dict(config),
        {key: tensor * ratios.get(key, 1.0) for key, tensor in adapter.tensors.items()},
    )


def in_brief(outcome: Outcome) -> str:
    """One line, for whoever waits."""
    means = {
        name: fmean(score.exact_match for score in cell.scores)
        for name, cell in outcome.cells.items()
        if name in ("base", GENERATED)
    }
    figures = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
    return f"{outcome.target.name}: {figures}"
