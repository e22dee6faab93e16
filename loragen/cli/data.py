"""`loragen data`: show a dataset, prepare its prompts, find the steps trained on a row."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import completion, options, render
from loragen.core.errors import EXIT_FAILED, UsageError, shortened

if TYPE_CHECKING:
    from loragen.core.data.preview import Preview, PreviewedRow

log = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, help="Show a dataset, and prepare its prompts.")

MAX_BAD_ROWS = 10
MAX_CUT = 200
"""The most characters shown of the part of a prompt that is cut."""


@app.command("preview")
def data_preview(
    source: Annotated[
        str,
        typer.Argument(
            help="A file (.jsonl, .json, .csv, .tsv, .parquet), a folder or pattern of several, a "
            r"name under --data-root, or hub:owner/name[:config]\[@split].",  # \[ is no markup
            autocompletion=completion.datasets,
        ),
    ],
    base_model: options.BaseModelName = None,
    trust_remote_code: options.TrustRemoteCode = False,
    data_root: options.DataRoot = options.DATA_ROOT,
    limit: Annotated[int, typer.Option("--limit", min=0, help="The number of rows to show.")] = 3,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=8, help="As data.max_length of lora train.")
    ] = None,
    chat_template_kwargs: options.TemplateKwargs = None,
    skip_bad_rows: options.SkipBadRows = False,
    json: options.Json = False,
) -> None:
    """Show rows as the model sees them: the prompt, its cut part, and the answer to learn.

    Counts rows, bad rows and tokens, and loads only the base's tokenizer. Exits with 1 if there are
    bad rows that lora train would refuse.
    """
    from loragen.core.config import LoraTrainConfig
    from loragen.core.data.dataset import Dataset

    defaults = LoraTrainConfig()
    kwargs = options.parsed_template_kwargs(chat_template_kwargs) or {}
    dataset = Dataset.find(source, data_root)
    dataset.check(skip_bad_rows=True)  # before seconds of imports

    from loragen.core.base.load import load_tokenizer
    from loragen.core.config import DEMO
    from loragen.core.data.chat import set_template_kwargs
    from loragen.core.data.preview import preview

    try:
        tokenizer = load_tokenizer(base_model or defaults.base_model, trust_remote_code)
    except UsageError:
        if base_model:
            raise
        tokenizer = load_tokenizer(DEMO)
        render.note(
            f"warning: the default base {defaults.base_model} is not available here: the rows are "
            "shown with the tokenizer of the demo's base; --base-model names another"
        )
    set_template_kwargs(tokenizer, kwargs)
    found = preview(tokenizer, dataset, max_length or defaults.data.max_length, limit)
    for warning in found.warnings:
        log.warning("%s", warning)
    text = "\n\n".join([_summary(found), *map(_sample, found.samples)])
    render.answer_either(json, found.as_dict(), text)
    if found.bad_rows and not skip_bad_rows:
        count = "a bad row" if len(found.bad_rows) == 1 else f"{len(found.bad_rows)} bad rows"
        render.problems([f"{found.source}: {count}; --skip-bad-rows leaves them out"])
        raise typer.Exit(EXIT_FAILED)


@app.command("prepare")
def data_prepare(
    source: Annotated[
        list[str],
        typer.Option(
            "--source",
            help="A file of rows or prompts, a name under --data-root, or hub:owner/name. "
            "Repeatable, for one dataset each.",
            autocompletion=completion.datasets,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The directory for the two files and prepared.json."),
    ],
    samples_per_prompt: Annotated[
        int, typer.Option("--samples-per-prompt", min=1, help="Rows joined into one prompt text.")
    ] = 4,
    test_ratio: Annotated[
        float,
        typer.Option("--test-ratio", min=0, max=0.99, help="Share of the texts held out for val/."),
    ] = 0.1,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the grouping and the split.")
    ] = 42,
    data_root: options.DataRoot = options.DATA_ROOT,
    skip_bad_rows: options.SkipBadRows = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Join the prompts of datasets into texts, at random, and hold some texts out.

    Writes train_prompts.jsonl and val_prompts.jsonl, for `gen train --prompts DIR`. Labels are not
    read. No row is in two texts, and repeated prompts count once. Prompts that do not fill a text
    are left out.
    """
    from loragen.core.data.dataset import Dataset
    from loragen.core.data.prompts import Grouping, prepare

    datasets = [Dataset.find(one, data_root) for one in source]
    grouping = Grouping(samples_per_prompt=samples_per_prompt, test_ratio=test_ratio, seed=seed)
    record = prepare(datasets, output, grouping, skip_bad_rows, force)
    header = ("dataset", "prompts", "repeated", "left over", "train texts", "val texts")
    rows = [
        (d.dataset, d.prompts, d.repeated, d.left_over, d.train, d.val) for d in record.datasets
    ]
    document = {"output_dir": str(output), **record.model_dump()}
    render.answer_either(json, document, render.columns(header, rows))


