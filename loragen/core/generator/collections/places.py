"""What a configuration of `gen train` names, and whether it is there; light."""

import logging
from functools import partial
from pathlib import Path

from loragen.core.base_names import is_place, resolve_base
from loragen.core.config.gen_schema import GenTrainConfig, SourceSection
from loragen.core.config.problems import Misplaced, refused
from loragen.core.data.documents import parsed_source
from loragen.core.data.prepare import check_prepared
from loragen.core.errors import UsageError
from loragen.core.files import user_path
from loragen.core.generator.collections.found import (
    PromptDirectories,
    directory_of,
    find_sources,
    run_of,
    shown,
)
from loragen.core.manifests import LoraManifest, read_manifest
from loragen.core.runs import run_directory_of

log = logging.getLogger(__name__)


def missing_places(config: GenTrainConfig) -> list[Misplaced]:
    """Every run, directory, file of prompts and local model that is named and not there, and every
    malformed hub id; the hub is not asked."""
    data, base, found = config.data, config.behaviour.base_model, list[Misplaced]()
    for role, sources in (("sources", config.sources), ("val_sources", config.val_sources)):
        for i, source in enumerate(sources):
            kind = "checkpoints" if source.run is None else "run"
            found += refused((role, i, kind), partial(directory_of, source))
            if source.prompts is not None:
                found += refused((role, i, "prompts"), partial(_check_prompts, source.prompts))
    listed = data.checkpoint_dir
    for i, place in enumerate([listed] if isinstance(listed, str) else listed or []):
        at = () if isinstance(listed, str) else (i,)
        named = SourceSection(run=place)
        found += refused(("data", "checkpoint_dir", *at), partial(directory_of, named))
    if data.prompts is not None:
        found += refused(("data", "prompts"), partial(check_prepared, Path(data.prompts)))
    if base is not None:
        found += refused(("behaviour", "base_model"), partial(resolve_base, base))
    model = str(config.encoder.options.get("model", ""))  # of an encoder that has this option
    if is_place(model) and not user_path(model).is_dir():
        found.append((("encoder", "model"), f"{model}: no such directory"))
    return found


def _check_prompts(text: str) -> None:
    place = parsed_source(text)
    if isinstance(place, Path) and not place.exists():
        raise UsageError(f"{place}: no such prompt file")


def check_places(config: GenTrainConfig) -> list[Misplaced]:
    """`missing_places`; where nothing is, tells which runs are left out, or taken although they
    are not finished.

    Raises UsageError for sources that cannot be taken together, DataError for a manifest that is
    no run's.
    """
    missing = missing_places(config)
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
