"""Experiments of the original scripts on disk: their runs, checkpoints and recorded settings.

A run directory is `experiments/<name>/<dataset>/<run>/` with `models/`, `checkpoints/` and `logs/`;
a bare folder of checkpoints, such as the output of a Hugging Face Trainer, is accepted as well.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple

from loragen.core.adapter import CONFIG_FILE, WEIGHTS_FILE
from loragen.core.config.load import origin_of
from loragen.core.config.yaml_file import Loc, dotted, leaves, read_yaml
from loragen.core.contents import read_json
from loragen.core.errors import ConfigError, DataError, UsageError, listing
from loragen.core.files import natural_key
from loragen.core.run.directory import CHECKPOINTS, MANIFEST
from loragen.legacy.translate import translate

log = logging.getLogger(__name__)

MODELS_FOLDER = "models"
SUFFIXES = {".bin", ".ckpt", ".pt", ".pth", ".safetensors"}
NOT_WEIGHTS = re.compile(
    r"(optimizer|scheduler|scaler|rng_state|random_states|training_args)[._-]", re.IGNORECASE
)
# What PEFT and the Hugging Face Trainer put into a directory, best first; models may be in shards.
DIRECTORY_WEIGHTS = (
    WEIGHTS_FILE,
    "adapter_model.bin",
    "model.safetensors",
    "model-?????-of-?????.safetensors",
    "pytorch_model.bin",
    "pytorch_model-?????-of-?????.bin",
)
STEP = re.compile(r"steps?[_=-]?(\d{1,7})(?!\d)", re.IGNORECASE)
NUMBER = re.compile(r"(?:checkpoint|ckpt|iter|iteration)[_=-]?(\d{1,7})(?!\d)", re.IGNORECASE)
FINAL = re.compile(r"final|last|best|adapter|model", re.IGNORECASE)
TIMESTAMP = re.compile(r"\d{8}_\d{6}")


@dataclass(frozen=True)
class LegacyRun:
    """A run directory of the original scripts, a bare folder of checkpoints, or one file."""

    directory: Path
    checkpoints: list[Path]
    """Files or directories, as found; some may have no step."""
    has_subfolders: bool = False
    """The checkpoints are in checkpoints/ or models/: the parent is named after the dataset."""
    single_file: bool = False
    """The user named one file: other files in its directory may belong to other trainings."""

    @property
    def source(self) -> Path:
        """The path that is converted."""
        return self.checkpoints[0] if self.single_file else self.directory

    @property
    def started(self) -> datetime | None:
        """The local time in the directory's name."""
        for text in TIMESTAMP.findall(self.directory.absolute().name):
            try:
                return datetime.strptime(text, "%Y%m%d_%H%M%S").astimezone()
            except ValueError:
                continue
        return None

    @property
    def logs(self) -> Path:
        logs = self.directory / "logs"
        return logs if logs.is_dir() else self.directory

    @property
    def dataset_name(self) -> str | None:
        """The dataset that the names of files and folders indicate, tracking logs first."""
        for file in sorted(self.logs.glob("batch_tracking_*.jsonl")):
            return file.stem.removeprefix("batch_tracking_")
        parent = self.directory.absolute().parent.name
        return parent if self.has_subfolders and parent not in {"", "experiments", "runs"} else None


def find_runs(source: Path) -> list[LegacyRun]:
    """Finds the runs at and below `source`.

    Raises UsageError if there are no checkpoints.
    """
    if not source.exists():
        raise UsageError(f"{source}: no such file or directory")
    if source.is_file():
        return [LegacyRun(source.parent, [source], single_file=True)]
    # Only the subfolder that is named is read: the other one may hold the base model.
    is_subfolder = source.name in (CHECKPOINTS, MODELS_FOLDER)
    if source.is_symlink() and not is_subfolder:
        source = source.resolve()  # a run is converted once, under one name
    runs = list(_runs(source.parent, [source]) if is_subfolder else _runs(source))
    if not runs:
        raise UsageError(
            f"{source}: no checkpoints to convert; expected {', '.join(sorted(SUFFIXES))} in "
            f"{CHECKPOINTS}/, {MODELS_FOLDER}/ or in the folder itself"
        )
    return runs


