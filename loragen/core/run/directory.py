"""What a run says of itself in its manifest, which the next step reads.

Run directories: their names, and what is in them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

from pydantic import BaseModel, Field, ValidationError

from loragen.core.base.names import BaseDtype
from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from loragen.core.errors import DataError, UsageError
from loragen.core.files import write_json
from loragen.core.plugins import describe

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


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

    @property
    def last_step(self) -> int:
        """The step at which a run ended that was successful."""
        raise NotImplementedError


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

    @property
    def last_step(self) -> int:
        return max(self.steps, default=self.max_steps)  # fewer after early stopping


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
    """The steps at which the run was resumed."""

    @property
    def last_step(self) -> int:
        return self.steps


ManifestT = TypeVar("ManifestT", bound=Manifest)
ConfigT = TypeVar("ConfigT", LoraTrainConfig, GenTrainConfig)
KINDS = {"lora": "lora train", "generator": "gen train"}
"""A manifest's kind -> the command that makes such runs."""


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(directory: Path, kind: type[ManifestT]) -> ManifestT:
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


CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
CHECKPOINT_SUFFIX = ".ckpt"
TEST_MODE_STEPS = (4, 5, 6)
"""The checkpoints of `lora train --test-mode`: three steps of each stage, those of the second."""
LAST_CHECKPOINT = Path("checkpoints/last.ckpt")
"""What a killed run goes on from; no part of the collection."""
BEST_CHECKPOINT = f"epoch=*{CHECKPOINT_SUFFIX}"
"""Of a generator's training: the best step so far, one file but for a moment."""
GENERATOR_FILE = Path("results/final_model/generator_model.pt")


@dataclass
class Run(Generic[ManifestT, ConfigT]):
    """A run directory, opened once: its manifest is read when it is opened, its configuration when
    it is first needed."""

    directory: Path
    manifest: ManifestT

    @overload
    @classmethod
    def open(cls, path: Path, kind: type[LoraManifest]) -> "LoraRun": ...

    @overload
    @classmethod
    def open(cls, path: Path, kind: type[GeneratorManifest]) -> "GeneratorRun": ...

    @classmethod
    def open(cls, path: Path, kind: type[LoraManifest] | type[GeneratorManifest]) -> Any:
        """Opens the run at `path`, which may also be its checkpoints/ or a file in there.

        Raises UsageError where there is none, DataError where it is a run of another kind or its
        manifest is damaged.
        """
        if not path.exists():
            raise UsageError(f"{path}: no such run or checkpoint")
        directory = run_directory_of(path)
        return Run[Any, Any](directory, read_manifest(directory, kind))

    @cached_property
    def config(self) -> ConfigT:
        """The configuration that the run was started with. Raises LoragenError where its
        config.yaml does not validate."""
        kind: Any = LoraTrainConfig if isinstance(self.manifest, LoraManifest) else GenTrainConfig
        config: ConfigT = load(kind, self.directory / CONFIG, environment={})
        return config

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints there are now, in the order of steps, without last.ckpt."""
        if isinstance(self.manifest, LoraManifest):
            return checkpoint_files(self.directory)
        files = (self.directory / CHECKPOINTS).glob(f"*{CHECKPOINT_SUFFIX}")
        kept = [file for file in files if file.name != LAST_CHECKPOINT.name]
        return sorted(kept, key=lambda file: file.stat().st_mtime_ns)  # a name has no step

    @property
    def last_checkpoint(self) -> Path | None:
        """last.ckpt, from which a killed run resumes, where there is one."""
        file = self.directory / LAST_CHECKPOINT
        return file if file.is_file() else None


LoraRun: TypeAlias = Run[LoraManifest, LoraTrainConfig]
"""`lora train`: the checkpoints of one dataset's adapter."""
GeneratorRun: TypeAlias = Run[GeneratorManifest, GenTrainConfig]
"""`gen train`: a generator."""


