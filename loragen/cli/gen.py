"""`loragen gen`: train a generator, generate adapters with it, evaluate them."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import completion, options, render
from loragen.core.errors import UsageError, counted

if TYPE_CHECKING:
    from loragen.core.config import Override
    from loragen.core.evaluation.targets import PromptsFrom
    from loragen.core.generator.network import DecoderSummary
    from loragen.core.learning.plan import Plan

app = typer.Typer(no_args_is_help=True, help="Train a generator, and generate adapters.")

MAX_WARNINGS = 3
"""The most warnings that are printed; the others are counted."""


class Format(StrEnum):
    """The formats of an adapter."""

    peft = "peft"
    safetensors = "safetensors"
    pt = "pt"


class PromptOrigin(StrEnum):
    """The rows of an evaluated dataset whose prompts the generator reads."""

    train = "train"
    tested = "tested"


CheckpointDirs = Annotated[
    list[str] | None,
    typer.Option(
        "--checkpoint-dir",
        help="A run of lora train (or its checkpoints/), a folder of runs, a library of "
        "adapters, or any of them on the hub: hf://owner/name. Repeatable.",
        autocompletion=completion.runs,
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option("--prompts", help="A directory of data prepare; default: the runs' own datasets."),
]


def generator_flags(
    checkpoint_dir: list[str] | None,
    prompts: str | None,
    trust_remote_code: bool,
    steps: int | None = None,
) -> "list[Override]":
    """Returns the settings that the options of a training give; `steps` are those of --test-mode,
    of each phase."""
    from loragen.core.config import Override

    given = [
        (("data", "checkpoint_dir"), checkpoint_dir or None, "--checkpoint-dir"),
        (("data", "prompts"), prompts, "--prompts"),
        (("trust_remote_code",), trust_remote_code or None, "--trust-remote-code"),
        (("training", "max_steps"), steps, "--test-mode"),
        (("behaviour", "max_steps"), steps, "--test-mode"),
    ]
    return [Override(*one) for one in given if one[1] is not None]


@app.command("train")
def gen_train(
    config: options.ConfigFile = None,
    checkpoint_dir: CheckpointDirs = None,
    prompts: Prompts = None,
    trust_remote_code: options.TrustRemoteCode = False,
    resume: options.Resume = None,
    test_mode: Annotated[
        bool,
        typer.Option("--test-mode", help="Train six steps of each phase, as a smoke test."),
    ] = False,
    dry_run: options.DryRun = False,
    settings: options.Settings = None,
    json: options.Json = False,
) -> None:
    """Train a generator on collected adapters and the prompts of their datasets.

    Prints the experiment directory; the generator is results/final_model/generator_model.pt.
    """
    from loragen.core.config import GenTrainConfig, dump, load
    from loragen.core.learning.sources import check_sources, open_sources
    from loragen.core.run.directory import CONFIG, TEST_MODE_STEPS, GeneratorManifest, Run

    steps = TEST_MODE_STEPS[-1] if test_mode else None
    flags = generator_flags(checkpoint_dir, prompts, trust_remote_code, steps)
    run = Run.open(resume, GeneratorManifest) if resume else None
    file = config or (run.directory / CONFIG if run else None)
    resolved = options.with_old_files(
        GenTrainConfig,
        file,
        lambda given: load(GenTrainConfig, given, settings or (), flags, check=check_sources),
    )
    sources = open_sources(resolved, test_mode)
    sources.report()

    from loragen.core.learning.plan import make_plan
    from loragen.core.learning.train import GeneratorPoint, check_labels, train

    found = GeneratorPoint.find(resume, to_write=not dry_run) if resume else nullcontext()
    with found as point:
        if point:
            resolved = point.resumed(resolved)
            point.check(resolved)  # before the sources are read
        if dry_run:
            work = make_plan(resolved, sources)
            if work.needs_base:
                check_labels(work)
            render.note(work.summary())
            decoder = _decoder_summary(work)
            if json:
                render.answer_json(
                    {"config": work.config.model_dump(), "decoder": decoder.as_dict()}
                )
            else:
                render.note(decoder_text(decoder))
                render.answer(dump(work.config).rstrip())
            return
        if point and point.is_finished(resolved):
            render.note(f"{point.directory}: finished at step {point.step}; nothing is left to do")
            directory, manifest = point.directory, point.manifest
        else:
            from loragen.cli.progress import terminal_progress

            if point:
                name = point.checkpoint.name if point.checkpoint else "no checkpoint"
                render.note(f"{point.directory}: found {name}; {point.step} steps are done")
            trained = train(resolved, terminal_progress(), point, sources)
            directory, manifest = trained.directory, trained.manifest
        document = {"run": str(directory), **manifest.model_dump()}
        render.answer_either(json, document, str(directory))


@app.command("infer")
def gen_infer(
    model: options.GeneratorPath,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="A prompt of the dataset. Repeatable.")
    ] = None,
    prompt_file: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt-file",
            help="Prompts: .txt (one per line), or rows or hub:owner/name as for lora train. "
            "Repeatable.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A directory (PEFT), or a .safetensors or .pt file; with --per, the directory "
            "of all of them. Default: a new directory in generated/.",
        ),
    ] = None,
    per: Annotated[
        str | None,
        typer.Option(
            "--per",
            metavar="line|FIELD",
            help="One adapter per prompt (line), or per value of a field of the rows.",
        ),
    ] = None,
    file_format: Annotated[
        Format | None,
        typer.Option("--format", help="With --per: the format of each adapter. Default: peft."),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write whole Hugging Face models: base and adapter merged."),
    ] = False,
    base_model: options.BaseModelName = None,
    trust_remote_code: options.TrustRemoteCode = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Read only the first N prompts.")
    ] = None,
    draws: Annotated[
        int,
        typer.Option("--draws", min=1, help="Average the adapters of N random draws of prompts."),
    ] = 1,
    prompts_per_draw: Annotated[
        int | None,
        typer.Option(
            "--prompts-per-draw",
            min=1,
            help="The prompts of a draw. Default: as in training, at most half of all.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Generate a LoRA adapter from a few unlabelled prompts of a dataset, without training.

    A directory loads with `peft.PeftModel.from_pretrained(base, DIR)`; only --merge needs the base
    model. Warns of prompts that are far from all training datasets.
    """
    from loragen.core.data.documents import parsed_source
    from loragen.core.generator.requests import FILE_SUFFIXES, check_draws, requests
    from loragen.core.hub import check_push
    from loragen.core.run.directory import generator_file

    file = generator_file(model)
    if base_model and not merge:
        raise UsageError("--base-model: only --merge needs a base model; leave it out")
    wanted = requests(prompt or (), [parsed_source(one) for one in prompt_file or ()], per, limit)
    names = [one.name for one in wanted]
    if push_to_hub:
        if per or (output and output.suffix in FILE_SUFFIXES):
            raise UsageError("--push-to-hub: it pushes one directory; leave out --per and a suffix")
        check_push(push_to_hub)
    inputs = [file, *(prompt_file or ()), *([base_model] if base_model else [])]
    paths = _output_paths(names, output, per, file_format, merge, force, inputs)
    for one in wanted:
        check_draws(len(one.prompts), draws, prompts_per_draw)

    from loragen.core.base.load import quiet_libraries
    from loragen.core.generator.generated import Merger
    from loragen.core.generator.model import Generator

    quiet_libraries()
    generator = Generator.load(file)
    merger = Merger(base_model or generator.base_model, trust_remote_code) if merge else None
    _ = generator.text_encoder  # loaded now, so that its time does not count
    documents: list[dict[str, Any]] = []
    for one, path in zip(wanted, paths, strict=True):
        started = perf_counter()
        adapter = generator.generate(one.prompts, draws, prompts_per_draw, seed)
        if merger:
            merger.save(adapter, path, force)
        else:
            adapter.save(path, force)
        documents.append(
            {
                "adapter": str(path),
                "values": generator.layout.values,
                "seconds": round(perf_counter() - started, 4),  # the files are written, too
                **asdict(adapter.origin),
                "warning": adapter.origin.warning(),
            }
        )
        if not json:
            render.answer(str(path))
    _note_far_prompts(documents)
    if push_to_hub:
        documents[0]["repository"] = options.push_output(paths[0], push_to_hub, private, merge)
    if json:
        # The keys of a single adapter also stand beside the list.
        render.answer_json({"adapters": documents, **({} if per else documents[0])})
        return
    count = sum(document["prompts"] for document in documents)
    seconds = sum(document["seconds"] for document in documents)
    adapters = "" if len(documents) == 1 else f"{len(documents)} adapters of "
    render.note(
        f"{adapters}{generator.layout.values:,} values from {counted(count, 'prompt')} "
        f"in {seconds:.3f} s"
    )