def _runs(directory: Path, subfolders: list[Path] | None = None) -> Iterator[LegacyRun]:
    """Yields the run in a directory, or the runs below it; or the run of one subfolder alone."""
    if (directory / MANIFEST).is_file():
        log.warning("%s: skipped; a run directory of loragen needs no conversion", directory)
        return
    folders = subfolders or [directory / CHECKPOINTS, directory / MODELS_FOLDER]
    if found := [path for folder in folders for path in _checkpoints(folder)]:
        yield LegacyRun(directory, found, has_subfolders=True)
        return
    if subfolders:
        return
    own = list(_checkpoints(directory, recursive=False))
    if any(path.is_dir() for path in own):
        yield LegacyRun(directory, own)
        return
    below: list[LegacyRun] = []
    for child in _children(directory):
        if child.is_dir() and child.is_symlink():  # such as `latest`, beside the run itself
            log.info("%s: skipped; name a link to convert it", child)
        elif child.is_dir():
            below += _runs(child)
    if own:
        below = [run for run in below if run.has_subfolders or _any_step(run.checkpoints)]
    if own and below and not _any_step(own):  # a best.pt above the runs is no run
        names = listing([path.name for path in own], 4)
        log.warning("%s: skipped, because there are runs below: %s", directory, names)
    elif own:
        yield LegacyRun(directory, own)
    yield from below


def _any_step(checkpoints: list[Path]) -> bool:
    return any(step_in_name(path) is not None for path in checkpoints)


def _checkpoints(directory: Path, recursive: bool = True) -> Iterator[Path]:
    """Yields the checkpoints in a folder and, if `recursive`, those in its subfolders."""
    own = _directory_weights(directory)
    if own:
        yield directory  # the final model of a Trainer, which has checkpoint-N/ beside it
    for child in _children(directory):
        if child.is_dir():
            in_step_folder = step_in_name(child) is not None and len(_weight_files(child)) == 1
            if in_step_folder or _directory_weights(child):
                yield child
            elif recursive:
                yield from _checkpoints(child)
        elif _is_weights(child) and child not in own:
            yield child


def _children(directory: Path) -> list[Path]:
    if not directory.is_dir():
        return []
    visible = (child for child in directory.iterdir() if not child.name.startswith("."))
    return sorted(visible, key=lambda child: natural_key(child.name))


def _directory_weights(directory: Path) -> list[Path]:
    for pattern in DIRECTORY_WEIGHTS:
        if found := sorted(directory.glob(pattern)):
            return found
    return []


def _weight_files(directory: Path) -> list[Path]:
    return [child for child in _children(directory) if child.is_file() and _is_weights(child)]


def _is_weights(file: Path) -> bool:
    return file.suffix in SUFFIXES and not NOT_WEIGHTS.match(file.name)


def find_weights(checkpoint: Path) -> list[Path]:
    """Finds the files with a checkpoint's weights: one, several shards, or none.

    Raises UsageError for a folder of several checkpoints.
    """
    if checkpoint.is_file():
        return [checkpoint]
    shards = _directory_weights(checkpoint)
    files = [] if shards else _weight_files(checkpoint)
    if len(files) > 1:
        names = listing([file.name for file in files], 4)
        raise UsageError(f"{checkpoint}: {len(files)} checkpoints in the folder; name one: {names}")
    return shards or files


def step_in_name(checkpoint: Path, explicit: bool = False) -> int | None:
    """Reads the step from a name: `step_080` is 80.

    Unless it has to be `explicit`, `checkpoint-80` and `80` are 80 as well.
    """
    name = checkpoint.stem if checkpoint.suffix in SUFFIXES else checkpoint.name
    if found := STEP.findall(name):
        return int(found[-1])
    if explicit:
        return None
    if found := NUMBER.findall(name):
        return int(found[-1])
    return int(name) if re.fullmatch(r"\d{1,7}", name) else None


