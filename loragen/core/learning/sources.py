"""Which sources there are to learn from; found without torch, before seconds of imports.

What a configuration of `gen train` names, and whether it is there; light.

Where a generator learns from: the checkpoints of a dataset, and the dataset's prompts.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loragen.core.adapter import CONFIG_FILE
from loragen.core.adapter.files import read_adapter
from loragen.core.adapter.layout import Layout
from loragen.core.base.names import is_path, resolve_base
from loragen.core.config.load import Problem, problems_at
from loragen.core.config.schema import GenDataSection, GenTrainConfig, SourceSection
from loragen.core.data.documents import content_hash, location, parsed_source
from loragen.core.data.prompts import (
    PreparedPrompts,
    PromptGroups,
    check_prepared,
    prompts_of_rows,
    read_prepared,
    read_prompts,
)
from loragen.core.errors import DataError, LoragenError, UsageError, listing
from loragen.core.files import absent, natural_key, sha256_text, user_path
from loragen.core.lora.provenance import Provenance, traced_run
from loragen.core.run.checkpoints import find_checkpoints, read_tensors
from loragen.core.run.directory import (
    CHECKPOINTS,
    MANIFEST,
    TEST_MODE_STEPS,
    LoraManifest,
    LoraRun,
    Run,
    read_manifest,
    run_directory_of,
)

log = logging.getLogger(__name__)

MOST_NAMED = 5  # directories, in one line


@dataclass
class FoundSources:
    """What there is to learn from, and the runs of a folder that are left out."""

    sources: list[SourceSection]
    unfinished: list[Path] = field(default_factory=list)
    test_mode: list[Path] = field(default_factory=list)
    superseded: list[Path] = field(default_factory=list)
    """Another run of their dataset, base and shape is newer, or one of that name is named."""

    def tell(self) -> None:
        """One line for each kind of what is left out."""
        if self.unfinished:
            log.warning(
                "%s: left out, not finished (name one to take it all the same, or finish it with "
                "lora train --resume)",
                shown(self.unfinished),
            )
        if self.test_mode:
            log.info("%s: left out, trained with --test-mode", shown(self.test_mode))
        if self.superseded:
            log.info(
                "%s: left out, since another run of a dataset of this name is newer or named",
                shown(self.superseded),
            )


def configured_sources(config: GenTrainConfig) -> list[SourceSection]:
    """`sources` and `data.checkpoint_dir` together. Raises UsageError where there are none."""
    return find_sources(config).sources


def find_sources(config: GenTrainConfig) -> FoundSources:
    """What is named is taken; of a folder of runs, the newest finished one of each dataset that
    is not held out.

    Raises UsageError where there is nothing, a source is named twice, a folder has no run that can
    be taken, or two datasets of one name cannot be told apart; DataError for a damaged manifest in
    a folder.
    """
    listed = config.data.checkpoint_dir or []
    directories = [Path(one) for one in ([listed] if isinstance(listed, str) else listed)]
    folders = [(directory, _runs_in(directory)) for directory in directories]
    named = [
        *config.sources,
        *(SourceSection(run=str(place)) for place, runs in folders if not runs),
    ]
    settled = [*named, *config.val_sources]
    places = [_place(source) for source in settled]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(f"{place.name} is named twice among the sources")
    found = FoundSources(named)
    taken = {_trained(run) for run in map(run_of, settled) if run}
    others = {
        run.directory.resolve(): run
        for directory, runs in folders
        for run in _worth_taking(directory, runs, places, found)
    }
    newest = _newest(list(others.values()), taken, found)
    found.sources += (SourceSection(run=str(directory)) for directory in newest)
    if not found.sources:
        raise UsageError(
            "nothing to learn from: give --checkpoint-dir RUN (repeatable), or sources in the YAML"
        )
    if config.data.prompts is not None:
        _check_prepared([*found.sources, *config.val_sources])
    return found


def directory_of(source: SourceSection) -> Path:
    """Raises UsageError where it is not there."""
    directory = Path(str(source.run or source.checkpoints))
    if not directory.is_dir():
        kind = "run directory" if source.run is not None else "directory of checkpoints"
        raise UsageError(absent(directory, kind))
    return directory


def located(source: SourceSection, data: GenDataSection) -> SourceSection:
    """The same places, with the prompts that `data` names, absolute: found from any directory and
    without the configuration."""
    prompts = source.prompts if source.prompts is not None else data.prompts
    return SourceSection(
        checkpoints=str(directory_of(source).absolute()),
        prompts=None if prompts is None else location(parsed_source(prompts)),
    )


class PromptDirectories:
    """The prepared prompts that a configuration names; each directory is read once."""

    def __init__(self, data: GenDataSection) -> None:
        self.data = data
        self._read: dict[Path, PreparedPrompts] = {}

    def groups_of(self, source: SourceSection, dataset: str) -> PromptGroups | None:
        """None where the prompts of a source are not prepared ones.

        A directory of a single dataset may be named for a source whatever that is called. Raises
        UsageError where the directory is not there, has no such dataset or joins other numbers of
        prompts; DataError where it is damaged.
        """
        own = source.prompts is not None
        place = source.prompts if own else self.data.prompts
        if place is None or (own and not Path(place).is_dir()):
            return None
        prepared = self._prepared(Path(place))
        if own and len(prepared.groups) == 1:
            (dataset,) = prepared.groups
        return prepared.of(dataset)

    def _prepared(self, directory: Path) -> PreparedPrompts:
        if directory not in self._read:
            self._read[directory] = prepared = read_prepared(directory)
            size, ours = prepared.record.samples_per_prompt, self.data.samples_per_prompt
            if size != ours:
                raise UsageError(
                    f"{directory} was prepared with {size} samples per prompt: "
                    f"set data.samples_per_prompt to {size} (it is {ours})"
                )
        return self._read[directory]


def _runs_in(directory: Path) -> list[LoraRun]:
    """The runs of a folder of runs; none of any other directory, which stands for itself."""
    if (directory / MANIFEST).is_file() or directory.name == CHECKPOINTS:
        return []
    places = sorted(file.parent for file in directory.glob(f"*/{MANIFEST}"))
    return [LoraRun(place, read_manifest(place, LoraManifest)) for place in places]


def _worth_taking(
    directory: Path, runs: Sequence[LoraRun], named: Sequence[Path], found: FoundSources
) -> list[LoraRun]:
    """The finished runs of a folder that are no tests, nor named; the others are noted."""
    left = [run for run in runs if run.directory.resolve() not in named]
    unfinished = [run for run in left if run.manifest.status != "success"]
    tests = [run for run in left if run not in unfinished and _is_test(run.manifest)]
    if runs and len(unfinished) + len(tests) == len(runs):
        raise UsageError(
            f"{directory}: none of its {len(runs)} runs is one to learn from ({len(unfinished)} "
            f"not finished, {len(tests)} of --test-mode); name a run to take it all the same"
        )
    found.unfinished += (run.directory for run in unfinished)
    found.test_mode += (run.directory for run in tests)
    return [run for run in left if run not in unfinished and run not in tests]


def _newest(
    runs: Sequence[LoraRun], taken: set[tuple[object, ...]], found: FoundSources
) -> list[Path]:
    """One run of each kind, in their order; none of a kind that is taken already.

    Raises UsageError where two of a kind were trained on different datasets of one name."""
    newest = {
        _trained(run): run
        for run in sorted(runs, key=lambda r: (r.manifest.started, natural_key(r.directory.name)))
        if _trained(run) not in taken
    }
    for run in runs:
        other = newest.get(_trained(run), run)
        if not _same_data(run, other):
            raise UsageError(
                f"two datasets are called {run.manifest.dataset.name}: that of {_told(run)} and "
                f"that of {_told(other)}; name the runs to learn from, one or both, beside the "
                "folder"
            )
    taken_here = {run.directory for run in newest.values()}
    found.superseded += (run.directory for run in runs if run.directory not in taken_here)
    return [run.directory for run in runs if run.directory in taken_here]


def _trained(run: LoraRun) -> tuple[object, ...]:
    """What runs have in common that train the same thing: dataset, base and adapter shape."""
    adapter = run.manifest.adapter_config
    targets = adapter.get("target_modules")
    shape = tuple(sorted(targets)) if isinstance(targets, list) else targets
    return run.manifest.dataset.name, run.manifest.base_model, adapter.get("r"), shape


def _same_data(one: LoraRun, other: LoraRun) -> bool:
    """Whether two runs of one dataset's name are of one dataset: a file may have moved or have been
    edited since, not both. What is not known of a converted run differs from nothing."""
    first, second = one.manifest.dataset, other.manifest.dataset
    known = first.path and second.path
    return not known or first.path == second.path or first.sha256 == second.sha256


def _told(run: LoraRun) -> str:
    return f"{run.directory} ({run.manifest.dataset.path})"


def _check_prepared(sources: Sequence[SourceSection]) -> None:
    """`data.prompts` knows datasets by their name. Raises UsageError where two share one."""
    of_name: dict[str, LoraRun] = {}
    for run in (run_of(source) for source in sources if source.prompts is None):
        if run is None:
            continue
        first = of_name.setdefault(run.manifest.dataset.name, run)
        if not _same_data(first, run):
            raise UsageError(
                f"two datasets are called {run.manifest.dataset.name}: that of {_told(first)} and "
                f"that of {_told(run)}; data.prompts cannot tell them apart: give each its own "
                "prompts, sources: [{run: ..., prompts: DIR}]"
            )


def _is_test(manifest: LoraManifest) -> bool:
    return tuple(manifest.steps) == TEST_MODE_STEPS and manifest.max_steps == TEST_MODE_STEPS[-1]


def run_of(source: SourceSection) -> LoraRun | None:
    """The run that a source is; None for adapters that are no run's, and for what is not there."""
    try:
        directory = run_directory_of(directory_of(source))
        return LoraRun(directory, read_manifest(directory, LoraManifest))
    except LoragenError:
        return None