@app.command("eval")
def gen_eval(
    model: options.GeneratorPath,
    dataset: Annotated[
        list[str],
        typer.Option(
            "--dataset",
            help="A name under --data-root (its test split), a file or hub:owner/name. Repeatable.",
            autocompletion=completion.datasets,
        ),
    ],
    data_root: options.DataRoot = options.DATA_ROOT,
    base_model: options.BaseModelName = None,
    trust_remote_code: options.TrustRemoteCode = False,
    columns: Annotated[
        str | None,
        typer.Option("--columns", help="Only these columns, with commas: base,generated,..."),
    ] = None,
    multi_task: Annotated[
        bool, typer.Option("--multi-task", help="Add one LoRA trained on all training datasets.")
    ] = False,
    multi_task_steps: Annotated[
        int | None,
        typer.Option(
            "--multi-task-steps",
            min=1,
            help="The most steps of each of its trainings. Default: 4 times the collection's.",
        ),
    ] = None,
    best_single: Annotated[
        bool, typer.Option("--best-single", help="Add the best collected adapter, by tested rows.")
    ] = False,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Add a LoRA trained on each dataset's own labels.")
    ] = False,
    label_curve: Annotated[
        bool, typer.Option("--label-curve", help="Add LoRAs trained on 5 to 300 labelled rows.")
    ] = False,
    oracle_dir: Annotated[
        list[Path] | None,
        typer.Option(
            "--oracle-dir", help="A folder of runs that may hold oracles already. Repeatable."
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="The split on which named datasets are tested.")
    ] = "test",
    prompts_from: Annotated[
        PromptOrigin | None,
        typer.Option(
            "--prompts-from", help="Whose prompts are read. Default: train, if there is one."
        ),
    ] = None,
    draws: Annotated[
        int, typer.Option("--draws", min=2, help="Adapters per dataset, each from other prompts.")
    ] = 5,
    prompts: Annotated[
        int | None,
        typer.Option("--prompts", min=1, help="The prompts of a draw. Default: as in training."),
    ] = None,
    shots: Annotated[
        int, typer.Option("--shots", min=1, help="Labelled rows of the few_shot column.")
    ] = 4,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Evaluate only the first N rows of each.")
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the draws of prompts and of shots.")
    ] = 0,
    batch_size: options.EvalBatchSize = 32,
    choices: Annotated[
        bool,
        typer.Option(
            "--choices/--no-choices",
            help="Measure choice accuracy: a forward pass per row and choice.",
        ),
    ] = True,
    ignore_final_punctuation: options.IgnoreFinalPunctuation = False,
    skip_bad_rows: options.SkipBadRows = False,
    cache_dir: Annotated[
        Path,
        typer.Option("--cache-dir", help="The directory that keeps the adapters trained for it."),
    ] = Path(".loragen-cache"),
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="A directory for results.json, .md, .html and .png."),
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Compare generated adapters with baselines, on any datasets.

    The columns are base, few_shot, mean, nearest, ridge, arrow, generated, and the controls
    other_prompts and gibberish_prompts; multi_task, best_single, oracle and the label curve are
    added on demand. What is trained is trained once and kept. See docs/evaluating.md.
    """
    from loragen.cli.progress import terminal_progress
    from loragen.core.evaluation.contestants import (
        BEST_SINGLE,
        LABEL_CURVE,
        MULTI_TASK,
        ORACLE,
        choose,
    )
    from loragen.core.evaluation.report import results_record
    from loragen.core.evaluation.targets import check_oracles, find_targets
    from loragen.core.outputs import refuse_existing, refuse_input, writable_or_temporary
    from loragen.core.run.directory import experiment_name, generator_file

    demanded = (
        (multi_task, [MULTI_TASK]),
        (best_single, [BEST_SINGLE]),
        (oracle, [ORACLE]),
        (label_curve, LABEL_CURVE),
    )
    also = [name for wanted, names in demanded if wanted for name in names]
    contestants = choose((columns or "").split(","), also)
    file = generator_file(model)
    if output:
        refuse_input(output, [file, *dataset])
        refuse_existing(output, force, results_record)
    for folder in oracle_dir or ():
        if not folder.is_dir():
            raise UsageError(f"--oracle-dir: {folder}: no such directory")
    origins: dict[PromptOrigin, PromptsFrom] = {
        PromptOrigin.train: "train split",
        PromptOrigin.tested: "tested rows",
    }
    origin = origins[prompts_from] if prompts_from else None
    targets = find_targets(dataset, data_root, limit, skip_bad_rows, split, prompts_from=origin)
    if any(contestant.name in (ORACLE, *LABEL_CURVE) for contestant in contestants):
        check_oracles(targets)

    from loragen.core.evaluation.contest import evaluate_generator
    from loragen.core.evaluation.contestants import EvaluationOptions

    kept = (
        writable_or_temporary(cache_dir, "what is trained is not kept")
        if any(one.trains for one in contestants)
        else nullcontext(cache_dir)
    )
    with kept as cache:
        known = [] if cache == cache_dir else [cache_dir / "runs"]
        results = evaluate_generator(
            file,
            targets,
            contestants,
            options=EvaluationOptions(
                draws,
                prompts,
                shots,
                seed,
                batch_size,
                choices,
                ignore_final_punctuation,
            ),
            base_model=base_model,
            trust_remote_code=trust_remote_code,
            skip_bad_rows=skip_bad_rows,
            cache=cache,
            progress=terminal_progress(),
            strict=columns is not None,
            oracle_dirs=[*(oracle_dir or ()), *known],
            multi_task_steps=multi_task_steps,
        )
    if json:
        render.answer_json(results)
    else:
        print_results(results)
    if output:  # what it took minutes to compute is printed by now, whatever happens
        from loragen.core.evaluation.report import write_results

        title = f"{experiment_name(file)}: generated adapters and baselines"
        write_results(results, title, output)


def _note_far_prompts(documents: Sequence[Mapping[str, Any]]) -> None:
    """Prints warnings of prompts that are far from all training datasets."""
    far = [document for document in documents if document["warning"]]
    for document in far[:MAX_WARNINGS]:
        which = f"{document['adapter']}: " if len(documents) > 1 else ""
        render.note(f"warning: {which}{document['warning']}")
    if len(far) > MAX_WARNINGS:
        render.note(f"warning: and {len(far) - MAX_WARNINGS} more adapters of such prompts")


def print_results(results: Mapping[str, Any]) -> None:
    """Prints the tables of an evaluation and the remarks on them."""
    from loragen.core.evaluation.report import remarks, tables

    for table in tables(results):
        render.answer(render.columns(table.header, table.rows) + "\n")
    render.answer("\n".join(remarks(results)))


def decoder_text(decoder: "DecoderSummary") -> str:
    """Returns a table of a decoder's layers, its total size, and the reasons for its choices."""
    mib = 2**20
    rows: list[list[object]] = [["condition", _shape(decoder.condition), None, None]]
    for stage in decoder.stages:
        size = f"{stage.bytes / mib:.2f}"
        rows.append([stage.name, _shape(stage.shape), f"{stage.parameters:,}", size])
    table = render.columns(["decoder's step", "shape", "parameters", "MiB a pair"], rows)
    total = (
        f"{decoder.parameters:,} parameters, {decoder.trained:,} of them trained: "
        f"{decoder.weights_bytes / mib:,.0f} MiB; with gradients and Adam's moments "
        f"{decoder.training_bytes / mib:,.0f} MiB, and at least "
        f"{decoder.pair_bytes / mib:,.0f} MiB for every pair of a batch"
    )
    return "\n".join([table, total, *decoder.choices])


