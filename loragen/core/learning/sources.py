"""The sources of `gen train`: datasets with their collected checkpoints and their prompts. Light.

`open_sources` opens everything that a configuration names, once per command: no manifest and no
dataset file is read twice. Prompts and labels are read when they are first needed.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loragen.core.adapter import weights_in
from loragen.core.base.names import is_path, resolve_base
from loragen.core.config.load import Problem, problems_at
from loragen.core.config.schema import GenDataSection, GenTrainConfig, SourceSection
from loragen.core.data.batches import train_val_split
from loragen.core.data.dataset import Dataset
from loragen.core.data.documents import NO_STREAM, DataFile, parsed_source
from loragen.core.data.prompts import (
    PreparedPrompts,
    PromptGroups,
    check_prepared,
    random_groups,
    read_prepared,
    text_key,
)
from loragen.core.errors import DataError, UsageError, counted, listing
from loragen.core.files import absent, natural_key, sha256_text, user_path
from loragen.core.hub import base_name, check_source, local_path, on_hub
from loragen.core.learning.library.records import PROMPTS, LibraryEntry, library_entries, read_entry
from loragen.core.lora.provenance import Provenance, traced_run
from loragen.core.run.directory import (
    CHECKPOINTS,
    MANIFEST,
    LoraManifest,
    LoraRun,
    Run,
    find_checkpoints,
    run_directory_of,
)

if TYPE_CHECKING:
    from loragen.core.adapter.files import Adapter

log = logging.getLogger(__name__)

MAX_LISTED = 5  # directories in one line of a message


@dataclass(eq=False)
class TrainingSource:
    """A dataset to learn from: its checkpoints and its prompts."""

    name: str
    checkpoints: list[Path]
    """Sorted by step; only the newest `data.max_checkpoints`."""
    directory: Path
    """The absolute directory of the run, or of the checkpoints."""
    section: SourceSection
    """The configuration of this source."""
    data: GenDataSection
    """The configuration of all sources."""
    seed: int
    """The seed of the random groups of prompts."""
    run: LoraRun | None = None
    """None: the checkpoints are PEFT adapters that belong to no run."""
    entry: LibraryEntry | None = None
    """The record of an adapter of a library."""
    prompt_dataset: Dataset | None = None
    """The file that was named for the prompts; None: the run's own dataset, or prepared prompts."""
    labels: Dataset | None = None
    """The dataset with its answers, if it is known; only some objectives need it."""
    prepared: PromptGroups | None = None
    """The prompts as `data prepare` has joined and split them."""
    prompts_from: str | None = None
    """The absolute path or hub id of what was named for the prompts."""
    tracked: bool = False
    """Whether a checkpoint is paired with the rows of its own step."""

    @cached_property
    def groups(self) -> PromptGroups:
        """The prompts in groups, split into training and validation: prepared ones, or random ones.

        Random groups leave out repeated prompts, which might be on both sides otherwise; at least
        one group is left to train on.
        """
        if self.prepared:
            return self.prepared
        distinct = {text_key(prompt): prompt for prompt in reversed(self.prompts)}
        prompts = list(distinct.values())[::-1]
        groups = random_groups(prompts, self.data.samples_per_prompt, self.seed)
        ratio = min(self.data.val_ratio, (len(groups) - 1) / len(groups))
        train, val = train_val_split(len(groups), ratio, self.seed)
        return PromptGroups([groups[i] for i in train], [groups[i] for i in val])

    @cached_property
    def prompts(self) -> list[str]:
        """All prompts of the dataset.

        Raises UsageError if the dataset is missing, DataError if it has changed since the run or
        has bad rows.
        """
        if self.prepared:
            groups = (*self.prepared.train, *self.prepared.val)
            return [prompt for group in groups for prompt in group]
        if self.prompt_dataset:
            return self.prompt_dataset.prompts()
        assert self.run is not None  # `open_source` has checked it
        if self.labels is None:
            raise UsageError(
                f"{self.run.directory}: the run was converted without its dataset's file; give the "
                "prompts in the YAML, sources: [{run: ..., prompts: FILE}], or remove the run and "
                "convert again with --dataset"
            )
        where, hint = f"{self.run.directory}: its dataset {self.labels}", "name one: prompts: FILE"
        if self.labels.is_missing:
            raise UsageError(f"{where} is missing; {hint}")
        if self.labels.sha256 != self.run.manifest.dataset.sha256:
            raise DataError(f"{where} has changed since the run; {hint}")
        # The run has skipped bad rows as well.
        return self.labels.prompts(skip_bad_rows=True, of_rows=True)

    @cached_property
    def prompts_sha256(self) -> str:
        """A hash of all prompts, which the runs of one dataset share."""
        return sha256_text(*self.prompts)

    @property
    def has_labels(self) -> bool:
        """Whether the dataset exists and has answers."""
        return self.labels is not None and self.labels.has_labels

    @cached_property
    def provenance(self) -> Provenance | None:
        """The rows of each step, if checkpoints are paired with them."""
        if not self.tracked:
            return None
        assert self.run is not None  # `open_source` has checked it
        return traced_run(self.run, self.labels).provenance

    @cached_property
    def adapter_config(self) -> dict[str, Any]:
        """PEFT's configuration of the adapters."""
        if self.run:
            return self.run.manifest.adapter_config
        from loragen.core.adapter.files import read_config

        return read_config(self.checkpoints[-1])

    def read(self, checkpoint: Path) -> "Adapter":
        """Returns one of the adapters. Raises DataError if it is not ΔW = BA, has NaN or infinity,
        or is scaled by another factor than the others."""
        from loragen.core.adapter.checks import (
            check_ba,
            check_finite,
            factor_keys,
            module_of,
            module_scaling,
        )
        from loragen.core.run.checkpoints import load_adapter

        adapter = load_adapter(checkpoint, self.adapter_config)
        check_ba(adapter.config, adapter.tensors, checkpoint)
        check_finite(adapter.tensors, checkpoint)
        for key, _ in factor_keys(adapter.tensors):
            module = module_of(key)
            own, usual = (module_scaling(c, module) for c in (adapter.config, self.adapter_config))
            if own != usual:
                raise DataError(
                    f"{checkpoint}: ΔW is {own:g} · BA in {module}, and {usual:g} · BA in "
                    f"{self.checkpoints[-1].name} (lora_alpha, rank)"
                )
        return adapter

    @property
    def base_model(self) -> str:
        """The base model of the adapters."""
        if self.run:
            return self.run.manifest.base_model
        return str(self.adapter_config.get("base_model_name_or_path"))

    @property
    def base_fingerprint(self) -> str:
        """The hash of the base's weights; empty if it is not recorded, or of a quantised base,
        whose hash is not that of its weights."""
        if self.entry:
            return self.entry.base_fingerprint
        recorded = self.run.manifest.base_fingerprint if self.run else ""
        if recorded and self.run and self.run.config.base_quantization == "none":
            return recorded
        return ""

    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None:
        """What the chat template was given in training; None if that is not known."""
        if self.run:
            return self.run.manifest.chat_template_kwargs
        return self.entry.chat_template_kwargs if self.entry else None

    @property
    def kind(self) -> tuple[object, ...]:
        """Dataset, base and adapter shape, which equivalent sources have in common."""
        if self.run:
            return _kind(self.run)
        dataset = (self.entry.dataset if self.entry else "") or self.name
        return dataset, self.base_model, *_shape(self.adapter_config)

    def has_same_base(self, other: "TrainingSource") -> bool:
        """Returns whether the bases have the same weights or, if those are not recorded, the same
        name. One base may lie in several directories."""
        weights = self.base_fingerprint, other.base_fingerprint
        if all(weights):
            return weights[0] == weights[1]
        return self.base_model == other.base_model

    def release(self) -> None:
        """Frees the rows and prompts that were read; a later access reads the file again."""
        _ = self.prompts_sha256
        for cached in ("groups", "prompts", "provenance"):
            self.__dict__.pop(cached, None)
        for dataset in (self.labels, self.prompt_dataset):
            if dataset:
                dataset.release()


