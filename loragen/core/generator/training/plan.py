"""What a generator's training will work on and towards, known before anything is written."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from loragen.core.adapters import module_scaling
from loragen.core.base_models import empty_base, is_local
from loragen.core.config import GenTrainConfig
from loragen.core.errors import DataError, LoragenError, UsageError, listing
from loragen.core.generator.collections.rows import has_rows
from loragen.core.generator.collections.sources import Collection, common_layout, read_sources
from loragen.core.generator.layout import Layout
from loragen.core.plugins import find
from loragen.core.protocols import Transfers

DATASETS_PER_LEFT_OUT = 2
"""For every dataset that a step of transfer leaves out, another has to be there to write from."""
TRAINS_ALONG = "the encoder trains along"
MOST_ON_CPU = 100_000_000
"""Parameters of a base that `auto` trains through without a GPU. A step of 64 rows of 100 tokens is
6 · 6400 operations a parameter at most: with this many some ten seconds at 350 GFLOP/s."""


@dataclass(frozen=True)
class Plan:
    config: GenTrainConfig
    """With an objective where it was `auto`."""
    sources: list[Collection]
    unseen: list[Collection]
    layout: Layout
    reason: str
    """Why this objective."""

    @property
    def base_model(self) -> str:
        """What the adapters are for."""
        return self.sources[0].base_model

    def summary(self) -> str:
        checkpoints = sum(len(source.checkpoints) for source in self.sources)
        return (
            f"{len(self.sources)} datasets, {checkpoints} checkpoints of {self.layout.values:,} "
            f"values -> {self.layout.tokens:,} tokens of {self.layout.token_dim} "
            f"(fill {self.layout.values / (self.layout.tokens * self.layout.token_dim):.1%})\n"
            f"objective: {self.config.training.objective} ({self.reason})"
        )


def plan(config: GenTrainConfig) -> Plan:
    """Finds every source, derives the layout and settles the objective.

    Raises UsageError or DataError.
    """
    sources, unseen = read_sources(config)
    for source in (*sources, *unseen):
        if source.base_model != sources[0].base_model:
            raise DataError(
                f"{source.name} was trained on {source.base_model}, {sources[0].name} on "
                f"{sources[0].base_model}: a generator serves one base model"
            )
    layout = common_layout([*sources, *unseen], config)
    _check_scaling(layout, [*sources, *unseen])
    if config.training.importance and len(sources) < 2:
        raise UsageError("training.importance compares datasets: it needs two at least")
    settled, reason = _with_objective(config, sources)
    return Plan(settled, sources, unseen, layout, reason)


def _check_scaling(layout: Layout, sources: Sequence[Collection]) -> None:
    """A generator's adapters have one configuration. Raises DataError where alpha over rank, or
    what PEFT makes of it, differs between sources: equal factors would mean another ΔW."""
    for path in dict.fromkeys(spec.path for spec in layout.tensors):
        scalings = [module_scaling(source.adapter_config, path) for source in sources]
        for source, scaling in zip(sources, scalings, strict=True):
            if scaling != scalings[0]:
                raise DataError(
                    f"{source.name}: ΔW is {scaling:g} · BA in {path}, and {scalings[0]:g} · BA in "
                    f"{sources[0].name} (lora_alpha, rank): a generator serves one scaling"
                )


def _with_objective(
    config: GenTrainConfig, sources: Sequence[Collection]
) -> tuple[GenTrainConfig, str]:
    """Raises UsageError where an objective was asked for that the sources do not allow."""
    asked = config.training.objective
    obstacle = None if asked == "reconstruction" else _obstacle(config, sources)
    if asked != "auto":
        if obstacle:
            raise UsageError(f"training.objective {asked}: {obstacle}")
        return config.with_objective(asked), "as configured"
    if why := obstacle or _too_large(config, sources):
        return config.with_objective("reconstruction"), why
    here = "the base and labelled rows of every dataset are here"
    if why := _no_transfer(config, sources):
        settled = config.with_objective("reconstruction-then-behaviour")
        return settled, f"{here}; no transfer: {why}"
    why = "datasets enough to write each from others"
    return config.with_objective("transfer"), f"{here}, and {why}"


def _no_transfer(config: GenTrainConfig, sources: Sequence[Collection]) -> str | None:
    """Why no adapter can be written from other datasets alone; None where it can."""
    decoder = find("decoder", config.decoder.name)
    if not issubclass(decoder, Transfers) or not decoder.can_transfer(
        decoder.Config(**config.decoder.options)
    ):
        return f"the decoder {config.decoder.name} cannot, as it is configured"
    encoder = find("encoder", config.encoder.name)
    if not getattr(encoder.Config(**config.encoder.options), "frozen", True):
        return TRAINS_ALONG
    needed = config.behaviour.batch_size * DATASETS_PER_LEFT_OUT
    datasets = len({source.dataset for source in sources})
    if datasets < needed:
        return (
            f"{datasets} datasets; behaviour.batch_size {config.behaviour.batch_size} leaves "
            f"too few others, it needs {needed}"
        )
    return None


def _obstacle(config: GenTrainConfig, sources: Sequence[Collection]) -> str | None:
    """Why the behaviour of adapters cannot be trained; None where it can."""
    if config.training.objective == "transfer" and (why := _no_transfer(config, sources)):
        return why
    missing = [source.name for source in sources if not has_rows(source)]
    if missing:
        return f"labelled rows are missing of {listing(missing, 3)}"
    base = config.behaviour.base_model or sources[0].base_model
    if config.training.objective == "auto" and not is_local(base):
        return f"the base model {base} is not on this machine"
    return None


def _has_gpu(config: GenTrainConfig) -> bool:
    return config.trainer.accelerator != "cpu" and torch.cuda.is_available()


def _too_large(config: GenTrainConfig, sources: Sequence[Collection]) -> str | None:
    base = config.behaviour.base_model or sources[0].base_model
    try:
        with torch.device("meta"):
            model = empty_base(base, local_files_only=True).model
    except LoragenError:
        return f"the base model {base} is not on this machine"
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > MOST_ON_CPU and not _has_gpu(config):
        return f"the base model has {size / 1e9:.1f} B parameters, and there is no GPU"
    return None
