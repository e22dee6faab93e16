"""What a configuration of `lora train` names, and whether it is there; light."""

from functools import partial
from pathlib import Path

from loragen.core.base_names import resolve_base
from loragen.core.config import LoraTrainConfig
from loragen.core.config.problems import Misplaced, refused
from loragen.core.data.documents import parsed_source
from loragen.core.data.rows import find_dataset
from loragen.core.errors import UsageError


def missing_places(config: LoraTrainConfig) -> list[Misplaced]:
    """Every dataset, file and local base that is named and not there; the hub is not asked."""
    data, root = config.data, Path(config.data.root)
    found = refused(("base_model",), partial(resolve_base, config.base_model))
    for i, name in enumerate(config.collection):
        found += refused(("collection", i), partial(find_dataset, name, root))
    if data.dataset is not None:
        found += refused(("data", "dataset"), partial(find_dataset, data.dataset, root))
    elif not config.collection and "root" in data.model_fields_set and not root.is_dir():
        found.append((("data", "root"), f"{root}: no such directory"))
    if data.validation is not None:
        found += refused(("data", "validation"), partial(_check_file, data.validation))
    return found


def _check_file(text: str) -> None:
    place = parsed_source(text)
    if isinstance(place, Path) and not place.is_file():
        raise UsageError(f"{place}: no such file")
