"""Run directories: their names, their files, and the manifest that describes what is in them."""

import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from typing import Any, Generic, Literal, TypeAlias, TypeVar, overload

from pydantic import BaseModel, Field

from loragen.core.adapter import weights_in
from loragen.core.base.names import BaseDtype
from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from loragen.core.contents import read_json, record_of
from loragen.core.errors import DataError, UsageError, counted
from loragen.core.files import natural_key, write_json
from loragen.core.plugins import describe
from loragen.core.run import BEST_CHECKPOINT as BEST_CHECKPOINT
from loragen.core.run import CHECKPOINT_SUFFIX as CHECKPOINT_SUFFIX
from loragen.core.run import CHECKPOINTS as CHECKPOINTS
from loragen.core.run import COMMANDS as COMMANDS
from loragen.core.run import CONFIG as CONFIG
from loragen.core.run import FORMAT_VERSION
from loragen.core.run import GENERATOR_FILE as GENERATOR_FILE
from loragen.core.run import LAST_CHECKPOINT as LAST_CHECKPOINT
from loragen.core.run import MANIFEST as MANIFEST

RECORDED_PACKAGES = ("loragen", "torch", "transformers", "peft", "lightning", "numpy")
TEST_MODE_STEPS = (4, 5, 6)
"""The checkpoints of `lora train --test-mode`, which has three steps in each of two stages."""


class DatasetRecord(BaseModel):
    """The dataset that a run was trained on."""

    name: str
    path: str
    """Absolute path or hub id; empty, as are `sha256` and `rows`, if a converted run's dataset was
    not found."""
    sha256: str
    rows: int
    tokens: str = ""
    """The hash of the tokenised rows, which another tokenizer or chat template changes."""
    too_long: list[int] = []
    """Lines left out because the row does not fit into `data.max_length` even without the text of
    its prompt, or because the chat template or the base's vocabulary does not allow it."""
    validation: str = ""
    """The hash of the validation file, if there is one."""


class PluginRecord(BaseModel):
    """A plugin that took part, so that a result can be traced to its code."""

    kind: str
    name: str
    distribution: str
    version: str


class SourceRecord(BaseModel):
    """One dataset that a generator was trained or validated on: hashes, which a resumed run
    compares, and locations, from which an evaluation reads it again."""

    name: str
    checkpoints: str
    """The hash of the checkpoints' content as tokens of the layout, in their order."""
    prompts: str
    """The hash of the prompt texts, in their order."""
    labels: str = ""
    """The hash of the tokenised labelled rows; empty if none were read."""
    held_out: bool = False
    """Whether it is a dataset of `val_sources`."""
    place: str = ""
    """The absolute directory of its checkpoints; empty if an older loragen has trained."""
    prompts_from: str | None = None
    """The location of its prompts; None: the run's own dataset."""
    count: int = 0
    """The number of checkpoints trained on: the last of those in the directory."""


class TrialRecord(BaseModel):
    """The trial of a sweep that a run is."""

    study: str
    """The absolute directory of the study."""
    number: int
    """Counted from 0."""
    pruned_at: int | None = None
    """The step at which the study has ended the run, since others were better at that step."""


class Manifest(BaseModel):
    """The fields that every run records about itself."""

    format_version: int = FORMAT_VERSION
    kind: str
    status: Literal["running", "success", "failed", "interrupted"] = "running"
    started: str = Field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    seconds: float | None = None
    plugins: list[PluginRecord]
    environment: dict[str, str] = {}
    """The versions, the platform and the device of its first start; empty if an older loragen has
    trained."""
    logger_run_ids: dict[str, str] = {}
    resumed_from: list[int] = []
    """The steps at which the run was resumed."""
    trial: TrialRecord | None = None
    """The trial that the run is, if a sweep has started it."""

    @property
    def last_step(self) -> int:
        """The step at which a successful run has ended."""
        raise NotImplementedError


class LoraManifest(Manifest):
    """The manifest of `lora train`: the checkpoints of one dataset's adapter."""

    kind: Literal["lora"] = "lora"
    base_model: str
    base_dtype: BaseDtype = ""
    """The dtype in which the frozen base computed."""
    base_fingerprint: str = ""
    trust_remote_code: bool = False
    """Whether Python code that comes with the base was allowed to run."""
    chat_date: str = ""
    """The date that the chat template has written into the rows (local time); empty if none."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template was given beside the conversation."""
    dataset: DatasetRecord
    adapter_config: dict[str, Any]
    seed: int
    max_steps: int
    steps: list[int] = []
    """The steps that have a checkpoint."""
    final_loss: float | None = None
    converted_from: str | None = None
    """The run of the original scripts from which `ckpt convert` has made this one."""

    @property
    def last_step(self) -> int:
        return max(self.steps, default=self.max_steps)  # early stopping ends before max_steps

    @property
    def is_test(self) -> bool:
        """Whether the run is one of `lora train --test-mode`."""
        return tuple(self.steps) == TEST_MODE_STEPS and self.max_steps == TEST_MODE_STEPS[-1]

    def lineage(self, step: int, run: str) -> dict[str, Any]:
        """Returns the `Adapter.lineage` of the adapter of a step, without any path."""
        dataset = self.dataset
        hub = dataset.path.removeprefix("hub:") if dataset.path.startswith("hub:") else ""
        found = {
            "command": "lora train",
            "run": run,
            "step": step,
            "seed": self.seed,
            "dataset": dataset.name,
            "dataset_sha256": dataset.sha256,
            "hub_dataset": re.split("[:@]", hub)[0],
            "base_fingerprint": self.base_fingerprint,
        }
        return {key: value for key, value in found.items() if value != ""}


