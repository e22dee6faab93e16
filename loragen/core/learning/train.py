"""Trains a generator on sources and their prompts, and saves it in an experiment directory.

`train` is the whole recipe: setup, fit, save. The functions below create the objects of the setup,
and `GeneratorPoint` checks that a resumed run continues the same training.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from loragen.core.base.load import (
    LanguageModel,
    best_device,
    dtype_name,
    load_tokenizer,
    load_training_base,
    quiet_libraries,
)
from loragen.core.base.names import absolute_base
from loragen.core.config import GenTrainConfig, LoraTrainConfig
from loragen.core.config.schema import AUTO, SourceSection
from loragen.core.config.show import HARDWARE
from loragen.core.data.chat import chat_date, set_chat_date, set_template_kwargs
from loragen.core.errors import UsageError, listing
from loragen.core.generator.collected import Collected
from loragen.core.generator.embeddings import Familiarity
from loragen.core.generator.model import Choice, Generator
from loragen.core.generator.network import Network, Normalization, condition_scale, new_network
from loragen.core.learning.arrays import (
    AdapterSamples,
    SourceArrays,
    embedded,
    source_arrays,
)
from loragen.core.learning.callbacks import (
    Averaging,
    GeneratorCheckpoints,
    GeneratorMetrics,
    Selection,
    select_by,
)
from loragen.core.learning.data import TrainingData
from loragen.core.learning.module import GeneratorModule
from loragen.core.learning.objectives.transfer import Transfer
from loragen.core.learning.plan import (
    MIXTURE,
    Phases,
    Plan,
    default_decoder,
    make_phases,
    make_plan,
    with_method,
)
from loragen.core.learning.sources import Sources, TrainingSource, open_sources
from loragen.core.learning.texts import labelled_rows
from loragen.core.outputs import check_writable
from loragen.core.plugins import create
from loragen.core.progress import Progress, is_first_process
from loragen.core.protocols import Encoder, StartsFromSamples, Transfers
from loragen.core.run.checkpoints import AtomicCheckpointIO, load_weights_only
from loragen.core.run.directory import (
    GENERATOR_FILE,
    GeneratorManifest,
    GeneratorRun,
    SourceRecord,
    environment_record,
    plugin_records,
)
from loragen.core.run.loop import Interruption, RunSession, StepSeeds, Trial, fit, make_trainer
from loragen.core.run.resume import ResumePoint, restore_weights

log = logging.getLogger(__name__)

MIN_MIXTURE_ACCURACY = 0.8
"""Share of what collected adapters answer right that a mixture of others must answer, for `auto` to
stand for the decoder `mixture`: then a new dataset's adapter is mostly a mixture, too."""
LEARNED_ACCURACY = 0.05
"""Share of their own training rows below which collected adapters look as if they had learned
nothing. Long answers are seldom right word for word, so this is no more than a warning."""
IGNORED_ON_RESUME = (
    "trust_remote_code",
    "experiments_dir",
    "loggers",
    # The content of the sources is compared by hash, so their paths may differ.
    "sources",
    "val_sources",
    "data.checkpoint_dir",
    "data.prompts",
    "data.cache_tokenized",
    "data.cache_dir",
    "training.last_every",
    "behaviour.gradient_checkpointing",
    *HARDWARE,
)