@app.command("uses")
def data_uses(
    position: Annotated[
        str, typer.Argument(metavar="FILE:LINE", help="A row: train.jsonl:12. Lines count from 1.")
    ],
    run: Annotated[
        Path,
        typer.Option(
            "--run", help="A run directory, or a checkpoint of it.", autocompletion=completion.runs
        ),
    ],
    json: options.Json = False,
) -> None:
    """Show the steps at which a run was trained on a row, and the checkpoints of these steps.

    They are computed from the run's seed, without --track-batches. FILE may be a copy of the run's
    data.
    """
    from loragen.core.data.dataset import Dataset
    from loragen.core.lora.provenance import row_hash, traced_run
    from loragen.core.run.directory import LoraManifest, Run, checkpoint_step

    file, line = parse_position(position)
    opened = Run.open(run, LoraManifest)
    traced = traced_run(opened, Dataset.at(str(file)))
    row = traced.row_at(line)
    if row is None:
        raise UsageError(
            f"{file}:{line}: no such row; there are {opened.manifest.dataset.rows} rows"
        )
    steps = traced.steps_of(row.line)
    files = {checkpoint_step(file): file.name for file in opened.checkpoints}
    document = {
        "file": str(file),
        "line": line,
        "run": str(opened.directory),
        "hash": row_hash(row),
        "prompt": shortened(row.prompt, 60),
        "held_out": row in traced.held_out,
        "steps": [{"step": step, "stage": traced.rate(step).stage} for step in steps],
        "checkpoints": [files[step] for step in steps if step in files],
        "done_steps": traced.done_steps,
        "planned_steps": traced.planned_steps,
    }
    if json:
        render.answer_json(document)
    else:
        _print_uses(document)


def _summary(found: "Preview") -> str:
    formats = found.formats.items()
    several = len(formats) > 1
    format_names = (f"{name} ({count})" if several else name for name, count in formats)
    cut = f"{found.rows_cut} rows, {found.tokens_cut} tokens in the middle of their prompts"
    lines = [
        found.source,
        f"format         {', '.join(format_names)}",
        f"rows           {found.rows}",
        f"cut            {cut if found.rows_cut else 'none'} (max_length {found.max_length})",
        f"shared prefix  {found.shared_prefix} tokens",
        f"bad rows       {len(found.bad_rows)}",
        *(f"  line {line}: {reason}" for line, reason in found.bad_rows[:MAX_BAD_ROWS]),
    ]
    if len(found.bad_rows) > MAX_BAD_ROWS:
        lines.append(f"  and {len(found.bad_rows) - MAX_BAD_ROWS} more")
    lengths = {"rows": found.row_tokens, "answers": found.answer_tokens}
    table = [(kind, n.p5, n.p50, n.p95, n.max) for kind, n in lengths.items()]
    lines += ["", render.columns(("tokens of", "p5", "p50", "p95", "max"), table)]
    if found.samples:
        shown = render.highlighted("to learn", "good"), render.highlighted("cut", "dropped")
        lines += ["", f"{len(found.samples)} of {found.rows} rows, {shown[0]} and {shown[1]}:"]
    return "\n".join(lines)


def _sample(sample: "PreviewedRow") -> str:
    cut, half = sample.cut, MAX_CUT // 2
    if len(cut) > MAX_CUT:
        cut = f"{cut[:half]} … {cut[-half:]}"
    parts = [
        render.visible(sample.prompt[: sample.cut_at]),
        render.highlighted(cut, "dropped") if cut else "",
        render.visible(sample.prompt[sample.cut_at :]),
        render.highlighted(sample.answer, "good"),
    ]
    return f"line {sample.line}\n{''.join(parts)}"


def parse_position(text: str) -> tuple[Path, int]:
    """Returns file and line of `train.jsonl:12`; a drive letter may have a colon, too."""
    file, _, line = text.rpartition(":")
    if not file or not (line.isascii() and line.isdigit()) or int(line) == 0:
        raise UsageError(f"{text}: expected FILE:LINE, as in train.jsonl:12")
    return Path(file), int(line)


def _print_uses(document: dict[str, Any]) -> None:
    render.answer("{file}:{line} ({hash})  {prompt}".format(**document))
    if document["held_out"]:
        render.answer("held out for validation: the run was never trained on it")
        return
    done = "{done_steps} of {planned_steps} steps done".format(**document)
    steps = document["steps"]
    if not steps:
        render.answer(f"not trained on so far ({done})")
        return
    for stage in dict.fromkeys(use["stage"] for use in steps):
        of_stage = [str(use["step"]) for use in steps if use["stage"] == stage]
        word = "step" if len(of_stage) == 1 else "steps"
        render.answer(f"stage {stage}: {word} {', '.join(of_stage)}")
    render.answer(f"checkpoints of these steps: {', '.join(document['checkpoints']) or 'none'}")
    render.answer(f"({done})")
