"""All checkpoints of a traditional run, read one by one: which are good, and do they agree."""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor

from loragen.core.adapter.files import (
    Adapter,
    adapter_state,
    peft_config,
    plain_config,
    shape_mismatch,
)
from loragen.core.base.load import empty_base
from loragen.core.base.names import resolve_base
from loragen.core.config.load import problems_of
from loragen.core.config.schema import LoraSection
from loragen.core.config.yaml_file import Loc
from loragen.core.errors import ConfigError, DataError, LoragenError, UsageError
from loragen.legacy.checkpoints import PREFIX, read_foreign_checkpoint, step_of
from loragen.legacy.discover import LegacyRun, is_result, weights_of
from loragen.legacy.facts import Fact, Facts, adapter_facts, facts_beside, facts_of, say_origins

log = logging.getLogger(__name__)

Shapes = dict[str, torch.Size]


@dataclass(frozen=True)
class Found:
    entry: Path
    step: int
    shapes: Shapes


@dataclass
class Survey:
    checkpoints: list[Found] = field(default_factory=list)
    """Good ones that agree, in the order of their steps."""
    bad: list[str] = field(default_factory=list)
    """`file: reason`"""
    results: list[Path] = field(default_factory=list)
    """Like `models/final.pt`: they belong to no step."""
    facts: Facts = field(default_factory=dict)
    """What the files themselves say of the training."""

    @property
    def shapes(self) -> Shapes:
        return self.checkpoints[-1].shapes


def survey(run: LegacyRun, max_steps: int | None) -> Survey:
    """Holds one checkpoint at a time. A lone result without a step is that of `max_steps`.

    Raises DataError where no checkpoint is left.
    """
    found = Survey()
    good: dict[int, Found] = {}
    for entry in run.entries:
        try:
            _add(found, good, run, entry)
        except LoragenError as error:
            found.bad += error.problems
    if not good and len(found.results) == 1 and max_steps:
        entry = found.results.pop()
        good[max_steps] = Found(entry, max_steps, _shapes(read_foreign_checkpoint(entry).tensors))
    found.checkpoints = _agreeing(list(good.values()), found.bad)
    if not found.checkpoints:
        reasons = found.bad or [
            f"{entry}: no step in it or in its name; rename it to step_NNN"
            for entry in found.results
        ]
        raise DataError(*reasons)
    return found


def _add(found: Survey, good: dict[int, Found], run: LegacyRun, entry: Path) -> None:
    checkpoint = read_foreign_checkpoint(entry)
    broken = [key for key, value in checkpoint.tensors.items() if not torch.isfinite(value).all()]
    if broken:
        raise DataError(f"{entry}: NaN or infinity in {len(broken)} tensors, such as {broken[0]}")
    found.facts = {**found.facts, **facts_of(checkpoint.facts, str(entry))}
    step = step_of(entry, checkpoint.step)
    if step is None:
        if entry != run.directory and not is_result(entry):
            raise DataError(f"{entry}: no step in it or in its name; rename it to step_NNN")
        found.results.append(entry)
    elif step < 1:
        raise DataError(
            f"{entry}: step {step}: the number is that of the optimizer steps it has done, "
            "from 1; rename it to step_NNN"
        )
    elif step not in good:
        good[step] = Found(entry, step, _shapes(checkpoint.tensors))
    elif not _equal(read_foreign_checkpoint(good[step].entry).tensors, checkpoint.tensors):
        raise DataError(f"{entry}: step {step} again, with other weights than {good[step].entry}")


def _agreeing(good: list[Found], bad: list[str]) -> list[Found]:
    """Those with the keys and shapes that most have."""
    if not good:
        return []
    good.sort(key=lambda one: one.step)
    signatures = [tuple(sorted(one.shapes.items())) for one in good]
    usual = dict(Counter(signatures).most_common(1)[0][0])
    kept = []
    for one in good:
        if problem := shape_mismatch(usual, one.shapes):
            bad.append(f"{one.entry}: other tensors than most: {problem}")
        else:
            kept.append(one)
    return kept