def train(
    config: GenTrainConfig,
    progress: Progress,
    resume: "GeneratorPoint | None" = None,
    sources: Sources | None = None,
    trial: Trial | None = None,
) -> GeneratorRun:
    """Trains a generator on all sources, or resumes a run; `sources` are those of the
    configuration if they are open already; `trial` is that of a sweep.

    Nothing is written before the sources are known to fit. Raises UsageError or DataError for
    sources or settings that do not fit, UsageError if the run cannot be resumed, Interrupted on
    Ctrl+C, once the step is saved.
    """
    # Setup: the sources, the generator, the objectives and the trainer.
    quiet_libraries()
    if resume:
        if is_first_process():
            resume.acquire()
        config = resume.resumed(config)
    else:
        check_writable(Path(config.experiments_dir))
    plan = make_plan(config, sources or open_sources(config))
    config = with_found_sources(plan)
    log.info("%s; reading checkpoints and prompts", plan.summary())
    base = training_base(plan, resume) if plan.needs_base else None
    encoder: Encoder = create("encoder", config.encoder.name, config.encoder.options)
    tokenizer = base.tokenizer if base else None
    if base:
        then = resume.manifest if resume else None
        set_chat_date(tokenizer, then.chat_date or then.started if then else "")
        set_template_kwargs(tokenizer, template_kwargs(plan))
    with source_arrays(plan, encoder, tokenizer) as (arrays, val_arrays):
        statistics = Statistics.of(plan, arrays, encoder)
        if plan.tries_mixture and base:
            config = with_decoder_tried(plan, config, arrays, encoder, statistics, base)
        manifest = new_manifest(plan, config, [*arrays, *val_arrays], encoder, base)
        if resume:
            resume.check(config, manifest)
        generator = new_generator(plan, config, arrays, encoder, statistics)
        data = training_data(config, generator, arrays, val_arrays, base)
        phases = data.phases
        selection = select_by(
            phases.last.objective.metric, bool(data.sources_with_val_texts), bool(val_arrays)
        )
        manifest.max_steps, manifest.selection_metric = phases.total, selection.metric or ""
        generator.provenance = _provenance(manifest, selection, phases)
        trainable = None if encoder.frozen else encoder
        module = GeneratorModule(generator.network, phases, config.training, encoder=trainable)
        parent, interruption = Path(config.experiments_dir), Interruption()
        session = RunSession(
            parent, "lora_generator", "generator", config, manifest, progress, resume, trial
        )
        metrics = GeneratorMetrics(session, phases)
        checkpoints = GeneratorCheckpoints(
            session,
            generator,
            selection,
            phases,
            interruption,
            val_every=data.val_every,
            last_every=config.training.last_every,
        )
        callbacks = [session, StepSeeds(config.seed), Averaging(), metrics, checkpoints]
        trainer = build_trainer(config, data, callbacks)
        if resume:
            resume.restore(trainer, module)

        # Fit.
        log.info("%s", phases)
        progress.training_started("generator", phases.total)
        with session, interruption.handle_signals():
            fit(trainer, module, data)

            # Save the step that validation has chosen.
            manifest.steps, manifest.metrics = trainer.global_step, metrics.latest
            manifest.kept_step = checkpoints.best_step or trainer.global_step
            generator.provenance = _provenance(manifest, selection, phases)
            if checkpoints.best:
                restore_weights(module, load_weights_only(checkpoints.best))
            set_trained_weights(generator, module, arrays)
            if trainer.is_global_zero:
                generator.save(session.directory / GENERATOR_FILE)
        return GeneratorRun(session.directory, manifest)


def build_trainer(
    config: GenTrainConfig, data: TrainingData, callbacks: Sequence[Callback]
) -> Trainer:
    """Returns Lightning's trainer for all phases, which it sees as one epoch.

    Raises UsageError if its processes cannot share a micro-batch of every phase.
    """
    options = config.trainer.model_dump(exclude={"limit_train_batches"})  # phases apply it
    val_batches = options.pop("limit_val_batches") or 1.0
    accumulation, val_every = config.trainer.accumulate_grad_batches, data.val_every
    trainer = make_trainer(
        options,
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        max_steps=data.phases.total,
        max_epochs=1,
        check_val_every_n_epoch=None,  # val_check_interval counts all batches, resumed or not
        val_check_interval=val_every * accumulation if val_every else None,
        limit_val_batches=val_batches if val_every else 0,
    )
    for phase in data.phases:
        phase.objective.batches(0, trainer.world_size)
    return trainer


def set_trained_weights(
    generator: Generator, module: GeneratorModule, arrays: Sequence[SourceArrays]
) -> None:
    """Gives a generator the weights of its training, in float32."""
    modules = module.eval_modules.eval().float()
    generator.network = cast(Network, modules["network"])
    if "encoder" in modules:
        encoder: Any = modules["encoder"]
        generator.encoder_state = encoder.state_dict()
        generator.encoder_fingerprint = encoder.fingerprint
        generator.familiarity = Familiarity.fit(embedded(encoder, arrays))


def training_base(plan: Plan, resume: "GeneratorPoint | None") -> LanguageModel:
    """Returns the base in the dtype that `lora train` would choose for it. A resumed run keeps its
    dtype, since the choice depends on the hardware. Other weights than those that the adapters were
    trained on are warned of."""
    config = plan.config
    settings = LoraTrainConfig(
        base_model=config.behaviour.base_model or plan.base_model,
        trust_remote_code=config.trust_remote_code,
    )
    settings.trainer.accelerator = config.trainer.accelerator
    dtype = (resume.manifest.base_dtype if resume else "") or "auto"
    base = load_training_base(settings.model_copy(update={"base_dtype": dtype}))
    others = [s.name for s in plan.sources if s.base_fingerprint not in ("", base.fingerprint)]
    if others:
        log.warning(
            "the base model %s has other weights than the one that the adapters of %s were "
            "trained on",
            base.name,
            listing(others, 3),
        )
    return base