class GeneratorManifest(Manifest):
    """The manifest of `gen train`: a generator and the runs it was trained on."""

    kind: Literal["generator"] = "generator"
    base_model: str
    sources: list[str]
    val_sources: list[str]
    base_fingerprint: str = ""
    """The fingerprint of the base that behaviour training computed through; empty if none."""
    base_dtype: BaseDtype = ""
    """The dtype of that base."""
    trust_remote_code: bool = False
    """Whether Python code that comes with that base was allowed to run."""
    chat_date: str = ""
    """The date that the base's chat template has written into labelled rows; empty if none."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the base's chat template was given beside the conversation, as in the runs."""
    source_records: list[SourceRecord] = []
    encoder_fingerprint: str = ""
    """The fingerprint of the encoder's weights, before any training of them."""
    steps: int = 0
    """The optimizer steps of the whole training, once it has ended."""
    max_steps: int = 0
    """The planned optimizer steps; 0 if an older loragen has trained."""
    selection_metric: str = ""
    """The metric whose lowest value chooses the step that is kept; empty if nothing was held out,
    or an older loragen has trained."""
    kept_step: int = 0
    """The step whose weights the generator has; 0 if the training has not ended, or an older
    loragen has trained."""
    metrics: dict[str, float] = {}

    @property
    def last_step(self) -> int:
        return self.steps


class OtherRunError(DataError):
    """The run is that of another command."""


ManifestT = TypeVar("ManifestT", bound=Manifest)
ConfigT = TypeVar("ConfigT", LoraTrainConfig, GenTrainConfig)


def plugin_records(chosen: Mapping[str, list[str]]) -> list[PluginRecord]:
    """Returns the plugins of `{kind: names}`, with the distribution and version of each."""
    plugins = [(kind, name, describe(kind, name)) for kind in chosen for name in chosen[kind]]
    return [
        PluginRecord(kind=kind, name=name, distribution=found.distribution, version=found.version)
        for kind, name, found in plugins
    ]


def environment_record() -> dict[str, str]:
    """Returns the versions of what computes, the platform and the device. It names no host and no
    user."""
    import torch

    record = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with suppress(PackageNotFoundError):
            record[name] = version(name)
    record["platform"] = platform.platform()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    record["device"] = ", ".join(gpus) or f"CPU, {torch.get_num_threads()} threads"
    return record


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes manifest.json."""
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(directory: Path, kind: type[ManifestT]) -> ManifestT:
    """Reads manifest.json.

    Raises UsageError if there is no run, DataError if it is one of another kind, or its
    manifest is damaged or from a newer loragen.
    """
    file, wanted = directory / MANIFEST, str(kind.model_fields["kind"].default)
    if not file.is_file():
        raise UsageError(f"{directory}: not a run directory (it has no {MANIFEST})")
    document = read_json(file)
    found = document.get("kind") if isinstance(document, dict) else None
    if found in COMMANDS and found != wanted:
        raise OtherRunError(f"{directory} is a run of {COMMANDS[found]}, not of {COMMANDS[wanted]}")
    return record_of(document, kind, file, f"the manifest of a {wanted} run")


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

        Raises UsageError if there is none, otherwise as `read_manifest`.
        """
        if not path.exists():
            raise UsageError(f"{path}: no such run or checkpoint")
        directory = run_directory_of(path)
        return Run[Any, Any](directory, read_manifest(directory, kind))

    @cached_property
    def config(self) -> ConfigT:
        """The configuration that the run was started with. Raises LoragenError if its
        config.yaml does not validate."""
        kind: Any = LoraTrainConfig if isinstance(self.manifest, LoraManifest) else GenTrainConfig
        config: ConfigT = load(kind, self.directory / CONFIG, environment={})
        return config

    @property
    def checkpoints(self) -> list[Path]:
        """The current checkpoints in the order of steps, without last.ckpt."""
        files = checkpoint_files(self.directory)
        if isinstance(self.manifest, LoraManifest):
            return files
        return sorted(files, key=lambda file: file.stat().st_mtime_ns)  # a name has no step


