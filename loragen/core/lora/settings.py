"""What a configuration of `lora train` names, and whether it is there; light.

Which settings decide a run's result, and which are free to differ. Light.
"""

from pathlib import Path

from loragen.core.base.names import resolve_base
from loragen.core.config import DEMO, LoraTrainConfig
from loragen.core.config.load import Problem, problems_at
from loragen.core.config.show import HARDWARE
from loragen.core.config.show import differences as config_differences
from loragen.core.data.documents import content_hash, location, parsed_source
from loragen.core.data.rows import find_dataset
from loragen.core.errors import UsageError
from loragen.core.files import user_path


def missing_lora_paths(config: LoraTrainConfig) -> list[Problem]:
    """Every dataset, file and local base that is named and not there; the hub is not asked."""
    data, root = config.data, Path(config.data.root)
    found = problems_at(("base_model",), resolve_base, config.base_model)
    for i, name in enumerate(config.collection):
        found += problems_at(("collection", i), find_dataset, name, root)
    if data.dataset is not None:
        found += problems_at(("data", "dataset"), find_dataset, data.dataset, root)
    elif not config.collection and "root" in data.model_fields_set and not root.is_dir():
        found.append((("data", "root"), f"{root}: no such directory"))
    if data.validation is not None:
        found += problems_at(("data", "validation"), _check_file, data.validation)
    return found


def _check_file(text: str) -> None:
    place = parsed_source(text)
    if isinstance(place, Path) and not place.is_file():
        raise UsageError(f"{place}: no such file")


FREE = (
    "base_model",  # its fingerprint, or its name, is compared apart
    "base_dtype",  # as is what it computes in
    "runs_dir",
    "collection",
    "launcher",
    "loggers",
    "final_model",
    "track_batches",
    # Hashes say whether the data are the same; with skip_bad_rows, a file without bad rows is.
    "data.root",
    "data.dataset",
    "data.validation",
    "data.skip_bad_rows",
    "data.workers",
    "checkpoints.last_every",
    *HARDWARE,
)


def result_differences(then: LoraTrainConfig, now: LoraTrainConfig) -> list[str]:
    """What differs of the settings that decide the result, as `key is x, the run has y`."""
    return config_differences(then, now, FREE)


def validation_hash(config: LoraTrainConfig) -> str:
    """Of the content of `data.validation`; empty where there is none."""
    return content_hash(parsed_source(config.data.validation)) if config.data.validation else ""


def located(config: LoraTrainConfig) -> LoraTrainConfig:
    """With the places of base and validation file made absolute: a run is gone on with, and an
    adapter loaded, from other directories."""
    found = config.model_copy(deep=True)
    base = user_path(config.base_model)
    if config.base_model != DEMO and base.is_dir():
        found.base_model = str(base.absolute())
    if config.data.validation:
        found.data.validation = location(parsed_source(config.data.validation))
    return found


def same_base(one: str, other: str) -> bool:
    """Whether two names are one base model: a directory may be named in several ways."""
    paths = [user_path(name) for name in (one, other)]
    return one == other or (
        all(path.is_dir() for path in paths) and paths[0].resolve() == paths[1].resolve()
    )


def same_dtype(then: LoraTrainConfig, computed: str, now: LoraTrainConfig) -> bool:
    """Whether the base that computed in `computed` (empty: not known) would do so again.

    Two runs with `auto` count as the same: what it chooses is known only with the base in memory.
    """
    if now.base_dtype == "auto":
        return then.base_dtype == "auto"
    return computed in ("", now.base_dtype)
