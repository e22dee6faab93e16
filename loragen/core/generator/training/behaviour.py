"""The behaviour phase made ready: the base, and the labelled rows of every dataset."""

from dataclasses import dataclass

from loragen.core.base_models import BaseModel
from loragen.core.config import LoraTrainConfig
from loragen.core.data.tokenize import pad_id
from loragen.core.generator.collections.rows import LabelledRows, has_rows, labelled_rows
from loragen.core.generator.collections.sources import Collection, groups_of
from loragen.core.generator.training.plan import Plan
from loragen.core.lora.precision import load_training_base
from loragen.core.manifests import BaseDtype


@dataclass(frozen=True)
class Rehearsal:
    """What generated adapters are tried on."""

    base: BaseModel
    rows: list[LabelledRows]
    """Of every dataset that is learned from."""
    unseen: list[LabelledRows | None]
    """Of every dataset that is held out whole; None where its labels are not known."""

    @property
    def pad_id(self) -> int:
        return pad_id(self.base.tokenizer)


def rehearsal(work: Plan, base_dtype: BaseDtype = "") -> Rehearsal | None:
    """The base, and the rows in tokens. None where the objective does not need them.

    The base is in the dtype that `lora train` would choose for it; a run that goes on names the
    one that it had, since other hardware might choose otherwise. Raises UsageError where rows are
    missing.
    """
    config = work.config
    if config.training.objective == "reconstruction":
        return None
    settings = LoraTrainConfig(base_model=config.behaviour.base_model or work.base_model)
    settings.trainer.accelerator = config.trainer.accelerator
    base = load_training_base(settings.model_copy(update={"base_dtype": base_dtype or "auto"}))

    def rows_of(source: Collection) -> LabelledRows:
        held_out = [prompt for group in groups_of(source, config).val for prompt in group]
        return labelled_rows(
            source, held_out, base.tokenizer, config.behaviour.max_length, config.seed
        )

    return Rehearsal(
        base,
        [rows_of(source) for source in work.sources],
        [_all_of(source, work, base) if has_rows(source) else None for source in work.unseen],
    )


def _all_of(source: Collection, work: Plan, base: BaseModel) -> LabelledRows:
    """Held out whole."""
    config = work.config
    rows = labelled_rows(source, [], base.tokenizer, config.behaviour.max_length, config.seed)
    return LabelledRows([], rows.training)