@dataclass
class Sources:
    """All sources of a training, and the runs of folders that are left out."""

    training: list[TrainingSource]
    validation: list[TrainingSource]
    """Datasets for validation alone."""
    unfinished: list[Path]
    test_mode: list[Path]
    superseded: list[Path]
    """Runs and adapters of libraries of whose dataset, base and adapter shape another run is newer,
    or named."""
    trials: list[Path] = field(default_factory=list)
    """Runs that a sweep has started."""

    def report(self) -> None:
        """Logs which runs are left out, and which are used although they have not finished."""
        if self.unfinished:
            log.warning(
                "%s: left out because not finished (name a run to use it nevertheless, or finish "
                "it with lora train --resume)",
                _listed(self.unfinished),
            )
        if self.test_mode:
            log.info("%s: left out because trained with --test-mode", _listed(self.test_mode))
        if self.trials:
            log.info("%s: left out because trials of a sweep", _listed(self.trials))
        if self.superseded:
            log.info(
                "%s: left out because another run of the dataset is newer or named",
                _listed(self.superseded),
            )
        runs = [source.run for source in (*self.validation, *self.training) if source.run]
        used = [run.directory for run in runs if run.manifest.status != "success"]
        if used:
            log.warning("%s: not finished; the existing checkpoints are used", _listed(used))