def template_kwargs(plan: Plan) -> dict[str, Any]:
    """Returns what the chat template was given in the training of the collected adapters.

    Raises UsageError if it was not the same in all of them.
    """
    known = [
        (source.name, source.chat_template_kwargs)
        for source in plan.sources
        if source.chat_template_kwargs is not None
    ]
    name, first = known[0] if known else ("", {})
    for other, kwargs in known:
        if kwargs != first:
            raise UsageError(
                f"the chat template was given {first} in the training of {name}, and {kwargs} in "
                f"that of {other}: train them alike"
            )
    return first or {}


def check_labels(plan: Plan) -> None:
    """Tokenises labelled rows as the training will before its first step. Raises as that does."""
    config = plan.config
    base = config.behaviour.base_model or plan.base_model
    tokenizer = load_tokenizer(base, config.trust_remote_code)
    set_template_kwargs(tokenizer, template_kwargs(plan))
    for source in plan.sources:
        labelled_rows(source, [], tokenizer, config.behaviour.max_length, config.seed)


@dataclass(frozen=True)
class Statistics:
    """What is computed from all checkpoints and prompts before a generator exists."""

    normalization: Normalization
    condition_scale: tuple[Tensor, Tensor]
    familiarity: Familiarity | None

    @classmethod
    def of(cls, plan: Plan, sources: Sequence[SourceArrays], encoder: Encoder) -> "Statistics":
        return cls(
            Normalization.fit(plan.layout, [source.tokens for source in sources]),
            condition_scale((texts, mask) for _, texts, mask in embedded(encoder, sources)),
            Familiarity.fit(embedded(encoder, sources)),
        )


def new_generator(
    plan: Plan,
    config: GenTrainConfig,
    sources: Sequence[SourceArrays],
    encoder: Encoder,
    statistics: Statistics,
) -> Generator:
    """Returns a generator before its first step, initialised from the collected adapters."""
    normalization, collected = statistics.normalization, None
    decoder, scale = config.decoder, statistics.condition_scale
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = new_network(decoder.name, decoder.options, encoder.dim, plan.layout, scale)
        if isinstance(network.decoder, Transfers):
            normalization = normalization.without_mean()
            adapters = [source.mean for source in sources if source.mean is not None]
            collected = Collected(adapters, normalization.scale)
            network.decoder.use_adapters(collected)
        if isinstance(network.decoder, StartsFromSamples):
            collections = [source.tokens for source in sources]
            network.decoder.start_from(AdapterSamples(collections, normalization))
    return Generator(
        encoder=Choice(config.encoder.name, config.encoder.options),
        encoder_fingerprint=encoder.fingerprint,
        decoder=Choice(decoder.name, decoder.options),
        condition_dim=encoder.dim,
        layout=plan.layout,
        normalization=normalization,
        adapter_config=plan.sources[0].adapter_config,
        base_model=plan.base_model,
        samples_per_prompt=config.data.samples_per_prompt,
        prompts_per_condition=config.data.prompts_per_condition,
        network=network,
        collected=collected,
        familiarity=statistics.familiarity,
    )


def training_data(
    config: GenTrainConfig,
    generator: Generator,
    sources: Sequence[SourceArrays],
    val_sources: Sequence[SourceArrays],
    base: LanguageModel | None,
) -> TrainingData:
    """Returns the data of the training of a generator, with its phases."""
    scales = generator.layout, generator.normalization, generator.adapter_config
    data = TrainingData(config, *scales, sources, val_sources, base)
    data.phases = make_phases(config, data)
    return data


def with_decoder_tried(
    plan: Plan,
    config: GenTrainConfig,
    sources: Sequence[SourceArrays],
    encoder: Encoder,
    statistics: Statistics,
    base: LanguageModel,
) -> GenTrainConfig:
    """Returns the configuration with the decoder `mixture`, if its adapters of left-out datasets
    answer at least `MIN_MIXTURE_ACCURACY` of what the collected ones do; otherwise as it is."""
    mixture = config.model_copy(update={"decoder": default_decoder(MIXTURE)})
    generator = new_generator(plan, mixture, sources, encoder, statistics)
    objective = training_data(mixture, generator, sources, [], base).phases.last.objective
    if isinstance(objective, Transfer):
        device = torch.device("cpu") if config.trainer.accelerator == "cpu" else best_device()
        objective.to(device)
        predicted, collected = objective.accuracy_on_left_out(generator.network.to(device))
        log.info(
            "training rows answered right: %.1f%% with a mixture of the other datasets' adapters, "
            "%.1f%% with the dataset's own",
            100 * predicted,
            100 * collected,
        )
        if collected < LEARNED_ACCURACY:
            log.warning(
                "the collected adapters answer %.1f%% of their own training rows right, and a "
                "generated one can hardly do better; unless answers are long texts, train them for "
                "more steps or at higher learning rates",
                100 * collected,
            )
        if predicted >= MIN_MIXTURE_ACCURACY * collected > 0:
            config = mixture
    log.info("decoder: %s", config.decoder.name)
    return config


