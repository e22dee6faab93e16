"""`loragen lora`: train LoRA adapters, evaluate one, export it."""

import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from loragen.cli import completion, options, render
from loragen.core.adapter import Server
from loragen.core.errors import DataError, Interrupted, LoragenError, UsageError, counted
from loragen.core.progress import is_first_process

if TYPE_CHECKING:
    from loragen.core.config import LoraTrainConfig, Override
    from loragen.core.lora.tasks import Task, TaskOutcome


app = typer.Typer(no_args_is_help=True, help="Train LoRA adapters, evaluate one, export it.")


Datasets = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        help="A name under --data-root, a file, or hub:owner/name. Repeatable.",
        autocompletion=completion.datasets,
    ),
]
BatchSize = Annotated[int | None, typer.Option("--batch-size", help="Rows per optimizer step.")]
RunsDir = Annotated[
    Path | None, typer.Option("--runs-dir", help="The directory of the run directories.")
]
TrackBatches = Annotated[
    bool,
    typer.Option("--track-batches", help="Write which rows each checkpoint was trained on."),
]


def lora_flags(
    base_model: str | None,
    trust_remote_code: bool,
    data_root: Path | None,
    skip_bad_rows: bool,
    batch_size: int | None,
    runs_dir: Path | None,
    track_batches: bool,
    launcher: str | None = None,
) -> "list[Override]":
    """Returns the settings that the options of a training give."""
    from loragen.core.config import Override

    given = [
        (("base_model",), base_model, "--base-model"),
        (("trust_remote_code",), trust_remote_code or None, "--trust-remote-code"),
        (("data", "root"), str(data_root) if data_root else None, "--data-root"),
        (("data", "skip_bad_rows"), skip_bad_rows or None, "--skip-bad-rows"),
        (("training", "batch_size"), batch_size, "--batch-size"),
        (("runs_dir",), str(runs_dir) if runs_dir else None, "--runs-dir"),
        (("track_batches",), track_batches or None, "--track-batches"),
        (("launcher", "name"), launcher, "--launcher"),
    ]
    return [Override(*one) for one in given if one[1] is not None]


@app.command("train")
def lora_train(
    dataset: Datasets = None,
    every: Annotated[bool, typer.Option("--all", help="Every dataset below --data-root.")] = False,
    config: options.ConfigFile = None,
    base_model: options.BaseModelName = None,
    trust_remote_code: options.TrustRemoteCode = False,
    data_root: options.OtherDataRoot = None,
    skip_bad_rows: options.SkipBadRows = False,
    batch_size: BatchSize = None,
    runs_dir: RunsDir = None,
    test_mode: Annotated[
        bool,
        typer.Option(
            "--test-mode", help="Train six steps with three checkpoints, as a smoke test."
        ),
    ] = False,
    track_batches: TrackBatches = False,
    resume: options.Resume = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train again what has been trained already.")
    ] = False,
    launcher: Annotated[
        str | None,
        typer.Option(
            "--launcher", help="local, or ray: train the datasets as tasks of a Ray cluster."
        ),
    ] = None,
    dry_run: options.DryRun = False,
    settings: options.Settings = None,
    json: options.Json = False,
) -> None:
    """Train one LoRA adapter per dataset, in two stages, and keep the checkpoints of stage 2.

    Needs nothing but --dataset. Prints the run directory of each dataset. A dataset that has been
    trained already is skipped, and one that fails does not stop the others.
    """
    from loragen.core.config import DEMO, LoraTrainConfig, load
    from loragen.core.lora.tasks import find_tasks
    from loragen.core.run.directory import CONFIG, TEST_MODE_STEPS, LoraManifest, Run

    flags = lora_flags(
        base_model,
        trust_remote_code,
        data_root,
        skip_bad_rows,
        batch_size,
        runs_dir,
        track_batches,
        launcher,
    )
    wanted = dataset or []
    if resume and (every or len(wanted) > 1 or launcher == "ray"):
        raise UsageError(
            "--resume: only one run is resumed; give one dataset at most, and no launcher"
        )
    run = Run.open(resume, LoraManifest) if resume else None
    file = config or (run.directory / CONFIG if run else None)
    resolved = options.with_old_files(
        LoraTrainConfig,
        file,
        lambda given: load(LoraTrainConfig, given, settings or (), flags),
    )
    if test_mode:
        first, *_, last = TEST_MODE_STEPS
        resolved.training.max_steps = last
        resolved.checkpoints.first_step = first
        if "stage1_steps" in resolved.schedule.options:
            steps = {"stage1_steps": first - 1}
            resolved.schedule = resolved.schedule.model_copy(update=steps)
    if run and not wanted:
        if not run.manifest.dataset.path:  # a converted run
            raise UsageError(f"{run.directory}: the dataset is not recorded; give --dataset FILE")
        wanted = [run.manifest.dataset.path]
    chosen = find_tasks(resolved, wanted, every)
    rate = resolved.schedule.options.get("learning_rate_stage1", 1.0)
    if resolved.base_model == DEMO and rate <= 1e-4:
        render.note(
            "warning: the base of the demo learns next to nothing at this learning rate; "
            "add --set schedule.learning_rate_stage1=2e-3 --set schedule.learning_rate_stage2=2e-4 "
            "--set lora.alpha=32"
        )
    if dry_run:
        _dry_run(resolved, chosen, resume, json)
    elif resume:
        _report([_resume(resolved, chosen[0], resume)], json)
    else:
        from loragen.cli.progress import terminal_progress
        from loragen.core.lora.collect import collect

        _report(collect(resolved, chosen, terminal_progress(), force), json)


