"""An old configuration file as today's, with a comment wherever it says something else."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loragen.core.config.commands import MODELS
from loragen.core.config.load import Given, validated
from loragen.core.config.translation import Translation, translated
from loragen.core.config.yaml_file import commented, dotted, read_yaml


@dataclass(frozen=True)
class Migrated:
    text: str
    """YAML that loads to the same configuration as the old file."""
    command: str | None
    """lora or gen; None for a file that is not an old one, whose text is as it was."""


def migrate(file: Path, command: str | None = None) -> Migrated:
    """`command` is lora or gen where the keys alone would not tell.

    Raises UsageError for a missing file; ConfigError, with every place, for an old file that
    says what today's form cannot."""
    tree, origins = read_yaml(file)
    old = translated(tree, origins, command)
    if old is None:
        return Migrated(file.read_text(encoding="utf-8-sig"), None)
    model = MODELS[old.form.command]
    given = Given(old.tree, old.origins, old.problems)
    wanted = dict(old.tree)  # validation adds the defaults
    config = validated(model, given).model_dump(mode="json")
    return Migrated(_text(file, old, _picked(config, wanted)), old.form.command)


def _picked(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """The wanted settings in the schema's order, their values as validated (`1e-4`, a text to
    YAML, is a number)."""
    return {
        key: _picked(value, wanted[key])
        if isinstance(value, Mapping) and isinstance(wanted[key], Mapping)
        else value
        for key, value in config.items()
        if key in wanted
    }


def _text(file: Path, old: Translation, tree: Mapping[str, Any]) -> str:
    changed = {change.new: str(change) for change in old.changes if change.new}
    dropped = [f"# {change}\n" for change in old.changes if change.new is None]
    head = (
        f"# `loragen {old.form.command} train`, migrated from the {old.form.name} form "
        f"({file.name}).\n"
    )
    return head + "".join(dropped) + commented(tree, lambda keys: changed.get(dotted(keys), ""))