def new_manifest(
    plan: Plan,
    config: GenTrainConfig,
    arrays: Sequence[SourceArrays],
    encoder: Encoder,
    base: LanguageModel | None,
) -> GeneratorManifest:
    """Returns the manifest of a training that has not begun."""
    return GeneratorManifest(
        base_model=plan.base_model,
        sources=[str(s.checkpoints[0].parent.absolute()) for s in plan.sources],
        val_sources=[str(s.checkpoints[0].parent.absolute()) for s in plan.val_sources],
        base_fingerprint=base.fingerprint if base else "",
        base_dtype=dtype_name(base.model.dtype) if base else "",
        trust_remote_code=bool(base and base.trust_remote_code),
        chat_date=chat_date(base.tokenizer) if base else "",
        chat_template_kwargs=template_kwargs(plan),
        source_records=[source.record for source in arrays if source.record],
        encoder_fingerprint=encoder.fingerprint,
        environment=environment_record(),
        plugins=plugin_records(
            {
                "encoder": [config.encoder.name],
                "decoder": [config.decoder.name],
                "schedule": [config.schedule.name],
                "logger": list(config.loggers),
                "objective": config.training.phases,
            }
        ),
    )


def _provenance(
    manifest: GeneratorManifest, selection: Selection, phases: Phases
) -> dict[str, Any]:
    """Returns the description of the training in the generator's file."""
    fields = manifest.model_dump(
        mode="json", exclude={"status", "seconds", "logger_run_ids", "trial"}
    )
    return {**fields, "trained_for": str(phases), "chosen_by": selection.sentence}


class GeneratorPoint(ResumePoint[GeneratorManifest, GenTrainConfig]):
    """A run of `gen train`, and the checkpoint from which it resumes."""

    kind, ignored_on_resume = GeneratorManifest, IGNORED_ON_RESUME

    def resumed(self, config: GenTrainConfig) -> GenTrainConfig:
        """Returns the configuration with the objective and the decoder that `auto` stood for when
        the run began, since the files on this machine may have changed."""
        given = config.training.objective
        objective = self.config.training.objective if given == AUTO else given
        if config.decoder.name == AUTO:
            config = config.model_copy(update={"decoder": self.config.decoder})
        return with_method(config, objective)

    def differences(self, config: GenTrainConfig) -> list[str]:
        return super().differences(self.resumed(config))

    def changed_inputs(self, config: GenTrainConfig, manifest: GeneratorManifest) -> list[str]:
        then, problems = self.manifest, []
        if then.encoder_fingerprint not in ("", manifest.encoder_fingerprint):
            problems.append(f"the encoder {config.encoder.name} has other weights")
        if then.base_fingerprint not in ("", manifest.base_fingerprint):
            problems.append("the base model has other weights")
        if then.source_records:
            problems += _other_sources(then.source_records, manifest.source_records)
        return problems


def with_found_sources(plan: Plan) -> GenTrainConfig:
    """Returns the configuration with all sources that were found, by their absolute paths.

    A run can then be resumed from another working directory, and learns from the same sources even
    if more were added to a folder of runs.
    """

    def absolute(source: TrainingSource) -> SourceSection:
        kind = "run" if source.section.run is not None else "checkpoints"
        paths = {kind: str(source.directory)}
        if source.section.prompts is not None:
            paths["prompts"] = str(source.prompts_from)
        return source.section.model_copy(update=paths)

    config = plan.config.model_copy(deep=True)
    config.sources = [absolute(source) for source in plan.sources]
    config.val_sources = [absolute(source) for source in plan.val_sources]
    config.data.checkpoint_dir = None
    if config.behaviour.base_model:
        config.behaviour.base_model = absolute_base(config.behaviour.base_model)
    if config.data.prompts is not None:
        config.data.prompts = str(Path(config.data.prompts).absolute())
    return config


def _other_sources(then: list[SourceRecord], now: list[SourceRecord]) -> list[str]:
    names = [[(one.name, one.held_out) for one in records] for records in (then, now)]
    if names[0] != names[1]:
        before, after = (", ".join(name for name, _ in one) for one in names)
        return [f"the sources are {after}, the run has {before} (order and roles count)"]
    problems = []
    for old, new in zip(then, now, strict=True):
        if old.checkpoints != new.checkpoints:
            problems.append(f"{new.name} has other checkpoints")
        if old.prompts != new.prompts:
            problems.append(f"{new.name} has other prompts")
        if old.labels not in ("", new.labels):
            problems.append(f"{new.name} has other labelled rows, or they make other tokens")
    return problems