@app.command("eval")
def lora_eval(
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            help="A name under --data-root (its test split), a file, or hub:owner/name.",
            autocompletion=completion.datasets,
        ),
    ],
    adapter: Annotated[
        str | None,
        typer.Option(
            "--adapter",
            help="A PEFT directory, a run, a .ckpt of one, a file of gen infer, or "
            "hf://owner/name.",
            autocompletion=completion.runs,
        ),
    ] = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="Evaluate the base model without an adapter.")
    ] = False,
    base_model: options.BaseModelName = None,
    trust_remote_code: options.TrustRemoteCode = False,
    data_root: options.DataRoot = options.DATA_ROOT,
    skip_bad_rows: options.SkipBadRows = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Evaluate only the first N rows.")
    ] = None,
    batch_size: options.EvalBatchSize = 32,
    ignore_final_punctuation: options.IgnoreFinalPunctuation = False,
    chat_template_kwargs: options.TemplateKwargs = None,
    show_lm_eval: Annotated[
        bool,
        typer.Option(
            "--show-lm-eval",
            help="Evaluate nothing: print how lm-evaluation-harness evaluates base and adapter.",
        ),
    ] = False,
    json: options.Json = False,
) -> None:
    """Evaluate an adapter, or the base without one, on labelled rows.

    Reports the exact match of the greedy answer and the mean loss of the responses' tokens (nats);
    and choice accuracy by log-likelihood if rows have choices or the dataset has a closed set of
    answers.
    """
    from loragen.core.data.dataset import Dataset
    from loragen.core.hub import local_path

    if (adapter is None) == (not no_adapter):
        raise UsageError("give either --adapter DIR|CKPT or --no-adapter")
    place = local_path(adapter) if adapter else None
    if place and not place.exists():
        raise UsageError(f"{adapter}: no such adapter or checkpoint")
    kwargs = options.parsed_template_kwargs(chat_template_kwargs)
    if show_lm_eval:
        from loragen.core.lora.evaluate import lm_eval_commands

        name = Dataset.find(dataset, data_root, split="test").name
        commands = lm_eval_commands(name, place, base_model, batch_size, limit, trust_remote_code)
        render.answer_either(json, {"commands": commands}, "\n".join(commands))
        return
    tested = Dataset.find(dataset, data_root, split="test")
    rows = tested.rows(skip_bad_rows)[:limit]

    from loragen.core.adapter.export import tokenizer_of
    from loragen.core.adapter.files import attach_adapter
    from loragen.core.base.load import best_device, load_base
    from loragen.core.data.chat import set_template_kwargs
    from loragen.core.data.tokenize import usable_rows
    from loragen.core.lora.evaluate import evaluate_model
    from loragen.core.run.checkpoints import read_checkpointed_adapter

    read = read_checkpointed_adapter(place) if place else None
    base_name = base_model or (read.config.get("base_model_name_or_path") if read else None)
    if not base_name:
        raise UsageError("--base-model: no base model is recorded; give one")
    base = load_base(base_name, trust_remote_code=trust_remote_code)
    tokenizer = tokenizer_of(read, base) if read else base.tokenizer
    if kwargs is None:
        kwargs = read.chat_template_kwargs if read else {}
    set_template_kwargs(tokenizer, kwargs)
    rows = usable_rows(tokenizer, tested, rows, skip_bad_rows)
    base.model.to(best_device())
    model = attach_adapter(base.model, read, str(adapter)) if read else base.model
    scores = evaluate_model(
        model,
        tokenizer,
        rows,
        batch_size,
        closed=tested.closed_answers or [],
        ignore_final_punctuation=ignore_final_punctuation,
    )
    if not isfinite(scores.loss):
        raise LoragenError(
            f"{adapter or base_name}: the model's loss is {scores.loss} in {base.model.dtype}"
        )
    document = {
        "dataset": tested.name,
        "file": str(tested),
        "base_model": base_name,
        "adapter": adapter,
        **scores.as_dict(),
    }
    text = render.columns(("measure", "value"), list(document.items()))
    render.answer_either(json, document, text)