def _place(source: SourceSection) -> Path:
    place = Path(str(source.run or source.checkpoints)).resolve()
    return place.parent if place.name == CHECKPOINTS else place


def shown(directories: Sequence[Path]) -> str:
    return listing([str(directory) for directory in directories], MOST_NAMED)


def missing_gen_paths(config: GenTrainConfig) -> list[Problem]:
    """Every run, directory, file of prompts and local model that is named and not there, and every
    malformed hub id; the hub is not asked."""
    data, base, found = config.data, config.behaviour.base_model, list[Problem]()
    for role, sources in (("sources", config.sources), ("val_sources", config.val_sources)):
        for i, source in enumerate(sources):
            kind = "checkpoints" if source.run is None else "run"
            found += problems_at((role, i, kind), directory_of, source)
            if source.prompts is not None:
                found += problems_at((role, i, "prompts"), _check_prompts, source.prompts)
    listed = data.checkpoint_dir
    for i, place in enumerate([listed] if isinstance(listed, str) else listed or []):
        at = () if isinstance(listed, str) else (i,)
        named = SourceSection(run=place)
        found += problems_at(("data", "checkpoint_dir", *at), directory_of, named)
    if data.prompts is not None:
        found += problems_at(("data", "prompts"), check_prepared, Path(data.prompts))
    if base is not None:
        found += problems_at(("behaviour", "base_model"), resolve_base, base)
    model = str(config.encoder.options.get("model", ""))  # of an encoder that has this option
    if is_path(model) and not user_path(model).is_dir():
        found.append((("encoder", "model"), f"{model}: no such directory"))
    return found