def is_final_model(checkpoint: Path) -> bool:
    """Returns whether the name is that of a training's result, rather than of one of its steps."""
    return checkpoint.parent.name == MODELS_FOLDER or bool(FINAL.search(checkpoint.name))


# Current key -> what other training loops call it (dotted, lower case). For settings that were
# saved with the weights, and for YAML in none of the formats of `legacy.formats`.
TRAINING = r"(?:training\.|train\.|schedule\.)?"
LORA = r"(?:(?:model\.)?(?:lora|peft|adapter)(?:_config)?\.)?"
SYNONYMS = {
    "base_model": r"(?:model\.|lora_config\.)?(?:base_model(?:_name)?(?:_or_path)?|model_name"
    r"|model_path|(?:pretrained_)?model_name_or_path)|model(?:\.name|\.path)?",
    "data.dataset": r"(?:data\.)?dataset(?:_name|\.name)?",
    "data.max_length": r"(?:training\.|data\.|model\.)?max_(?:seq_)?length",
    "lora.alpha": LORA + r"lora_alpha|(?:model\.)?lora(?:_config)?\.alpha",
    "lora.dropout": LORA + r"lora_dropout|(?:model\.)?lora(?:_config)?\.dropout",
    "training.batch_size": TRAINING + r"(?:per_device_train_batch_size|(?:train_)?batch_size)",
    "training.max_steps": TRAINING + r"max_steps",
    "training.weight_decay": r"(?:training\.|optimizer\.)?weight_decay",
    "schedule.stage1_steps": TRAINING + r"stage1[._]steps",
    "schedule.learning_rate_stage1": TRAINING
    + r"(?:stage1[._](?:learning_rate|lr)|learning_rate_stage1)",
    "schedule.learning_rate_stage2": TRAINING
    + r"(?:stage2[._](?:learning_rate|lr)|learning_rate_stage2)",
    "trainer.gradient_clip_val": r"(?:training\.|train\.|trainer\.)?"
    r"(?:max_grad_norm|gradient_clip_val)",
    "seed": TRAINING + r"seed",
}
TEXT_SETTINGS = ("base_model", "data.dataset")
ACCUMULATION = re.compile(TRAINING + r"(?:gradient_accumulation_steps|accumulate_grad_batches)")
# The settings of a translated file that describe the training; the others are another machine's,
# or follow from the checkpoints.
DESCRIPTIVE = re.compile(
    r"base_model|seed|data\.(?:dataset|max_length)|lora\.(?:alpha|dropout)|(?:training|schedule)\..+"
    r"|trainer\.(?:precision|gradient_clip_val|accumulate_grad_batches)"
)
# Fields of an adapter_config.json that change the meaning of the tensors.
UNSUPPORTED_FIELDS = (
    "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication",
)  # fmt: skip


class RecordedSetting(NamedTuple):
    """A setting of a training, and where it is recorded."""

    value: Any
    origin: str
    """A position in a file, or a flag."""


RecordedSettings = dict[str, RecordedSetting]
"""{dotted key of a current configuration: setting}"""


def settings_beside(run: LegacyRun) -> RecordedSettings:
    """Reads the YAML files in a run's directory; those in a format of the scripts take precedence.

    A file that does not parse is skipped with a warning; beside a single file none is read.
    Raises ConfigError for a file of the scripts with settings that loragen does not support.
    """
    if run.single_file:
        return {}
    translated: RecordedSettings = {}
    others: RecordedSettings = {}
    for folder in dict.fromkeys((run.directory, run.logs)):
        for file in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
            try:
                tree, origins = read_yaml(file)
            except ConfigError as error:
                log.warning("%s; skipped", error)
                continue
            found = _translated_settings(tree, origins)
            if found is None:
                others = {**settings_by_synonyms(tree, str(file), origins), **others}
            else:
                translated = {**found, **translated}
    return {**others, **translated}