def _shape(sizes: tuple[int, ...]) -> str:
    return " x ".join(f"{size:,}" for size in sizes)


def _decoder_summary(work: "Plan") -> "DecoderSummary":
    """Returns the decoder's summary for conditions of the shape that the first source gives."""
    from loragen.core.base.load import quiet_libraries
    from loragen.core.data.prompts import joined_texts
    from loragen.core.generator.network import summarize_decoder
    from loragen.core.plugins import create

    quiet_libraries()
    data, encoder, decoder = work.config.data, work.config.encoder, work.config.decoder
    first = joined_texts(work.sources[0].prompts, data.samples_per_prompt)[:1]
    positions, dim = create("encoder", encoder.name, encoder.options)(first)[0].shape[1:]
    condition = (data.prompts_per_condition, positions, dim)
    datasets = len(work.sources)
    return summarize_decoder(decoder.name, decoder.options, work.layout, condition, datasets)


def _output_paths(
    names: Sequence[str],
    output: Path | None,
    per: str | None,
    file_format: Format | None,
    merge: bool,
    force: bool,
    inputs: Sequence[object],
) -> list[Path]:
    """Returns the path of each adapter. Raises UsageError if any of them cannot be written."""
    from loragen.core.generator.requests import (
        FILE_SUFFIXES,
        check_output,
        default_output,
        output_path,
    )
    from loragen.core.outputs import refuse_input

    if file_format and not per:
        raise UsageError("--format: it goes with --per; for one adapter, give --output a suffix")
    home = output or default_output()
    files = file_format not in (None, Format.peft)
    if merge and (files or home.suffix in FILE_SUFFIXES):
        raise UsageError("--merge: it writes directories, not files; name a directory")
    paths = [output_path(home, name, f".{file_format}" if files else "") for name in names]
    for path in paths:
        refuse_input(path, inputs)
        check_output(path, force, merge)
    return paths
