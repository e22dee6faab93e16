"""`loragen gen train`: learn a generator from collected adapters."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loragen.cli import render
from loragen.cli.options import ConfigFile, DryRun, Json, Settings

if TYPE_CHECKING:
    from loragen.core.config import GenTrainConfig
    from loragen.core.generator.stages import Anatomy
    from loragen.core.generator.training.plan import Plan
    from loragen.core.generator.training.resume import GeneratorPoint
    from loragen.core.generator.training.train import GeneratorRun


def train(
    config: ConfigFile = None,
    checkpoint_dir: Annotated[
        list[str] | None,
        typer.Option(
            "--checkpoint-dir",
            help="A run of lora train (or its checkpoints/), or a folder of runs. Repeatable.",
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", help="A directory of data prepare; else the runs' own datasets are read."
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            "--resume-from-checkpoint",
            help="Go on with a run, from its newest checkpoint or the one named.",
        ),
    ] = None,
    test_mode: Annotated[
        bool, typer.Option("--test-mode", help="Six steps of each phase: does it run?")
    ] = False,
    dry_run: DryRun = False,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Train a generator on collected adapters and the prompts of their datasets.

    Prints the experiment directory; the generator is results/final_model/generator_model.pt.
    """
    from loragen.core.config import GenTrainConfig, Override, dump, load
    from loragen.core.generator.collections.places import check_places
    from loragen.core.manifests import GeneratorManifest
    from loragen.core.runs import CONFIG, TEST_MODE_STEPS, resumable_run

    steps = TEST_MODE_STEPS[-1] if test_mode else None
    given = [
        (("data", "checkpoint_dir"), checkpoint_dir or None, "--checkpoint-dir"),
        (("data", "prompts"), prompts, "--prompts"),
        (("training", "max_steps"), steps, "--test-mode"),
        (("behaviour", "max_steps"), steps, "--test-mode"),
    ]
    flags = [Override(*one) for one in given if one[1] is not None]
    run = resumable_run(resume, GeneratorManifest) if resume else None
    file = config or (run / CONFIG if run else None)
    resolved = load(GenTrainConfig, file, settings or (), flags, early=check_places)

    from loragen.core.generator.training.plan import plan
    from loragen.core.generator.training.resume import check_settings, find_resume_point, settled

    point = find_resume_point(resume) if resume else None
    resolved = settled(point, resolved) if point else resolved
    if dry_run:
        if point:
            check_settings(point, resolved)
        work = plan(resolved)
        render.note(work.summary())
        decoder = _anatomy(work)
        if json:
            render.answer_json({"config": work.config.model_dump(), "decoder": decoder.document()})
        else:
            render.note(anatomy_text(decoder))
            render.answer(dump(work.config).rstrip())
        return
    made = _trained(resolved, point)
    if json:
        render.answer_json({"run": str(made.directory), **made.manifest.model_dump()})
    else:
        render.answer(str(made.directory))


def _trained(config: "GenTrainConfig", point: "GeneratorPoint | None") -> "GeneratorRun":
    """A new run, or the rest of one."""
    from loragen.cli.progress import terminal_progress
    from loragen.core.generator.training.resume import nothing_left
    from loragen.core.generator.training.train import GeneratorRun, train
    from loragen.core.progress import Silent

    if point and nothing_left(point, config):
        render.note(f"{point.directory}: finished at step {point.step}, nothing is left to do")
        return GeneratorRun(point.directory, point.manifest)
    if point:
        found = point.checkpoint.name if point.checkpoint else "no checkpoint"
        render.note(f"{point.directory}: found {found}; {point.step} steps are done")
    progress = terminal_progress() if render.is_first_process() else Silent()
    return train(config, progress, point)


def _anatomy(work: "Plan") -> "Anatomy":
    """Of the decoder, for conditions like those of the first source."""
    from loragen.core.data.prompts import joined
    from loragen.core.generator.stages import anatomy
    from loragen.core.plugins import create
    from loragen.core.quiet import quiet_libraries

    quiet_libraries()
    data, encoder = work.config.data, work.config.encoder
    first = joined(work.sources[0].prompts, data.samples_per_prompt)[:1]
    positions, dim = create("encoder", encoder.name, encoder.options)(first)[0].shape[1:]
    condition = (data.prompts_per_condition, positions, dim)
    decoder, transfers = work.config.decoder, work.config.training.objective == "transfer"
    return anatomy(decoder.name, decoder.options, work.layout, condition, transfers)


def anatomy_text(decoder: "Anatomy") -> str:
    """Every step of a decoder, what all of them need, and why they are as they are."""
    mib = 2**20
    rows: list[list[object]] = [["condition", _times(decoder.condition), None, None]]
    for one in decoder.stages:
        size = f"{one.bytes / mib:.2f}"
        rows.append([one.name, _times(one.shape), f"{one.parameters:,}", size])
    table = render.columns(["decoder's step", "shape", "parameters", "MiB a pair"], rows)
    total = (
        f"{decoder.parameters:,} parameters, {decoder.trained:,} of them trained: "
        f"{decoder.weights_bytes / mib:,.0f} MiB; with gradients and Adam's moments "
        f"{decoder.training_bytes / mib:,.0f} MiB, and at least "
        f"{decoder.pair_bytes / mib:,.0f} MiB for every pair of a batch"
    )
    return "\n".join([table, total, *decoder.choices])


def _times(shape: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in shape)