def settings_in_yaml(file: Path) -> RecordedSettings:
    """Reads a YAML file of any structure. Raises as `settings_beside` and `read_yaml`."""
    tree, origins = read_yaml(file)
    found = _translated_settings(tree, origins)
    return settings_by_synonyms(tree, str(file), origins) if found is None else found


def _translated_settings(
    tree: Mapping[str, Any], origins: Mapping[Loc, str]
) -> RecordedSettings | None:
    """Returns None for a file in none of the formats of the scripts."""
    translation = translate(tree, origins, "lora")
    if translation is None:
        return None
    if translation.problems:
        raise ConfigError(*translation.problems)
    settings: RecordedSettings = {}
    for keys, value in leaves(translation.tree):
        if value is None or isinstance(value, Mapping):
            continue
        if DESCRIPTIVE.fullmatch(dotted(keys)):
            settings[dotted(keys)] = RecordedSetting(value, translation.position(keys))
    return _without_endless_steps(settings)


def settings_by_synonyms(
    tree: Mapping[str, Any], source: str, origins: Mapping[Loc, str] | None = None
) -> RecordedSettings:
    """Reads settings of any structure by the usual names; `origins` are the keys' positions."""
    flat = {
        dotted(keys).lower(): RecordedSetting(value, origin_of(keys, origins or {}) or source)
        for keys, value in leaves(tree)
        if value is not None and not isinstance(value, Mapping)
    }
    settings: RecordedSettings = {}
    for key, names in SYNONYMS.items():
        for name, (value, origin) in flat.items():
            if re.fullmatch(names, name):
                value = value if key in TEXT_SETTINGS else _number(value)
                settings.setdefault(key, RecordedSetting(value, origin))
    batch_size = settings.get("training.batch_size")
    for name, (value, _) in flat.items():
        if batch_size and ACCUMULATION.fullmatch(name) and isinstance(value, int):
            # A current batch size counts the rows of a whole optimizer step.
            total = batch_size._replace(value=batch_size.value * value)
            settings["training.batch_size"] = total
    return _without_endless_steps(settings)


def _without_endless_steps(settings: RecordedSettings) -> RecordedSettings:
    """Drops `max_steps: -1`, with which the Trainer trains for whole epochs."""
    steps = settings.get("training.max_steps")
    if steps and (not isinstance(steps.value, int) or steps.value < 1):
        del settings["training.max_steps"]
    return settings


def _number(value: Any) -> Any:
    """Converts `1e-4`, which YAML 1.1 reads as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def settings_in_adapter_config(run: LegacyRun) -> RecordedSettings:
    """Reads the adapter_config.json in the last checkpoint that has one, or beside them.

    Raises DataError for more than plain LoRA.
    """
    folders = [path if path.is_dir() else path.parent for path in reversed(run.checkpoints)]
    files = [folder / CONFIG_FILE for folder in (*folders, run.directory)]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    try:
        config = read_json(file)
        alpha, rank = float(config["lora_alpha"]), int(config["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{file}: not the configuration of a LoRA adapter: {error!r}") from None
    unsupported = [name for name in UNSUPPORTED_FIELDS if config.get(name)]
    if config.get("bias", "none") != "none":
        unsupported.append("bias")
    if unsupported:
        raise DataError(f"{file}: {', '.join(unsupported)}: only plain LoRA can be converted")
    if config.get("use_rslora"):
        alpha *= sqrt(rank)  # scaling alpha / sqrt(r), expressed as alpha / r
    settings = {
        "lora.alpha": alpha,
        "lora.dropout": config.get("lora_dropout", 0.0),
        "base_model": config.get("base_model_name_or_path"),
    }
    return {
        key: RecordedSetting(value, str(file))
        for key, value in settings.items()
        if value is not None
    }


def log_origins(settings: RecordedSettings, keys: Iterable[str]) -> None:
    """Logs where the settings are recorded, unless the user gave them as flags."""
    for key in keys:
        value, origin = settings[key]
        if not origin.startswith("--"):
            log.info("%s %s is from %s", key, value, origin)