def _check_prompts(text: str) -> None:
    place = parsed_source(text)
    if isinstance(place, Path) and not place.exists():
        raise UsageError(f"{place}: no such prompt file")


def check_places(config: GenTrainConfig) -> list[Problem]:
    """`missing_places`; where nothing is, tells which runs are left out, or taken although they
    are not finished.

    Raises UsageError for sources that cannot be taken together, DataError for a manifest that is
    no run's.
    """
    missing = missing_gen_paths(config)
    if missing:
        return missing
    found = find_sources(config)
    prepared = PromptDirectories(config.data)
    for source in (*found.sources, *config.val_sources):
        directory = directory_of(source)
        if source.run is not None:
            read_manifest(run_directory_of(directory), LoraManifest)
        run = run_of(source)
        name = run.manifest.dataset.name if run else directory.name
        prepared.groups_of(source, name)
    found.tell()
    runs = [run for run in map(run_of, (*config.val_sources, *found.sources)) if run]
    unfinished = [run.directory for run in runs if run.manifest.status != "success"]
    if unfinished:
        log.warning("%s: not finished; the checkpoints there are taken", shown(unfinished))
    return []


@dataclass(frozen=True)
class TrainingSource:
    """One dataset: its checkpoints, its prompts, and the adapter they are of."""

    name: str
    checkpoints: list[Path]
    prompts: list[str]
    adapter_config: dict[str, Any]
    base_model: str
    groups: PromptGroups | None = None
    """The prompts as `data prepare` has joined and split them; None: at random, here."""
    provenance: Provenance | None = None
    """The rows that each step was trained on, where checkpoints are to be paired with them."""
    rows: str | None = None
    """The dataset with its labels, which only the behaviour of an adapter needs; None: unknown."""
    origin: SourceSection | None = field(default=None, compare=False)
    """Where it was found, to be found again; one collection can be named in several ways."""

    @property
    def dataset(self) -> str:
        """A hash that the runs of one dataset share."""
        return sha256_text(*self.prompts)