def rank_of(shapes: Shapes) -> int:
    """Raises DataError for a matrix without its partner, or for several ranks."""
    a = {key: shape[0] for key, shape in shapes.items() if ".lora_A." in key}
    b = {
        key.replace(".lora_B.", ".lora_A."): shape[1]
        for key, shape in shapes.items()
        if ".lora_B." in key
    }
    if lone := sorted(a.keys() ^ b.keys()):
        raise DataError(f"{lone[0]}: lora_A and lora_B do not come in pairs")
    if a != b or len(set(a.values())) != 1:
        raise DataError(f"its ranks differ: {sorted({*a.values(), *b.values()})}")
    return next(iter(a.values()))


def targets_and_order(
    base_model: Fact, rank: int, shapes: Shapes
) -> tuple[list[str], list[str] | None]:
    """(target modules, the tensors in the order of the base's modules).

    Names such as `q_proj` where they say it all, else paths. The base is built without weights;
    where it is not on this machine the order is None, with a remark. Raises DataError where they
    do not fit it, UsageError for a path that was given as a flag and is none.
    """
    name, origin = base_model
    if origin.startswith("--"):
        resolve_base(name)
    problems = []
    for targets in _targets(shapes):
        try:
            wanted = _wanted(name, rank, targets)
        except UsageError:
            log.warning("base %s is not here: fit and order of the tensors are not checked", name)
            return targets, None
        except DataError as error:
            problems.append(str(error))
            continue
        problem = shape_mismatch(wanted, shapes)
        if problem is None:
            return targets, list(wanted)
        problems.append(problem)
    raise DataError(f"the adapter does not fit the base model {name}: {problems[0]}")


def _targets(shapes: Shapes) -> list[list[str]]:
    """What target_modules may be, the plainest first: names only where all layers have the same."""
    paths = [
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        for key in shapes
        if ".lora_A." in key
    ]
    layers: dict[str, set[str]] = {}
    for path in paths:
        layers.setdefault(path.rpartition(".")[2], set()).add(_layer(path))
    same = len({frozenset(of) for of in layers.values()}) == 1
    return [*([sorted(layers)] if same else []), sorted(paths)]


def _wanted(base_model: str, rank: int, targets: list[str]) -> Shapes:
    from loragen.core.base.load import quiet_libraries

    quiet_libraries()
    from peft import get_peft_model

    lora = peft_config(LoraSection(rank=rank, target_modules=targets))
    with torch.device("meta"):
        model = empty_base(base_model, local_files_only=True).model
        try:
            model = get_peft_model(model, lora)
        except ValueError as error:
            raise DataError(str(error).splitlines()[0]) from None
    return _shapes(adapter_state(model))


def _layer(path: str) -> str:
    """The number of the layer that a module is in, as text."""
    return next((part for part in path.split(".") if part.isdigit()), "")


def _shapes(tensors: dict[str, Tensor]) -> Shapes:
    return {key: value.shape for key, value in tensors.items()}


def _equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def foreign_adapter(path: Path, base_model: str | None, alpha: float | None) -> Adapter:
    """Of a file or directory that no run of ours knows: rank and targets from its tensors."""
    if not weights_of(path):
        raise UsageError(f"{path}: no adapter or checkpoint there")
    lone = path.is_file()
    place = LegacyRun(path.parent if lone else path, [path], traditional=False, lone=lone)
    checkpoint = read_foreign_checkpoint(path)
    given = {"lora.alpha": Fact(alpha, "--alpha"), "base_model": Fact(base_model, "--base-model")}
    facts = {
        **facts_beside(place),
        **adapter_facts(place),
        **{key: fact for key, fact in given.items() if fact.value is not None},
    }
    if "lora.alpha" not in facts:
        raise UsageError(f"{path}: its alpha is not recorded; give --alpha")
    if "base_model" not in facts:
        raise UsageError(f"{path}: its base model is not recorded; give --base-model")
    say_origins(facts, ("base_model", "lora.alpha"))
    name = facts["base_model"].value
    shapes = {key: value.shape for key, value in checkpoint.tensors.items()}
    try:
        rank = rank_of(shapes)
        targets, _ = targets_and_order(facts["base_model"], rank, shapes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
    try:
        lora = LoraSection(rank=rank, alpha=facts["lora.alpha"].value, target_modules=targets)
    except ValidationError as error:
        origins: dict[Loc, str] = {("lora", "alpha"): facts["lora.alpha"].origin}
        raise ConfigError(*problems_of(LoraSection, error, origins, ("lora",))) from None
    return Adapter(plain_config(peft_config(lora, name)), checkpoint.tensors)
