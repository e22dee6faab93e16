"""Where a generator learns from: the checkpoints of a dataset, and the dataset's prompts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loragen.core.adapters import CONFIG_FILE, read_adapter
from loragen.core.checkpoints import find_checkpoints, read_tensors
from loragen.core.config.gen_schema import GenData, GenTrainConfig, SourceSection
from loragen.core.data.documents import content_hash, parsed_source
from loragen.core.data.prepare import Groups
from loragen.core.data.prompts import prompts_of_rows, read_prompts
from loragen.core.errors import DataError, UsageError
from loragen.core.files import sha256_text
from loragen.core.generator.collections.found import (
    PromptDirectories,
    configured_sources,
    directory_of,
    located,
)
from loragen.core.generator.collections.texts import (
    Texts,
    paired_with_dataset,
    paired_with_rows,
    split_groups,
)
from loragen.core.generator.layout import Layout
from loragen.core.lora.provenance import Provenance, traced_run
from loragen.core.manifests import LoraManifest, read_manifest
from loragen.core.runs import checkpoint_step, run_directory_of


@dataclass(frozen=True)
class Collection:
    """One dataset: its checkpoints, its prompts, and the adapter they are of."""

    name: str
    checkpoints: list[Path]
    prompts: list[str]
    adapter_config: dict[str, Any]
    base_model: str
    groups: Groups | None = None
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


def read_sources(config: GenTrainConfig) -> tuple[list[Collection], list[Collection]]:
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
) -> Collection:
    """Finds checkpoints and prompts; a run's manifest knows both. `tracked`: also which rows made
    which step.

    Raises UsageError for what is not there, DataError for a dataset that has changed since.
    """
    directory = directory_of(config)
    prepared = prepared or PromptDirectories(GenData())
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
    return Collection(
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
) -> Collection:
    manifest = read_manifest(run, LoraManifest)
    groups = prepared.groups_of(config, manifest.dataset.name)
    return Collection(
        manifest.dataset.name,
        find_checkpoints(run)[-max_checkpoints:],
        _prompts(groups) if groups else _prompts_of_run(run, config.prompts, manifest),
        manifest.adapter_config,
        manifest.base_model,
        groups,
        traced_run(run).provenance if tracked else None,
        rows=manifest.dataset.path or None,
        origin=located(config, prepared.data),
    )


def _prompts(groups: Groups) -> list[str]:
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


def texts_of(source: Collection, config: GenTrainConfig) -> Texts:
    """The source's texts, as `data.pairing` and `data.val_ratio` have them."""
    data, groups = config.data, groups_of(source, config)
    if source.provenance is None:
        return paired_with_dataset(groups)
    return paired_with_rows(
        source.name,
        source.provenance,
        [checkpoint_step(file) for file in source.checkpoints],
        groups.val,
        samples_per_prompt=data.samples_per_prompt,
        most_texts=data.prompts_per_condition,
    )


def groups_of(source: Collection, config: GenTrainConfig) -> Groups:
    """The source's prompts as they are joined and split."""
    data = config.data
    return source.groups or split_groups(
        source.prompts, data.samples_per_prompt, data.val_ratio, config.seed
    )


def common_layout(sources: Sequence[Collection], config: GenTrainConfig) -> Layout:
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