class PromptDirectories:
    """The prepared prompts that a configuration names; each directory is read once."""

    def __init__(self, data: GenDataSection, seed: int = 0) -> None:
        """`seed` is that of the random groups of prompts that are not prepared."""
        self.data, self.seed = data, seed
        self._read: dict[Path, PreparedPrompts] = {}

    def groups_of(self, section: SourceSection, dataset: str) -> PromptGroups | None:
        """Returns the prepared prompts of a source, None if it has others.

        A directory of a single dataset may be named for a source of any name. Raises UsageError if
        the directory is missing, has no such dataset or joins other numbers of prompts; DataError
        if it is damaged.
        """
        own = section.prompts is not None
        named = section.prompts if own else self.data.prompts
        if named is None or (own and not Path(named).is_dir()):
            return None
        directory = Path(named)
        if directory not in self._read:
            self._read[directory] = read_prepared(directory)
            size = self._read[directory].record.samples_per_prompt
            if size != self.data.samples_per_prompt:
                raise UsageError(
                    f"{directory} was prepared with {size} samples per prompt: set "
                    f"data.samples_per_prompt to {size} (it is {self.data.samples_per_prompt})"
                )
        prepared = self._read[directory]
        if own and len(prepared.groups) == 1:
            (dataset,) = prepared.groups
        return prepared.groups_of(dataset)


def check_sources(config: GenTrainConfig) -> list[Problem]:
    """Returns a problem for every run, directory, file of prompts and local model that is named and
    missing, and for every malformed hub id; the hub is not queried."""
    data, base, found = config.data, config.behaviour.base_model, list[Problem]()
    for role, sections in (("sources", config.sources), ("val_sources", config.val_sources)):
        for i, section in enumerate(sections):
            kind = "checkpoints" if section.run is None else "run"
            found += problems_at((role, i, kind), _check_directory, section)
            if section.prompts is not None:
                found += problems_at((role, i, "prompts"), _check_prompts, section.prompts)
    listed = data.checkpoint_dir
    for i, directory in enumerate([listed] if isinstance(listed, str) else listed or []):
        at = () if isinstance(listed, str) else (i,)
        section = SourceSection(run=directory)
        found += problems_at(("data", "checkpoint_dir", *at), _check_directory, section)
    if data.prompts is not None:
        found += problems_at(("data", "prompts"), check_prepared, Path(data.prompts))
    if base is not None:
        found += problems_at(("behaviour", "base_model"), resolve_base, base)
    model = str(config.encoder.options.get("model", ""))  # if the encoder has this option
    if is_path(model) and not user_path(model).is_dir():
        found.append((("encoder", "model"), f"{model}: no such directory"))
    return found