def read_sources(config: GenTrainConfig) -> tuple[list[TrainingSource], list[TrainingSource]]:
    """(to learn from, held out whole). Raises as `read_source`."""
    limit, prepared = config.data.max_checkpoints, PromptDirectories(config.data)
    tracked = config.data.pairing == "tracked"
    sources = [read_source(one, limit, prepared, tracked) for one in configured_sources(config)]
    return sources, [read_source(one, limit, prepared) for one in config.val_sources]


def read_source(
    config: SourceSection,
    max_checkpoints: int,
    prepared: PromptDirectories | None = None,
    tracked: bool = False,
) -> TrainingSource:
    """Finds checkpoints and prompts; a run's manifest knows both. `tracked`: also which rows made
    which step.

    Raises UsageError for what is not there, DataError for a dataset that has changed since.
    """
    directory = directory_of(config)
    prepared = prepared or PromptDirectories(GenDataSection())
    of_run = config.run is not None or not (find_checkpoints(directory)[0] / CONFIG_FILE).is_file()
    if of_run:
        return _from_run(run_directory_of(directory), config, max_checkpoints, prepared, tracked)
    if tracked:
        raise UsageError(
            f"{directory}: PEFT adapters do not know the rows that they were trained on; "
            "data.pairing tracked is for runs of lora train"
        )
    groups = prepared.groups_of(config, directory.name)
    if groups is None and config.prompts is None:
        raise UsageError(f"{directory}: PEFT adapters do not know their prompts; add prompts: FILE")
    checkpoints = find_checkpoints(directory)[-max_checkpoints:]
    adapter = read_adapter(checkpoints[0])
    base = str(adapter.config.get("base_model_name_or_path"))
    prompts = _prompts(groups) if groups else read_prompts(parsed_source(str(config.prompts)))
    return TrainingSource(
        directory.name,
        checkpoints,
        prompts,
        adapter.config,
        base,
        groups,
        rows=config.prompts,
        origin=located(config, prepared.data),
    )


def _from_run(
    run: Path,
    config: SourceSection,
    max_checkpoints: int,
    prepared: PromptDirectories,
    tracked: bool,
) -> TrainingSource:
    manifest = read_manifest(run, LoraManifest)
    groups = prepared.groups_of(config, manifest.dataset.name)
    return TrainingSource(
        manifest.dataset.name,
        find_checkpoints(run)[-max_checkpoints:],
        _prompts(groups) if groups else _prompts_of_run(run, config.prompts, manifest),
        manifest.adapter_config,
        manifest.base_model,
        groups,
        traced_run(Run.open(run, LoraManifest)).provenance if tracked else None,
        rows=manifest.dataset.path or None,
        origin=located(config, prepared.data),
    )


def _prompts(groups: PromptGroups) -> list[str]:
    return [prompt for group in (*groups.train, *groups.val) for prompt in group]


def _prompts_of_run(run: Path, prompts: str | None, manifest: LoraManifest) -> list[str]:
    if prompts is not None:
        return read_prompts(parsed_source(prompts))
    if not manifest.dataset.path:
        raise UsageError(
            f"{run}: it was converted without its dataset's file; give the prompts in the YAML, "
            "sources: [{run: ..., prompts: FILE}], or remove it and convert again with --dataset"
        )
    file = parsed_source(manifest.dataset.path)
    if isinstance(file, Path) and not file.is_file():
        raise UsageError(f"{run}: its dataset {file} is gone; name one with prompts: FILE")
    if content_hash(file) != manifest.dataset.sha256:
        raise DataError(
            f"{run}: its dataset {file} has changed since the run; name one with prompts: FILE"
        )
    return prompts_of_rows(file, skip_bad_rows=True)  # the run has left them out, too


def common_layout(sources: Sequence[TrainingSource], config: GenTrainConfig) -> Layout:
    """The layout of all sources. Raises DataError naming a source whose adapters differ."""
    layout = Layout.of(
        read_tensors(sources[0].checkpoints[-1]), config.layout.token_dim, config.layout.max_seq_len
    )
    for source in sources:
        first = source.checkpoints[-1]
        try:
            layout.check(read_tensors(first))
        except DataError as error:
            raise DataError(f"{first}: not the adapter of {sources[0].name}: {error}") from None
    return layout
