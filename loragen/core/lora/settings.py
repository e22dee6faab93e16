"""The settings of `lora train`: which decide a run's result, and the paths in them. Light."""

from pathlib import Path

from loragen.core.base.names import resolve_base
from loragen.core.config import DEMO, LoraTrainConfig
from loragen.core.config.load import Problem, problems_at
from loragen.core.config.show import HARDWARE
from loragen.core.config.show import differences as config_differences
from loragen.core.data.dataset import Dataset
from loragen.core.data.documents import location, parsed_source
from loragen.core.errors import UsageError
from loragen.core.files import user_path

FREE = (
    "base_model",  # compared by its fingerprint, or its name
    "base_dtype",  # compared by the dtype that the base computes in
    "runs_dir",
    "collection",
    "launcher",
    "loggers",
    "final_model",
    "track_batches",
    # The data are compared by hashes. Without bad rows, skip_bad_rows changes nothing.
    "data.root",
    "data.dataset",
    "data.validation",
    "data.skip_bad_rows",
    "data.workers",
    "checkpoints.last_every",
    *HARDWARE,
)
"""Settings that two runs of the same result may differ in."""


def result_differences(then: LoraTrainConfig, now: LoraTrainConfig) -> list[str]:
    """Describes the differences in settings that decide the result: `key is x, the run has y`."""
    return config_differences(then, now, FREE)


def same_base(one: str, other: str) -> bool:
    """Whether two names are of one base model: a directory may be named in several ways."""
    paths = [user_path(name) for name in (one, other)]
    return one == other or (
        all(path.is_dir() for path in paths) and paths[0].resolve() == paths[1].resolve()
    )


def same_dtype(then: LoraTrainConfig, computed: str, now: LoraTrainConfig) -> bool:
    """Whether a base that computed in `computed` (empty: not known) would do so again.

    Two runs with `auto` count as the same: what it chooses is known only with the base in memory.
    """
    if now.base_dtype == "auto":
        return then.base_dtype == "auto"
    return computed in ("", now.base_dtype)


def with_absolute_paths(config: LoraTrainConfig) -> LoraTrainConfig:
    """Returns the configuration with absolute paths of base model and validation file: a run may be
    resumed, and an adapter loaded, from another directory."""
    absolute = config.model_copy(deep=True)
    base = user_path(config.base_model)
    if config.base_model != DEMO and base.is_dir():
        absolute.base_model = str(base.absolute())
    if config.data.validation:
        absolute.data.validation = location(parsed_source(config.data.validation))
    return absolute


def missing_lora_paths(config: LoraTrainConfig) -> list[Problem]:
    """Finds every dataset, file and local base that is named and missing; the hub is not asked."""
    data, root = config.data, Path(config.data.root)
    found = problems_at(("base_model",), resolve_base, config.base_model)
    for i, name in enumerate(config.collection):
        found += problems_at(("collection", i), Dataset.find, name, root)
    if data.dataset is not None:
        found += problems_at(("data", "dataset"), Dataset.find, data.dataset, root)
    elif not config.collection and "root" in data.model_fields_set and not root.is_dir():
        found.append((("data", "root"), f"{root}: no such directory"))
    if data.validation is not None:
        found += problems_at(("data", "validation"), _check_file, data.validation)
    return found


def _check_file(text: str) -> None:
    source = parsed_source(text)
    if isinstance(source, Path) and not source.is_file():
        raise UsageError(f"{source}: no such file")