LoraRun: TypeAlias = Run[LoraManifest, LoraTrainConfig]
GeneratorRun: TypeAlias = Run[GeneratorManifest, GenTrainConfig]


def create_run_directory(parent: Path, prefix: str, started: datetime | None = None) -> Path:
    """Makes `<parent>/<prefix>_<YYYYmmdd_HHMMSS>`, which no other process has made; `started`
    defaults to now.

    Further runs of the same second get a suffix: `_2`, `_3`, ... Raises UsageError if the
    directory cannot be made.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{parent}: no directory for runs: {error.strerror}") from None
    name = f"{prefix}_{started or datetime.now().astimezone():%Y%m%d_%H%M%S}"
    for attempt in count(1):
        directory = parent / (name if attempt == 1 else f"{name}_{attempt}")
        try:
            directory.mkdir()
            break
        except FileExistsError:
            continue
        except OSError as error:
            raise UsageError(f"{directory}: cannot be made: {error.strerror}") from None
    return directory


def run_directory_of(path: Path) -> Path:
    """Returns the run that `path` is, or whose checkpoints/ or checkpoint it is.

    Raises UsageError if there is none.
    """
    for candidate in (path, *list(path.absolute().parents)[:2]):
        if (candidate / MANIFEST).is_file():
            return candidate
    if runs := sorted(file.parent for file in path.glob(f"*/{MANIFEST}")):
        raise UsageError(f"{path} is a folder of {counted(len(runs), 'run')}; name one: {runs[-1]}")
    raise UsageError(f"{path}: neither a run directory nor inside one (no {MANIFEST} found)")


def checkpoint_files(directory: Path) -> list[Path]:
    """Returns the step checkpoints of a run, or of its checkpoints/, in the order of steps."""
    folder = directory / CHECKPOINTS if (directory / CHECKPOINTS).is_dir() else directory
    found = (f for f in folder.glob(f"*{CHECKPOINT_SUFFIX}") if f.name != LAST_CHECKPOINT.name)
    return sorted(found, key=lambda file: (checkpoint_step(file), file.name))


def find_checkpoints(path: Path) -> list[Path]:
    """Returns the checkpoints at `path`: of a run, its checkpoints/, a folder of PEFT adapters, or
    the one file or adapter.

    Raises UsageError if there are none.
    """
    if path.is_file() or weights_in(path):
        return [path]
    folders = [folder for folder in path.glob("*") if weights_in(folder)]
    adapters = sorted(folders, key=lambda folder: natural_key(folder.name))  # step-2 before step-10
    found = checkpoint_files(path) or adapters
    if not found:
        raise UsageError(f"{path}: no checkpoints or adapters there")
    return found


def checkpoint_name(step: int) -> str:
    """Returns the file name of a step's checkpoint, `checkpoint-step-076.ckpt` for step 76 (the
    first step is 1)."""
    return f"checkpoint-step-{step:03d}{CHECKPOINT_SUFFIX}"


def checkpoint_step(file: Path) -> int:
    """Returns the step in a checkpoint's name; 0 if there is none."""
    digits = "".join(filter(str.isdecimal, file.stem.rpartition("step-")[2] or file.stem))
    return int(digits) if digits else 0


def generator_file(path: Path) -> Path:
    """Returns the generator_model.pt of an experiment directory, or the file itself. An experiment
    that has none yet has its best checkpoint, or its last if nothing was validated.

    Raises UsageError if there is none.
    """
    file = path / GENERATOR_FILE if path.is_dir() else path
    if file.is_file():
        return file
    if not (path / MANIFEST).is_file():
        raise UsageError(f"{path}: no generator there (looked for {file})")
    try:
        manifest = read_manifest(path, GeneratorManifest)
    except OtherRunError:
        raise UsageError(
            f"{path}: the run of an adapter, not of a generator; `gen train --checkpoint-dir` it"
        ) from None
    best = sorted((path / CHECKPOINTS).glob(BEST_CHECKPOINT), key=lambda f: f.stat().st_mtime_ns)
    found = [*best[-1:], path / LAST_CHECKPOINT]
    if found[0].is_file():
        return found[0]
    reason = {
        "running": "is still in training, or was killed",
        "interrupted": "was interrupted",
        "failed": "has failed",
        "success": "has lost its generator",
    }[manifest.status]
    raise UsageError(
        f"{path}: no generator there, and no checkpoint: the experiment {reason}; train it to the "
        f"end, `loragen gen train --resume {path}`, or name another"
    )


def experiment_name(file: Path) -> str:
    """Returns the name of the experiment to which a generator's file belongs, else the file's."""
    for home in file.absolute().parents[:3]:
        if file.absolute() in (home / GENERATOR_FILE, home / CHECKPOINTS / file.name):
            return home.name
    return file.stem
