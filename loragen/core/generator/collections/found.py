"""Which sources there are to learn from; found without torch, before seconds of imports."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from loragen.core.config.gen_schema import GenData, GenTrainConfig, SourceSection
from loragen.core.data.documents import location, parsed_source
from loragen.core.data.prepare import Groups, PreparedPrompts, read_prepared
from loragen.core.errors import LoragenError, UsageError, listing
from loragen.core.files import absent, natural_key
from loragen.core.manifests import MANIFEST, LoraManifest, read_manifest
from loragen.core.runs import CHECKPOINTS, TEST_MODE_STEPS, LoraRun, run_directory_of

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


def located(source: SourceSection, data: GenData) -> SourceSection:
    """The same places, with the prompts that `data` names, absolute: found from any directory and
    without the configuration."""
    prompts = source.prompts if source.prompts is not None else data.prompts
    return SourceSection(
        checkpoints=str(directory_of(source).absolute()),
        prompts=None if prompts is None else location(parsed_source(prompts)),
    )


class PromptDirectories:
    """The prepared prompts that a configuration names; each directory is read once."""

    def __init__(self, data: GenData) -> None:
        self.data = data
        self._read: dict[Path, PreparedPrompts] = {}

    def groups_of(self, source: SourceSection, dataset: str) -> Groups | None:
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
