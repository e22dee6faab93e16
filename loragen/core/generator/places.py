"""Where a generator's sources lie; found and checked without torch, before seconds of imports."""

from pathlib import Path

from loragen.core.config.schema import GenTrainConfig, SourceSection
from loragen.core.data.documents import parsed_source
from loragen.core.errors import UsageError
from loragen.core.runs import CHECKPOINTS, MANIFEST, LoraManifest, read_manifest, run_directory_of


def configured_sources(config: GenTrainConfig) -> list[SourceSection]:
    """`sources` and `data.checkpoint_dir` together. Raises UsageError where there are none."""
    listed = config.data.checkpoint_dir or []
    directories = [listed] if isinstance(listed, str) else listed
    runs = [run for directory in directories for run in _runs_in(Path(directory))]
    sources = [*config.sources, *(SourceSection(run=str(run)) for run in runs)]
    places = [Path(str(source.run or source.checkpoints)).resolve() for source in sources]
    for place in places:
        if places.count(place) > 1:
            raise UsageError(f"{place.name} is named twice among the sources")
    if not sources:
        raise UsageError(
            "nothing to learn from: give --checkpoint-dir RUN (repeatable), or sources in the YAML"
        )
    return sources


def _runs_in(directory: Path) -> list[Path]:
    """The finished runs of a folder of runs; any other directory stands for itself."""
    if (directory / MANIFEST).is_file() or directory.name == CHECKPOINTS:
        return [directory]
    runs = sorted(file.parent for file in directory.glob(f"*/{MANIFEST}"))
    finished = [run for run in runs if read_manifest(run, LoraManifest).status == "success"]
    if runs and not finished:
        raise UsageError(f"{directory}: none of its {len(runs)} runs has finished")
    return finished or [directory]


def directory_of(source: SourceSection) -> Path:
    """Raises UsageError where it is not there."""
    directory = Path(str(source.run or source.checkpoints))
    if not directory.is_dir():
        kind = "run directory" if source.run is not None else "directory of checkpoints"
        raise UsageError(f"{directory}: no such {kind}")
    return directory


def check_places(config: GenTrainConfig) -> None:
    """That every run, directory and file of prompts is there; the hub is not asked.

    Raises UsageError for the first that is not, or a malformed hub id, DataError for a manifest
    that is no run's.
    """
    for source in (*configured_sources(config), *config.val_sources):
        directory = directory_of(source)
        if source.run is not None:
            read_manifest(run_directory_of(directory), LoraManifest)
        prompts = None if source.prompts is None else parsed_source(source.prompts)
        if isinstance(prompts, Path) and not prompts.is_file():
            raise UsageError(f"{prompts}: no such prompt file")
