"""`loragen lora train --dry-run`: what would happen, and everything that can be wrong before.

What `loragen lora train` does, apart from reading its options.

`loragen lora`: collect adapters, and measure one.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import (
    Alpha,
    BaseModel,
    ConfigFile,
    DataRoot,
    DryRun,
    Force,
    Json,
    Settings,
    SkipBadRows,
    with_old_files,
)
from loragen.core.config import LoraTrainConfig, Override, dump, load
from loragen.core.data.documents import parsed_source
from loragen.core.data.rows import check_rows
from loragen.core.errors import DataError, Interrupted, LoragenError, UsageError
from loragen.core.lora.collect import collect
from loragen.core.lora.tasks import (
    Task,
    TaskOutcome,
    config_of,
    finished_run,
    tasks,
    unfinished_run,
)
from loragen.core.run.directory import TEST_MODE_STEPS


def check(config: LoraTrainConfig, tasks: Sequence[Task]) -> None:
    """Reads every file and builds the adapter without weights; notes what it has found.

    Raises DataError for bad files, all at once; UsageError where the adapter does not fit the base.
    """
    problems: list[str] = []
    for task in tasks:
        try:
            rows = check_rows(task.source, config.data.skip_bad_rows)
            render.note(f"{task.name}: {rows} rows in {task.source}")
        except LoragenError as error:
            problems += error.problems
        _note_runs(config, task)
    if config.data.validation:
        try:
            rows = check_rows(parsed_source(config.data.validation), config.data.skip_bad_rows)
            render.note(f"data.validation: {rows} rows in {config.data.validation}")
        except LoragenError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    _note_size(config)
    for line in command_lines(config, sys.argv[1:]):
        render.note(line)


def command_lines(config: LoraTrainConfig, arguments: Sequence[str]) -> list[str]:
    """How to start these arguments on several devices or machines; nothing for one device."""
    nodes, devices = config.trainer.num_nodes, _devices(config)
    if nodes == 1 and devices == "1":
        return []
    given = [one for one in arguments if one not in ("--dry-run", "--dry_run")]
    command = shlex.join(["loragen", *given])
    where = (
        "--standalone"
        if nodes == 1
        else f"--nnodes={nodes} --rdzv-id=loragen --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
    )
    torchrun = f"torchrun {where} --nproc-per-node={devices} --no-python {command}"
    gpus = "" if config.trainer.accelerator == "cpu" else f" --gpus-per-node={devices}"
    srun = f"srun --nodes={nodes} --ntasks-per-node={devices}{gpus} {command}"
    if nodes == 1:
        return [f"on one machine, as it is: {command}", f"or: {torchrun}", f"on Slurm: {srun}"]
    return [
        f"on each of {nodes} machines, HOST being the first: {torchrun}",
        f"on Slurm: {srun}",
    ]


def _devices(config: LoraTrainConfig) -> str:
    """Per machine, as torchrun takes it: a number, or `gpu` for all there are."""
    devices = config.trainer.devices
    if isinstance(devices, str) and "," in devices:
        return str(len([one for one in devices.split(",") if one.strip()]))
    if str(devices) in ("auto", "-1"):
        return "1" if config.trainer.accelerator == "cpu" else "gpu"
    return str(devices)


def _note_runs(config: LoraTrainConfig, task: Task) -> None:
    done, begun = finished_run(config, task), unfinished_run(config, task)
    if done:
        render.note(f"{task.name}: done already in {done.directory}")
    elif begun:
        render.note(f"{task.name}: an unfinished run is in {begun.directory}")


def _note_size(config: LoraTrainConfig) -> None:
    from loragen.core.lora.train import checkpoint_sizes, count_values

    values = count_values(config)
    sizes = checkpoint_sizes(config, values)
    render.note(
        f"the adapter has {values:,} values; {len(sizes)} checkpoints a dataset, "
        f"{sum(sizes) / 1e6:,.1f} MB"
    )


@dataclass(frozen=True)
class ConfigSource:
    """Where the configuration comes from."""

    file: Path | None
    settings: Sequence[str]
    flags: Sequence[Override]
    test_mode: bool

    def config(self, default: Path | None = None) -> LoraTrainConfig:
        config = with_old_files(
            LoraTrainConfig,
            self.file or default,
            lambda file: load(LoraTrainConfig, file, self.settings, self.flags),
        )
        if self.test_mode:
            _shorten(config)
        return config


def train_datasets(
    source: ConfigSource, wanted: Sequence[str], every: bool, force: bool, json: bool
) -> None:
    """A run per dataset; exit 1 with the list of those that failed."""
    from loragen.cli.progress import collection_progress

    config = source.config()
    chosen = tasks(config, wanted, every)
    _report(collect(config, chosen, collection_progress(len(chosen)), force), json)


def dry_run_datasets(source: ConfigSource, wanted: Sequence[str], every: bool, json: bool) -> None:
    """The resolved configuration, once everything is checked."""

    config = source.config()
    chosen = tasks(config, wanted, every)
    check(config, chosen)
    if len(chosen) == 1:
        config = config_of(config, chosen[0])
    else:
        config.collection = [task.wanted for task in chosen]
    _answer_config(config, json)


def go_on(
    source: ConfigSource,
    path: Path,
    wanted: Sequence[str],
    every: bool,
    launcher: str | None,
    dry: bool,
    json: bool,
) -> None:
    """Goes on with the run at `path`, on its own dataset and settings where no others are given."""
    from loragen.core.run.directory import CONFIG, LoraManifest, read_manifest, run_directory_of

    if every or len(wanted) > 1 or launcher == "ray":
        raise UsageError("--resume goes on with one run, and so with one dataset, here")
    directory = run_directory_of(path)
    manifest = read_manifest(directory, LoraManifest)
    if not wanted and not manifest.dataset.path:  # of a converted run
        raise UsageError(f"{directory}: its dataset is not recorded; give --dataset FILE")
    config = source.config(directory / CONFIG)
    (task,) = tasks(config, wanted or [manifest.dataset.path], every=False)
    if dry:
        from loragen.core.lora.train import check_settings, find_resume_point

        check_settings(find_resume_point(path), config)
        check(config, [task])
        _answer_config(config, json)
        return
    _report([_resumed(config, task, path)], json)


def _resumed(config: LoraTrainConfig, task: Task, path: Path) -> TaskOutcome:
    from loragen.cli.progress import terminal_progress
    from loragen.core.lora.train import find_resume_point, load_base_again, nothing_left
    from loragen.core.lora.train import train as train_one
    from loragen.core.progress import Silent
    from loragen.core.run.directory import LoraRun

    point = find_resume_point(path)
    if nothing_left(point, config):
        render.note(f"{point.directory}: finished at step {point.step}, nothing is left to do")
        return TaskOutcome(task, "skipped", LoraRun(point.directory, point.manifest))
    found = point.checkpoint.name if point.checkpoint else "no checkpoint"
    done = point.step == config.training.max_steps
    then = "all steps are done" if done else f"the next step is {point.step + 1}"
    render.note(f"{point.directory}: found {found}; {then}")
    base = load_base_again(point, config)
    name = point.manifest.dataset.name
    progress = terminal_progress() if render.is_first_process() else Silent()
    run = train_one(config, name, task.source, base, progress, point)
    return TaskOutcome(task, "trained", run)


def _answer_config(config: LoraTrainConfig, json: bool) -> None:
    if json:
        render.answer_json(config.model_dump(mode="json"))
    else:
        render.answer(dump(config).rstrip())


def _report(outcomes: Sequence[TaskOutcome], json: bool) -> None:
    """The answer; then LoragenError for what failed, or what was interrupted.

    The first process of a launcher alone tells: one that left with an error while the first still
    writes its results would have torchrun end that too.
    """
    if not render.is_first_process():
        return
    if json:
        render.answer_json([_document(outcome) for outcome in outcomes])
    else:
        for outcome in outcomes:
            if outcome.run:
                render.answer(str(outcome.run.directory))
    if len(outcomes) > 1:
        render.note(_summary(outcomes))
    _raise_for(outcomes)


def _raise_for(outcomes: Sequence[TaskOutcome]) -> None:
    stopped = [one for one in outcomes if one.status == "interrupted"]
    failed = [one for one in outcomes if one.status == "failed"]
    lines = [f"{one.task.name}: {line}" for one in stopped + failed for line in _reasons(one)]
    errors = [one.error for one in failed if isinstance(one.error, Exception)]
    cause = ExceptionGroup("one a dataset", errors) if errors else None  # for --debug
    if stopped:
        raise Interrupted(*lines) from cause
    if failed:
        raise LoragenError(*lines) from cause


def _reasons(outcome: TaskOutcome) -> Sequence[str]:
    """One line per problem."""
    error = outcome.error
    return error.problems if isinstance(error, LoragenError) else [outcome.reason]


def _document(outcome: TaskOutcome) -> dict[str, Any]:
    if outcome.run:
        run = {"run": str(outcome.run.directory), **outcome.run.manifest.model_dump()}
        return {**run, "outcome": outcome.status}
    task = outcome.task
    return {
        "run": None,
        "status": outcome.status,
        "dataset": {"name": task.name, "path": str(task.source)},
        "outcome": outcome.status,
        "reason": outcome.reason,
    }


def _summary(outcomes: Sequence[TaskOutcome]) -> str:
    rows = []
    for outcome in outcomes:
        manifest = outcome.run.manifest if outcome.run else None
        seconds = manifest.seconds if manifest and outcome.status == "trained" else None
        loss = manifest.final_loss if manifest else None
        what = None if outcome.error else outcome.reason  # an error has a line of its own
        what = str(outcome.run.directory) if outcome.run else what
        rows.append((outcome.task.name, outcome.status, loss, seconds, what))
    return render.columns(("dataset", "status", "loss", "seconds", "run"), rows)


def _shorten(config: LoraTrainConfig) -> None:
    """`--test-mode`"""
    first, *_, last = TEST_MODE_STEPS
    config.training.max_steps = last
    config.checkpoints.first_step = first
    if "stage1_steps" in config.schedule.options:
        config.schedule = config.schedule.model_copy(update={"stage1_steps": first - 1})


app = typer.Typer(no_args_is_help=True, help="Train LoRA adapters, evaluate one, export it.")


@app.command()
def train(
    dataset: Annotated[
        list[str] | None,
        typer.Option(
            "--dataset", help="A name under --data-root, a file, or hub:owner/name. Repeatable."
        ),
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Every dataset below --data-root.")] = False,
    config: ConfigFile = None,
    base_model: BaseModel = None,
    data_root: DataRoot = None,
    skip_bad_rows: SkipBadRows = False,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", help="Rows per optimizer step.")
    ] = None,
    runs_dir: Annotated[
        Path | None, typer.Option("--runs-dir", help="Where run directories are made.")
    ] = None,
    test_mode: Annotated[
        bool, typer.Option("--test-mode", help="Six steps, three checkpoints: does it run?")
    ] = False,
    track_batches: Annotated[
        bool, typer.Option("--track-batches", help="Write which lines made which checkpoint.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            "--resume",
            "--resume-from-checkpoint",
            help="Go on with a run, from its newest checkpoint or the one named.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Train again what is trained already.")
    ] = False,
    launcher: Annotated[
        str | None,
        typer.Option("--launcher", help="local, or ray: the datasets as tasks of a Ray cluster."),
    ] = None,
    dry_run: DryRun = False,
    settings: Settings = None,
    json: Json = False,
) -> None:
    """Train one LoRA adapter per dataset, in two stages, and keep the checkpoints of stage 2.

    Runs on defaults with nothing but --dataset. Prints the run directory of each dataset. What is
    trained already is not trained again, and a dataset that fails does not stop the others.
    """
    from loragen.core.config import Override

    given = [
        (("base_model",), base_model, "--base-model"),
        (("data", "root"), data_root, "--data-root"),
        (("data", "skip_bad_rows"), skip_bad_rows or None, "--skip-bad-rows"),
        (("training", "batch_size"), batch_size, "--batch-size"),
        (("runs_dir",), str(runs_dir) if runs_dir else None, "--runs-dir"),
        (("track_batches",), track_batches or None, "--track-batches"),
        (("launcher", "name"), launcher, "--launcher"),
    ]
    flags = [Override(*one) for one in given if one[1] is not None]
    source = ConfigSource(config, settings or [], flags, test_mode)
    if resume:
        go_on(source, resume, dataset or [], every, launcher, dry_run, json)
    elif dry_run:
        dry_run_datasets(source, dataset or [], every, json)
    else:
        train_datasets(source, dataset or [], every, force, json)


@app.command("eval")
def evaluate(
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset",
            help="A name under --data-root (its test split), a file, or hub:owner/name.",
        ),
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="A PEFT directory, a run, or a .ckpt of a run.")
    ] = None,
    no_adapter: Annotated[
        bool, typer.Option("--no-adapter", help="The base model as it is.")
    ] = False,
    base_model: BaseModel = None,
    data_root: DataRoot = "data_to_lora/cs",
    skip_bad_rows: SkipBadRows = False,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only the first rows.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1)] = 32,
    json: Json = False,
) -> None:
    """Accuracy of an adapter, or of the base without one, on labelled rows.

    Exact match of the greedy answer; and choice accuracy by log-likelihood where rows carry
    choices or the dataset has a closed set of answers.
    """
    from loragen.core.data.rows import find_dataset, read_rows
    from loragen.core.errors import UsageError

    if (adapter is None) == (not no_adapter):
        raise UsageError("give either --adapter DIR|CKPT or --no-adapter")
    if adapter and not adapter.exists():
        raise UsageError(f"{adapter}: no such adapter or checkpoint")
    name, file = find_dataset(dataset, Path(data_root or "."), split="test")
    rows = read_rows(file, skip_bad_rows)[:limit]

    from loragen.core.adapter.files import attach_adapter
    from loragen.core.base.load import best_device, load_base
    from loragen.core.lora.evaluate import evaluate as score
    from loragen.core.run.checkpoints import read_checkpointed_adapter

    read = read_checkpointed_adapter(adapter) if adapter else None
    base_name = base_model or (read.config.get("base_model_name_or_path") if read else None)
    if not base_name:
        raise UsageError("which base model? Give --base-model")
    base = load_base(base_name)
    base.model.to(best_device())
    model = attach_adapter(base.model, read, str(adapter)) if read else base.model
    scores = score(model, base.tokenizer, rows, batch_size)
    document = {
        "dataset": name,
        "file": str(file),
        "base_model": base_name,
        "adapter": str(adapter) if adapter else None,
        **scores.as_dict(),
    }
    if json:
        render.answer_json(document)
    else:
        render.answer(render.columns(("measure", "value"), list(document.items())))


@app.command()
def export(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A run, a .ckpt of one, a PEFT directory, or any file with LoRA in it."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory that is written.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="A whole Hugging Face model instead of an adapter.")
    ] = False,
    base_model: BaseModel = None,
    alpha: Alpha = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an adapter, or the model it makes of its base, for use without loragen.

    The adapter loads with `peft.PeftModel.from_pretrained(base, DIR)`, the merged model, in the
    base's own dtype and with its tokenizer, with `AutoModelForCausalLM.from_pretrained(DIR)`.
    """
    from loragen.core.adapter import CONFIG_FILE, MERGED_MARKER
    from loragen.core.errors import UsageError
    from loragen.core.files import refuse_existing

    if not checkpoint.exists():
        raise UsageError(f"{checkpoint}: no such adapter or checkpoint")
    refuse_existing(output, force, marker=MERGED_MARKER if merge else CONFIG_FILE)

    from loragen.core.adapter.export import export_adapter, export_merged, prepare_export
    from loragen.core.run.checkpoints import is_known, read_checkpointed_adapter

    if is_known(checkpoint):
        adapter = read_checkpointed_adapter(checkpoint)
    else:
        from loragen.legacy.survey import foreign_adapter

        adapter = foreign_adapter(checkpoint, base_model, alpha)
    adapter = prepare_export(adapter, checkpoint, base_model, alpha)
    (export_merged if merge else export_adapter)(adapter, checkpoint, output)
    if json:
        render.answer_json(
            {
                "output": str(output),
                "kind": "merged" if merge else "adapter",
                "base_model": adapter.config["base_model_name_or_path"],
                "checkpoint": str(checkpoint),
            }
        )
    else:
        render.answer(str(output))
