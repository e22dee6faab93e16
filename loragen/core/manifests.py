"""What a run says of itself in its manifest, which the next step reads."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError

from loragen.core.errors import DataError, UsageError
from loragen.core.files import write_json
from loragen.core.plugins import describe

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
BaseDtype = Literal["", "float32", "bfloat16", "float64"]
"""What a frozen base computes in; empty where that is not known or none was loaded."""


class DatasetRecord(BaseModel):
    name: str
    path: str
    """Empty, as are `sha256` and `rows`, where a converted run's dataset was not found."""
    sha256: str
    rows: int
    tokens: str = ""
    """The hash of the rows in tokens: tells of another tokenizer or chat template."""
    too_long: list[int] = []
    """Lines left out since the answer alone had more tokens than `data.max_length`."""
    validation: str = ""
    """The hash of the validation file, where there is one."""


class PluginRecord(BaseModel):
    """Which code took part, so that a result can be traced to it."""

    kind: str
    name: str
    distribution: str
    version: str


class Manifest(BaseModel):
    """What every run says of itself."""

    format_version: int = FORMAT_VERSION
    kind: str
    status: Literal["running", "success", "failed", "interrupted"] = "running"
    started: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float | None = None
    plugins: list[PluginRecord]
    logger_run_ids: dict[str, str] = {}


class LoraManifest(Manifest):
    """A collection: the checkpoints of one dataset's adapter."""

    kind: Literal["lora"] = "lora"
    base_model: str
    base_dtype: BaseDtype = ""
    """What the frozen base computed in."""
    base_fingerprint: str = ""
    dataset: DatasetRecord
    adapter_config: dict[str, Any]
    seed: int
    max_steps: int
    steps: list[int] = []
    """The steps that have a checkpoint."""
    final_loss: float | None = None
    resumed_from: list[int] = []
    """The steps at which the run was gone on with."""
    converted_from: str | None = None
    """The traditional run that it was made of by `ckpt convert`."""


class SourceRecord(BaseModel):
    """What a generator was trained on, or validated on: hashes, since a resumed run needs the same,
    and where it lay, since an evaluation reads it again."""

    name: str
    checkpoints: str
    """Of their content, in their order, cut into the tokens of the layout."""
    prompts: str
    """Of the prompt texts, in their order."""
    labels: str = ""
    """Of the labelled rows in tokens; empty where none were read."""
    held_out: bool = False
    """A dataset of `val_sources`."""
    place: str = ""
    """The directory of its checkpoints, absolute; empty where an older loragen has trained."""
    prompts_from: str | None = None
    """What was named for its prompts, to be found from anywhere; None: the run's own dataset."""
    count: int = 0
    """Checkpoints learned from: the last of those there."""


class GeneratorManifest(Manifest):
    """A generator and the runs it was trained on."""

    kind: Literal["generator"] = "generator"
    base_model: str
    sources: list[str]
    val_sources: list[str]
    base_fingerprint: str = ""
    """Of the base that was trained through; empty where none was."""
    base_dtype: BaseDtype = ""
    """What that base computed in."""
    source_records: list[SourceRecord] = []
    encoder_fingerprint: str = ""
    """Of the encoder's weights, before any training of them."""
    steps: int = 0
    """Optimizer steps of the whole training, once it has ended."""
    metrics: dict[str, float] = {}
    resumed_from: list[int] = []
    """The steps at which the run was gone on with."""


KINDS = {"lora": "lora train", "generator": "gen train"}
"""A manifest's kind -> the command that makes such runs."""
AnyManifest = TypeVar("AnyManifest", bound=Manifest)


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(directory: Path, kind: type[AnyManifest]) -> AnyManifest:
    """Raises UsageError where there is no such run, DataError where its manifest is not ours."""
    file = directory / MANIFEST
    if not file.is_file():
        raise UsageError(f"{directory}: not a run directory (it has no {MANIFEST})")
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        found = document.get("kind") if isinstance(document, dict) else None
        if found in KINDS and found != _kind_name(kind):
            raise DataError(f"{directory} is a run of {KINDS[found]}, not of {_made_by(kind)}")
        manifest = kind.model_validate(document)
    except (ValueError, ValidationError) as error:
        reason = "; ".join(str(error).splitlines()[:2])
        raise DataError(f"{file}: not the manifest of a {_kind_name(kind)} run: {reason}") from None
    if manifest.format_version > FORMAT_VERSION:
        raise DataError(
            f"{file}: format {manifest.format_version} is newer than this loragen reads "
            f"({FORMAT_VERSION}); upgrade loragen"
        )
    return manifest


def plugin_records(chosen: Mapping[str, list[str]]) -> list[PluginRecord]:
    """`{kind: names}` with the distribution and version each came from."""
    records = []
    for kind, chosen_names in chosen.items():
        for name in chosen_names:
            plugin = describe(kind, name)
            records.append(
                PluginRecord(
                    kind=kind, name=name, distribution=plugin.distribution, version=plugin.version
                )
            )
    return records


def _made_by(kind: type[Manifest]) -> str:
    return KINDS[_kind_name(kind)]


def _kind_name(kind: type[Manifest]) -> str:
    return str(kind.model_fields["kind"].default)
