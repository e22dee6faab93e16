"""Whose configuration a file is, and in which form, by its keys."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from loragen.core.config.commands import MODELS
from loragen.core.config.legacy import FORMS, STAGE2_STEPS, Form
from loragen.core.config.problems import has_key
from loragen.core.config.sections import Trainer
from loragen.core.config.yaml_file import Loc, dotted, read_yaml
from loragen.core.config.yaml_file import paths as all_paths

SHARED = {
    "": {"seed"},
    "data": {
        "dataset",
        "max_length",
        "val_ratio",
        "checkpoint_dir",
        "batch_size",
        "samples_per_prompt",
        "max_checkpoints",
        "cache_tokenized",
    },
    "lora": {"dropout", "target_modules"},
    "training": {
        "batch_size",
        "max_steps",
        "max_epochs",
        "learning_rate",
        "weight_decay",
        "mse_weight",
        "l1_weight",
    },
    "trainer": set(Trainer.model_fields),
}
"""Keys that old files and today's have alike; any other of today's schema is today's alone."""
STRANGERS = 3


def command_for(file: Path) -> str:
    """Whose configuration a file is, by its keys: lora or gen; lora where they tell nothing.

    Raises UsageError for a missing file, ConfigError for what is not YAML.
    """
    tree, origins = read_yaml(file)
    old = recognised(tree)
    if old is not None:
        return old.command
    known = {
        command: sum(has_key(model, keys) for keys in origins) for command, model in MODELS.items()
    }
    return max(known, key=lambda command: known[command])


def recognised(tree: Mapping[str, Any], command: str | None = None) -> Form | None:
    """The form, of the command's where that is told, that knows most of the file's keys; None for
    a file without a sign."""
    signed = [f for f in FORMS if command in (None, f.command) and _signs(tree, f)]
    return max(signed, key=lambda form: _known(tree, form), default=None)


def mostly_todays(tree: Mapping[str, Any], form: Form) -> bool:
    """Whether an old key stands in a file of today, rather than one of today in an old file."""
    paths = [keys for keys in all_paths(tree) if keys]
    old = {*form.moved, *form.dropped, *STAGE2_STEPS} & set(map(dotted, paths))
    todays = [keys for keys in paths if _is_todays_alone(keys, form)]
    return any(len(keys) == 1 for keys in todays) or len(todays) >= max(1, len(old))


def _is_todays_alone(keys: Loc, form: Form) -> bool:
    *section, key = map(str, keys)
    shared = SHARED.get(".".join(section), set())
    return has_key(MODELS[form.command], keys) and key not in shared and dotted(keys) not in SHARED


def of_another_command(tree: Mapping[str, Any], command: str) -> Form | None:
    """The form of the other command that the file plainly is in; one sign may be a mistake."""
    others = [form for form in FORMS if form.command != command]
    ours = [form for form in FORMS if form.command == command]
    best = max(others, key=lambda form: _signs(tree, form))
    plain = _signs(tree, best) > max(1, *(_signs(tree, form) for form in ours))
    return best if plain else None


def owner_of(places: Collection[Loc], command: str) -> str | None:
    """Another command whose file this plainly is: it has keys of that alone, `STRANGERS` or more,
    and none of ours alone. Fewer may be mistakes."""
    ours = {keys for keys in places if has_key(MODELS[command], keys)}
    for other, model in MODELS.items():
        theirs = {keys for keys in places if has_key(model, keys)}
        if len(theirs - ours) >= STRANGERS and not ours - theirs:
            return other
    return None


def _signs(tree: Mapping[str, Any], form: Form) -> int:
    return sum(_has(tree, sign) for sign in form.signs)


def _known(tree: Mapping[str, Any], form: Form) -> int:
    paths = {".".join(map(str, keys)) for keys in all_paths(tree) if keys}
    ours = {*form.signs, *form.moved, *form.dropped}
    model = MODELS[form.command]
    return sum(path in ours or has_key(model, tuple(path.split("."))) for path in paths)


def _has(tree: Any, path: str) -> bool:
    for key in path.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return False
        tree = tree[key]
    return True