def open_sources(config: GenTrainConfig, test_mode: bool = False) -> Sources:
    """Opens the sources that are named and, of a folder of runs, the newest finished run of each
    dataset that is neither named nor held out. Trials of a sweep are left out. So are runs of
    `lora train --test-mode`, but with `test_mode` they serve where a folder has no others.

    Raises UsageError if there is no source, a source is named twice, a folder has no run to learn
    from, or two datasets share a name; DataError for a damaged manifest.
    """
    data, opened = config.data, dict[Path, LoraRun]()

    def run_at(directory: Path) -> LoraRun:
        key = run_directory_of(directory).resolve()
        if key not in opened:
            opened[key] = Run.open(directory, LoraManifest)
        return opened[key]

    # List the sources that are named, and the folders with their runs.
    listed = data.checkpoint_dir or []
    sections, folders = list(config.sources), dict[Path, list[LoraRun]]()
    shared = dict[Path, LibraryEntry]()
    for directory in map(local_path, [listed] if isinstance(listed, str) else listed):
        if (entries := library_entries(directory)) is not None:
            if not entries:
                raise UsageError(f"{directory}: a library without adapters")
            shared |= {directory / name: entry for name, entry in entries.items()}
            continue
        if read_entry(directory):
            sections.append(SourceSection(checkpoints=str(directory)))
            continue
        is_run = (directory / MANIFEST).is_file() or directory.name == CHECKPOINTS
        manifests = [] if is_run else sorted(directory.glob(f"*/{MANIFEST}"))
        if manifests:
            folders[directory] = [run_at(file.parent) for file in manifests]
        else:
            sections.append(SourceSection(run=str(directory)))
    named = Counter(map(_directory_named, (*sections, *config.val_sources)))
    for directory, times in named.items():
        if times > 1:
            raise UsageError(f"{directory.name} is named twice among the sources")

    # Open those that are named.
    tracked = data.pairing == "tracked"
    open_one = partial(
        open_source,
        prepared=PromptDirectories(data, config.seed),
        max_checkpoints=data.max_checkpoints,
        open_run=run_at,
    )
    training = [open_one(section, tracked=tracked) for section in sections]
    validation = [open_one(section) for section in config.val_sources]

    # Of the folders, choose the newest run of each dataset, base and adapter shape.
    candidates = dict[Path, LoraRun]()
    unfinished, tests, trials = list[Path](), list[Path](), list[Path]()
    for folder, runs in folders.items():
        unnamed = [run for run in runs if run.directory.resolve() not in named]
        trials += [run.directory for run in unnamed if run.manifest.trial]
        runs = [run for run in runs if not run.manifest.trial or run not in unnamed]
        unnamed = [run for run in unnamed if not run.manifest.trial]
        finished = [run for run in unnamed if run.manifest.status == "success"]
        usable = [run for run in finished if not run.manifest.is_test]
        if test_mode and not usable:
            usable = finished
        if len(unnamed) == len(runs) and not usable:
            found = len(folders[folder])
            why = {
                "not finished": len(runs) - len(finished),
                "of --test-mode": len(finished),
                "of a sweep": found - len(runs),
            }
            reasons = ", ".join(f"{number} {what}" for what, number in why.items() if number)
            raise UsageError(
                f"{folder}: none of its {counted(found, 'run')} is one to learn from ({reasons}); "
                "name a run to use it nevertheless"
            )
        unfinished += [run.directory for run in unnamed if run.manifest.status != "success"]
        tests += [run.directory for run in finished if run not in usable]
        candidates |= {run.directory.resolve(): run for run in usable}
    given = [*training, *validation]
    used = {source.kind for source in given if source.run or source.entry}
    newest = _newest(list(candidates.values()), used)
    chosen = [run for run in candidates.values() if newest.get(_kind(run)) is run]
    superseded = [run.directory for run in candidates.values() if newest.get(_kind(run)) is not run]
    sections = [SourceSection(run=str(run.directory)) for run in chosen]
    training += [open_one(section, tracked=tracked) for section in sections]

    # Of the libraries, all adapters but those of datasets that are used already.
    used |= {_kind(run) for run in chosen}
    for directory, entry in shared.items():
        if directory.resolve() in named:
            continue
        section = SourceSection(checkpoints=str(directory))
        source = open_one(section, tracked=tracked, entry=entry)
        if source.kind in used:
            superseded.append(directory)
        else:
            training.append(source)

    if not training:
        raise UsageError(
            "nothing to learn from: give --checkpoint-dir RUN (repeatable), or sources in the YAML"
        )
    if data.prompts is not None:  # prepared prompts are found by the name of the dataset
        _refuse_namesakes([*training, *validation])
    return Sources(training, validation, unfinished, tests, superseded, trials)