def create_run_directory(parent: Path, prefix: str, started: datetime | None = None) -> Path:
    """`<parent>/<prefix>_<YYYYmmdd_HHMMSS>`, made here and by nobody else; `started` is now.

    Two runs of one second: the later takes `_2`, `_3`, ... Raises UsageError where it
    cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{parent}: no directory for runs: {error.strerror}") from None
    name = f"{prefix}_{started or datetime.now().astimezone():%Y%m%d_%H%M%S}"
    attempt = 1
    while True:
        directory = parent / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            directory.mkdir()
        except FileExistsError:
            attempt += 1
        except OSError as error:
            raise UsageError(f"{directory}: cannot be made: {error.strerror}") from None
        else:
            return directory


def read_run(directory: Path) -> tuple[LoraRun, LoraTrainConfig]:
    """Deprecated: `Run.open`."""
    run = Run.open(directory, LoraManifest)
    return run, run.config


def resumable_run(path: Path, kind: type[Manifest]) -> Path:
    """Deprecated: `Run.open`."""
    return Run.open(path, kind).directory  # type: ignore[arg-type]  # to go


def run_directory_of(path: Path) -> Path:
    """The run that `path` belongs to: the run itself, its checkpoints/, or a file in there."""
    for candidate in (path, *list(path.absolute().parents)[:2]):
        if (candidate / MANIFEST).is_file():
            return candidate
    raise UsageError(f"{path}: neither a run directory nor inside one (no {MANIFEST} found)")


def checkpoint_files(directory: Path) -> list[Path]:
    """The step checkpoints of a run (or of its checkpoints/ folder), in the order of steps."""
    folder = directory / CHECKPOINTS if (directory / CHECKPOINTS).is_dir() else directory
    found = (f for f in folder.glob(f"*{CHECKPOINT_SUFFIX}") if f.name != LAST_CHECKPOINT.name)
    return sorted(found, key=lambda file: (checkpoint_step(file), file.name))


def checkpoint_name(step: int) -> str:
    return f"checkpoint-step-{step:03d}{CHECKPOINT_SUFFIX}"


def checkpoint_step(file: Path) -> int:
    """The step that a checkpoint's name tells; 0 where it tells none."""
    digits = "".join(filter(str.isdigit, file.stem.rpartition("step-")[2] or file.stem))
    return int(digits) if digits else 0


def generator_file(path: Path) -> Path:
    """The generator_model.pt of an experiment directory, or the file itself; of an experiment that
    has none yet, its best checkpoint, or its last where nothing was validated.

    Raises UsageError where there is none.
    """
    file = path / GENERATOR_FILE if path.is_dir() else path
    if file.is_file():
        return file
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{path}: no generator there (looked for {file})")
    kind = json.loads((path / MANIFEST).read_text(encoding="utf-8")).get("kind")
    if kind != "generator":
        raise UsageError(
            f"{path}: the run of an adapter, not of a generator: `gen train --checkpoint-dir` it"
        )
    best = sorted((path / CHECKPOINTS).glob(BEST_CHECKPOINT), key=lambda f: f.stat().st_mtime_ns)
    found = [*best[-1:], path / LAST_CHECKPOINT]
    if not found[0].is_file():
        raise UsageError(_why_no_generator(path))
    return found[0]


def _why_no_generator(run: Path) -> str:
    told = {
        "running": "is still in training, or was killed",
        "interrupted": "was interrupted",
        "failed": "has failed",
        "success": "has lost its generator",
    }[read_manifest(run, GeneratorManifest).status]
    return (
        f"{run}: no generator there, and no checkpoint: the experiment {told}; train it to the "
        f"end, `loragen gen train --resume {run}`, or name another"
    )


def experiment_name(file: Path) -> str:
    """What a generator's file is called by: its experiment's name, else its own."""
    for home in file.absolute().parents[:3]:
        if file.absolute() in (home / GENERATOR_FILE, home / CHECKPOINTS / file.name):
            return home.name
    return file.stem