@app.command("export")
def lora_export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="A run, a .ckpt of one, a PEFT directory, any file with LoRA in it, or "
            "hf://owner/name.",
            autocompletion=completion.runs,
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The directory to write; with --push-to-hub it may be left out."
        ),
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge", help="Write a whole Hugging Face model instead of an adapter."),
    ] = False,
    base_model: options.BaseModelName = None,
    trust_remote_code: options.TrustRemoteCode = False,
    alpha: options.Alpha = None,
    server: Annotated[
        Server | None,
        typer.Option(
            "--for",
            help="Write the form that this server computes as PEFT does, or say why there is none.",
        ),
    ] = None,
    license_id: options.License = None,
    push_to_hub: options.PushToHub = None,
    private: options.Private = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Write an adapter, or its base with the adapter merged in, for use without loragen.

    An adapter loads with `peft.PeftModel.from_pretrained(base, DIR)`; a merged model, in the base's
    own dtype and with its tokenizer, with `AutoModelForCausalLM.from_pretrained(DIR)`. What a
    server would refuse or scale wrongly is said. See docs/serving.md.
    """
    from loragen.core.adapter import refuse_existing_adapter
    from loragen.core.hub import check_push, local_path
    from loragen.core.outputs import refuse_input

    if output is None and push_to_hub is None:
        raise UsageError("nothing to write: give --output DIR, --push-to-hub OWNER/NAME, or both")
    if server and merge:
        raise UsageError("--for: it is about adapters; every server takes a merged model")
    source = local_path(checkpoint)
    if not source.exists():
        raise UsageError(f"{checkpoint}: no such adapter or checkpoint")
    if output:
        refuse_input(output, [source, *([base_model] if base_model else [])])
        refuse_existing_adapter(output, force, merge)
    if push_to_hub:
        check_push(push_to_hub)

    from loragen.core.adapter.export import export_adapter, export_merged, prepare_export
    from loragen.core.adapter.serving import for_server, serve_command, server_notes
    from loragen.core.run.checkpoints import is_run_or_adapter, read_checkpointed_adapter

    if is_run_or_adapter(source):
        adapter = read_checkpointed_adapter(source)
    else:
        from loragen.legacy.adapters import read_lone_adapter

        adapter = read_lone_adapter(source, base_model, alpha, trust_remote_code)
    adapter = prepare_export(adapter, source, base_model, alpha)
    if server:
        adapter = for_server(adapter, server)
    elif not merge:
        for line in server_notes(adapter):
            render.note(line)
    with nullcontext(output) if output else TemporaryDirectory() as folder:
        directory = output or Path(str(folder)) / str(push_to_hub).rpartition("/")[2]
        if merge:
            export_merged(adapter, source, directory, trust_remote_code, license_id)
        else:
            export_adapter(adapter, source, directory, license_id)
        url = options.push_output(directory, push_to_hub, private, merge) if push_to_hub else None
    base = adapter.config["base_model_name_or_path"]
    if server:
        place = str(output or push_to_hub)
        render.note(serve_command(server, base, place, adapter.config["r"]))
    document = {
        "output": str(output) if output else None,
        "kind": "merged" if merge else "adapter",
        "base_model": base,
        "checkpoint": checkpoint,
        "repository": url,
    }
    render.answer_either(json, document, str(output or url))


# ---- train


def _dry_run(
    config: "LoraTrainConfig", tasks: "Sequence[Task]", resume: Path | None, json: bool
) -> None:
    """Checks everything that can be checked without training, and prints the configuration.

    Reads every file, tokenises the rows that training would tokenise before its first step, and
    builds the adapter without weights. Raises DataError for bad files, all at once; UsageError if
    the adapter does not fit the base.
    """
    from loragen.core.config import dump
    from loragen.core.lora.tasks import earlier_runs

    date = ""
    if resume:
        from loragen.core.lora.train import LoraPoint

        point = LoraPoint.find(resume)
        point.check(config)
        date = point.date
    problems: list[str] = []
    files = [(task.name, task.dataset) for task in tasks]
    if tasks[0].validation:
        files.append(("data.validation", tasks[0].validation))
    for name, dataset in files:
        try:
            rows = dataset.check(config.data.skip_bad_rows)
            render.note(f"{name}: {counted(rows, 'row')} in {dataset}")
        except LoragenError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)

    from loragen.core.base.load import load_tokenizer
    from loragen.core.lora.data import load_rows

    tokenizer = load_tokenizer(config.base_model, config.trust_remote_code)
    for task in tasks:
        try:
            load_rows(task.config(config), task.dataset, tokenizer, task.validation, date=date)
        except LoragenError as error:
            problems += error.problems
    if problems:
        raise DataError(*dict.fromkeys(problems))
    for task in tasks:
        finished, unfinished = earlier_runs(config, task)
        if finished:
            render.note(f"{task.name}: already trained in {finished.directory}")
        elif unfinished:
            render.note(f"{task.name}: an unfinished run is in {unfinished.directory}")

    from loragen.core.lora.train import (
        check_memory,
        checkpoint_sizes,
        count_values,
        training_bytes,
    )

    values, trained, parameters = count_values(config)
    check_memory(config, values, trained)
    sizes = checkpoint_sizes(config, values, trained)
    training = "" if trained == values else f", of which {trained:,} are trained"
    render.note(
        f"the adapter has {counted(values, 'value')}{training}; "
        f"{counted(len(sizes), 'checkpoint')} a dataset, "
        f"{sum(sizes) / 1e6:,.1f} MB"
    )
    render.note(
        f"memory: the base's {counted(parameters, 'parameter')}, {2 * parameters / 1e9:,.2f} GB in "
        f"bfloat16, {4 * parameters / 1e9:,.2f} GB in float32; the adapter with gradients and "
        f"AdamW's moments, {training_bytes(config, values, trained) / 1e9:,.2f} GB; and activations"
    )
    for line in _launch_commands(config, sys.argv[1:]):
        render.note(line)
    if not resume and len(tasks) == 1:
        config = tasks[0].config(config)
    elif not resume:
        config.collection = [task.argument for task in tasks]
    render.answer_either(json, config.model_dump(mode="json"), dump(config).rstrip())


def _launch_commands(config: "LoraTrainConfig", arguments: Sequence[str]) -> list[str]:
    """Returns the commands that start these arguments on several devices; none for one device."""
    nodes, accelerator = config.trainer.num_nodes, config.trainer.accelerator
    devices = str(config.trainer.devices)
    if devices in ("auto", "-1"):  # torchrun calls all devices "gpu"
        devices = "1" if accelerator == "cpu" else "gpu"
    elif "," in devices:
        devices = str(len([one for one in devices.split(",") if one.strip()]))
    if nodes == 1 and devices == "1":
        return []
    given = [one for one in arguments if one not in ("--dry-run", "--dry_run")]
    command = shlex.join(["loragen", *given])
    rendezvous = (
        "--standalone"
        if nodes == 1
        else f"--nnodes={nodes} --rdzv-id=loragen --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
    )
    torchrun = f"torchrun {rendezvous} --nproc-per-node={devices} --no-python {command}"
    gpus = "" if accelerator == "cpu" else f" --gpus-per-node={devices}"
    srun = f"srun --nodes={nodes} --ntasks-per-node={devices}{gpus} {command}"
    if nodes == 1:
        return [f"on one machine: {command}", f"or: {torchrun}", f"on Slurm: {srun}"]
    on_each = f"on each of {nodes} machines, where HOST is the first: {torchrun}"
    return [on_each, f"on Slurm: {srun}"]


def _resume(config: "LoraTrainConfig", task: "Task", path: Path) -> "TaskOutcome":
    from loragen.cli.progress import terminal_progress
    from loragen.core.data.dataset import Dataset
    from loragen.core.lora.tasks import TaskOutcome
    from loragen.core.lora.train import LoraPoint, load_resumed_base, train_adapter
    from loragen.core.run.directory import LoraRun

    with LoraPoint.find(path, to_write=True) as point:
        if point.is_finished(config):
            render.note(f"{point.directory}: finished at step {point.step}, nothing is left to do")
            return TaskOutcome(task, "skipped", LoraRun(point.directory, point.manifest))
        found = point.checkpoint.name if point.checkpoint else "no checkpoint"
        done = point.step == config.training.max_steps
        then = "all steps are done" if done else f"the next step is {point.step + 1}"
        render.note(f"{point.directory}: found {found}; {then}")
        base = load_resumed_base(point, config)
        dataset = Dataset(task.dataset.source, point.manifest.dataset.name)
        run = train_adapter(config, dataset, base, terminal_progress(), point, task.validation)
        return TaskOutcome(task, "trained", run)


def _report(outcomes: "Sequence[TaskOutcome]", json: bool) -> None:
    """Prints the answer, then raises LoragenError if a dataset has failed, or Interrupted.

    Other processes than a launcher's first do nothing: if one exited with an error while the first
    still writes its results, torchrun would end the first too.
    """
    if not is_first_process():
        return
    documents: list[dict[str, object]] = []
    rows: list[tuple[object, ...]] = []
    for outcome in outcomes:
        name, run, status = outcome.task.name, outcome.run, outcome.status
        if run:
            documents.append({"run": str(run.directory), **run.manifest.model_dump()})
            seconds = run.manifest.seconds if status == "trained" else None
            rows.append((name, status, run.manifest.final_loss, seconds, str(run.directory)))
        else:
            dataset = {"name": name, "path": str(outcome.task.dataset)}
            documents.append({"run": None, "status": status, "dataset": dataset})
            documents[-1]["reason"] = outcome.reason
            # Errors are printed below, on lines of their own.
            rows.append((name, status, None, None, None if outcome.error else outcome.reason))
        documents[-1]["outcome"] = status
        if run and not json:
            render.answer(str(run.directory))
    if json:
        render.answer_json(documents)
    if len(outcomes) > 1:
        render.note(render.columns(("dataset", "status", "loss", "seconds", "run"), rows))
    stopped = [one for one in outcomes if one.status == "interrupted"]
    failed = [one for one in outcomes if one.status == "failed"]
    lines = []
    for one in stopped + failed:
        reasons = one.error.problems if isinstance(one.error, LoragenError) else [one.reason]
        lines += [f"{one.task.name}: {reason}" for reason in reasons]
    errors = [one.error for one in failed if isinstance(one.error, Exception)]
    cause = ExceptionGroup("one per dataset", errors) if errors else None  # for --debug
    if stopped:
        raise Interrupted(*lines) from cause
    if failed:
        raise LoragenError(*lines) from cause