def open_source(
    section: SourceSection,
    prepared: PromptDirectories,
    max_checkpoints: int,
    *,
    tracked: bool = False,
    open_run: Callable[[Path], LoraRun] | None = None,
    entry: LibraryEntry | None = None,
) -> TrainingSource:
    """Opens one source: a run of `lora train`, a folder of PEFT adapters with its prompts, or an
    adapter of a library, which has its own.

    Raises UsageError if something is missing, DataError for a damaged manifest.
    """
    directory = _directory_of(section)
    if library_entries(directory) is not None:
        raise UsageError(
            f"{directory}: a library; name it as data.checkpoint_dir, or one adapter of it: "
            f"sources: [{{checkpoints: {directory}/NAME}}]"
        )
    entry = entry or read_entry(directory)
    checkpoints = find_checkpoints(directory) if section.run is None else []
    run = None
    if not (checkpoints and checkpoints[0].is_dir()):  # no PEFT adapters
        if weights_in(directory):
            given = "" if entry else ", prompts: FILE"
            raise UsageError(
                f"{directory}: a PEFT adapter is no run; name it with its prompts: "
                f"sources: [{{checkpoints: {directory}{given}}}]"
            )
        run = open_run(directory) if open_run else Run.open(directory, LoraManifest)
        checkpoints = find_checkpoints(run.directory)
    name = run.manifest.dataset.name if run else base_name(directory)
    groups = prepared.groups_of(section, name)
    named = section.prompts
    if named is None and prepared.data.prompts is None and entry:
        named = str(directory / PROMPTS)
    prompts = Dataset.at(named) if named and not groups else None
    labels = prompts or (Dataset(directory / PROMPTS) if entry else None)
    if run:
        path = run.manifest.dataset.path
        labels = Dataset.at(path) if path else None
        if labels and prompts and labels.location == prompts.location:
            labels = prompts  # the same object, so that the file is read once
    elif tracked:
        raise UsageError(
            f"{directory}: the training rows of PEFT adapters are unknown; data.pairing tracked is "
            "for runs of lora train"
        )
    elif not groups and not prompts:
        raise UsageError(
            f"{directory}: the prompts of PEFT adapters are unknown; add prompts: FILE"
        )
    named = named if named is not None else prepared.data.prompts
    return TrainingSource(
        name,
        checkpoints[-max_checkpoints:],
        directory.absolute(),
        section,
        prepared.data,
        prepared.seed,
        run=run,
        entry=entry,
        prompt_dataset=prompts,
        labels=labels,
        prepared=groups,
        prompts_from=None if named is None else Dataset.at(named).location,
        tracked=tracked,
    )


def _check_directory(section: SourceSection) -> None:
    """Raises UsageError if the directory of a source is missing, or its name on the hub is
    malformed."""
    named = str(section.run or section.checkpoints)
    if on_hub(named):
        check_source(named)
    else:
        _directory_of(section)


def _directory_of(section: SourceSection) -> Path:
    """Returns the directory that a source names. Raises UsageError if it is missing."""
    directory = local_path(str(section.run or section.checkpoints))
    if not directory.is_dir():
        kind = "run directory" if section.run is not None else "directory of checkpoints"
        raise UsageError(absent(directory, kind))
    return directory


def _directory_named(section: SourceSection) -> Path:
    """Returns the resolved directory of a run (also for its checkpoints/), or of adapters."""
    directory = local_path(str(section.run or section.checkpoints)).resolve()
    return directory.parent if directory.name == CHECKPOINTS else directory


def _check_prompts(text: str) -> None:
    source = parsed_source(text)
    if isinstance(source, DataFile) and source.is_stream:
        raise UsageError(f"{source}: {NO_STREAM}")
    if isinstance(source, DataFile) and not source.path.exists():
        raise UsageError(f"{source}: no such prompt file")


def _newest(
    runs: Sequence[LoraRun], used: set[tuple[object, ...]]
) -> dict[tuple[object, ...], LoraRun]:
    """Returns the newest run of each kind that is not used yet.

    Raises UsageError if two runs of a kind were trained on different datasets of one name.
    """
    by_age = sorted(runs, key=lambda r: (r.manifest.started, natural_key(r.directory.name)))
    newest = {_kind(run): run for run in by_age if _kind(run) not in used}
    for run in runs:
        other = newest.get(_kind(run), run)
        if not _same_data(run, other):
            raise UsageError(
                f"two datasets are called {run.manifest.dataset.name}: that of {_described(run)} "
                f"and that of {_described(other)}; name the runs to learn from, one or both, "
                "beside the folder"
            )
    return newest


def _kind(run: LoraRun) -> tuple[object, ...]:
    """Returns dataset, base and adapter shape, which equivalent runs have in common."""
    from loragen.core.adapter.checks import check_config

    adapter = run.manifest.adapter_config
    if adapter:
        check_config(adapter, f"{run.directory / MANIFEST}: adapter_config")
    return run.manifest.dataset.name, run.manifest.base_model, *_shape(adapter)


def _shape(adapter_config: Mapping[str, Any]) -> tuple[object, object]:
    """Returns rank and target modules."""
    targets = adapter_config.get("target_modules")
    names = tuple(sorted(targets)) if isinstance(targets, list) else targets
    return adapter_config.get("r"), names


def _refuse_namesakes(sources: Iterable[TrainingSource]) -> None:
    """Raises UsageError if two datasets share a name, and neither has prompts of its own."""
    by_name: dict[str, LoraRun] = {}
    for source in sources:
        if source.run is None or source.section.prompts is not None:
            continue
        first = by_name.setdefault(source.name, source.run)
        if not _same_data(first, source.run):
            raise UsageError(
                f"two datasets are called {source.name}: that of {_described(first)} and that of "
                f"{_described(source.run)}; data.prompts identifies datasets by name: give each "
                "its own prompts, sources: [{run: ..., prompts: DIR}]"
            )


def _same_data(one: LoraRun, other: LoraRun) -> bool:
    """Returns whether two runs of one dataset's name were trained on the same dataset.

    They match if path or sha256 is equal, since a file may have been moved or edited, but not both;
    a converted run without a recorded path matches any run.
    """
    first, second = one.manifest.dataset, other.manifest.dataset
    recorded = first.path and second.path
    return not recorded or first.path == second.path or first.sha256 == second.sha256


def _described(run: LoraRun) -> str:
    return f"{run.directory} ({run.manifest.dataset.path})"


def _listed(directories: Sequence[Path]) -> str:
    return listing([str(directory) for directory in directories], MAX_LISTED)
