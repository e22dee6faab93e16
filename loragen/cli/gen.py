"""`loragen gen train`: learn a generator from collected adapters.

`loragen gen infer`: prompts -> adapters.

`loragen gen eval`: does the generated adapter beat the alternatives?

`loragen gen`: learn a generator, generate adapters with it, and judge them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loragen.cli import render
from loragen.cli.options import (
    BaseModel,
    ConfigFile,
    DataRoot,
    DryRun,
    Force,
    GeneratorPath,
    Json,
    Settings,
    SkipBadRows,
    with_old_files,
)

if TYPE_CHECKING:
    from loragen.core.config import GenTrainConfig
    from loragen.core.evaluation.contestants import Column
    from loragen.core.evaluation.targets import Target
    from loragen.core.generator.model import Generated
    from loragen.core.generator.network import Anatomy
    from loragen.core.generator.requests import Request
    from loragen.core.learning.plan import Plan
    from loragen.core.learning.train import GeneratorPoint, GeneratorRun


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
    from loragen.core.learning.sources import check_places
    from loragen.core.run.directory import CONFIG, TEST_MODE_STEPS, GeneratorManifest, resumable_run

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
    resolved = with_old_files(
        GenTrainConfig,
        file,
        lambda given: load(GenTrainConfig, given, settings or (), flags, check=check_places),
    )

    from loragen.core.learning.plan import plan
    from loragen.core.learning.train import check_settings, find_resume_point, settled

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
    from loragen.core.learning.train import GeneratorRun, nothing_left, train
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
    from loragen.core.base.load import quiet_libraries
    from loragen.core.data.prompts import joined
    from loragen.core.generator.network import anatomy
    from loragen.core.plugins import create

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


MOST_WARNINGS = 3


class Format(StrEnum):
    peft = "peft"
    safetensors = "safetensors"
    pt = "pt"


Prompts = Annotated[
    list[str] | None, typer.Option("--prompt", help="A prompt of the dataset. Repeatable.")
]
PromptFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt-file",
        help="Prompts: .txt (one a line), or rows or hub:owner/name as for lora train. Repeatable.",
    ),
]
OutputToInfer = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="A directory (PEFT), or a .safetensors or .pt file; with --per, the directory "
        "that holds them. Default: a new one below generated/.",
    ),
]
Per = Annotated[
    str | None,
    typer.Option(
        "--per",
        metavar="line|FIELD",
        help="An adapter for each prompt (line), or for each value of a field of the rows.",
    ),
]
FileFormat = Annotated[
    Format | None,
    typer.Option("--format", help="With --per: how each adapter is written. Default: peft."),
]
Merge = Annotated[
    bool, typer.Option("--merge", help="Whole Hugging Face models: the base with the adapter.")
]
LimitToInfer = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first so many prompts.")
]
DrawsToInfer = Annotated[
    int, typer.Option("--draws", min=1, help="The mean over random draws of the prompts.")
]
PromptsPerDrawToInfer = Annotated[
    int | None,
    typer.Option(
        "--prompts-per-draw",
        min=1,
        help="Prompts of a draw. Default: as in training, at most half of all.",
    ),
]
SeedToInfer = Annotated[int, typer.Option("--seed", help="Of the draws.")]


def infer(
    model: GeneratorPath,
    prompt: Prompts = None,
    prompt_file: PromptFiles = None,
    output: OutputToInfer = None,
    per: Per = None,
    file_format: FileFormat = None,
    merge: Merge = False,
    base_model: BaseModel = None,
    limit: LimitToInfer = None,
    draws: DrawsToInfer = 1,
    prompts_per_draw: PromptsPerDrawToInfer = None,
    seed: SeedToInfer = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Turn a few unlabelled prompts of a dataset into a LoRA adapter, without training.

    A directory loads with `peft.PeftModel.from_pretrained(base, DIR)`; the base model itself is
    needed for --merge only. Prompts far from all that the generator was trained on are told.
    """
    from loragen.core.data.documents import parsed_source
    from loragen.core.errors import UsageError
    from loragen.core.generator.requests import requests
    from loragen.core.run.directory import generator_file

    file = generator_file(model)
    if base_model and not merge:
        raise UsageError("--base-model goes with --merge; an adapter needs no base")
    asked = requests(prompt or (), [parsed_source(one) for one in prompt_file or ()], per, limit)
    places = _places([one.name for one in asked], output, per, file_format, merge, force)
    how = _How(draws, prompts_per_draw, seed, merge, base_model, force)
    how.check(asked)
    made = _generated(file, asked, places, how, tell=not json)
    _warn(made)
    if json:
        documents = [_document(one) for one in made]
        render.answer_json({"adapters": documents} if per else documents[0])
    else:
        _tell(made)


@dataclass(frozen=True)
class _How:
    """What all adapters of a command have in common."""

    draws: int
    prompts_per_draw: int | None
    seed: int
    merge: bool
    base_model: str | None
    force: bool

    def check(self, asked: Sequence["Request"]) -> None:
        """Raises UsageError where there are too few prompts; they are drawn once the generator is
        known."""
        from loragen.core.generator.requests import draw_prompts

        for one in asked:
            count = len(one.prompts)
            draw_prompts(one.prompts, self.draws, self.prompts_per_draw, self.seed, usual=count)


def _generated(
    file: Path, asked: Sequence["Request"], places: Sequence[Path], how: _How, tell: bool
) -> list["Generated"]:
    """Writes every adapter, and answers with its place as soon as it is there."""
    from loragen.core.base.load import quiet_libraries
    from loragen.core.generator.generated import Merger
    from loragen.core.generator.model import Generator
    from loragen.core.generator.model import infer as generate

    quiet_libraries()
    generator = Generator.load(file)
    merger = Merger(how.base_model or generator.base_model) if how.merge else None
    made = []
    for request, place in zip(asked, places, strict=True):
        made.append(
            generate(
                generator,
                request.prompts,
                place,
                draws=how.draws,
                prompts_per_draw=how.prompts_per_draw,
                seed=how.seed,
                overwrite=how.force,
                merger=merger,
            )
        )
        if tell:
            render.answer(str(place))
    return made


def _places(
    names: Sequence[str],
    output: Path | None,
    per: str | None,
    file_format: Format | None,
    merge: bool,
    force: bool,
) -> list[Path]:
    """Where each adapter goes. Raises UsageError where it cannot, for any of them."""
    from loragen.core.adapter import CONFIG_FILE, MERGED_MARKER
    from loragen.core.errors import UsageError
    from loragen.core.generator.requests import (
        FILE_SUFFIXES,
        check_output,
        default_output,
        place_of,
    )

    if file_format and not per:
        raise UsageError("--format goes with --per; for one adapter the ending of --output tells")
    home = output or default_output()
    files = file_format not in (None, Format.peft)
    if merge and (files or home.suffix in FILE_SUFFIXES):
        raise UsageError("--merge writes directories")
    places = [place_of(home, name, f".{file_format}" if files else "") for name in names]
    for place in places:
        check_output(place, force, MERGED_MARKER if merge else CONFIG_FILE)
    return places


def _document(made: "Generated") -> dict[str, Any]:
    return {
        "adapter": str(made.path),
        "values": made.values,
        "seconds": made.seconds,
        **asdict(made.origin),
        "warning": made.origin.warning(),
    }


def _tell(made: Sequence["Generated"]) -> None:
    prompts, seconds = sum(one.origin.prompts for one in made), sum(one.seconds for one in made)
    adapters = "" if len(made) == 1 else f"{len(made)} adapters of "
    plural = "" if prompts == 1 else "s"
    render.note(
        f"{adapters}{made[0].values:,} values from {prompts} prompt{plural} in {seconds:.3f} s"
    )


def _warn(made: Sequence["Generated"]) -> None:
    """Of many adapters, the first few in full."""
    warnings = [(one.path, warning) for one in made if (warning := one.origin.warning())]
    for path, warning in warnings[:MOST_WARNINGS]:
        render.note(f"warning: {path}: {warning}" if len(made) > 1 else f"warning: {warning}")
    if len(warnings) > MOST_WARNINGS:
        render.note(f"warning: and {len(warnings) - MOST_WARNINGS} more adapters of such prompts")


Datasets = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        help="A name under --data-root (its test split), a file or hub:owner/name. Repeatable.",
    ),
]
Columns = Annotated[
    str | None, typer.Option("--columns", help="Only these, with commas: base,generated,...")
]
MultiTask = Annotated[
    bool, typer.Option("--multi-task", help="Also one LoRA trained on all training datasets.")
]
Oracle = Annotated[
    bool, typer.Option("--oracle", help="Also a LoRA trained on each dataset's own labels.")
]
Draws = Annotated[
    int, typer.Option("--draws", min=2, help="Generations a dataset, each of other prompts.")
]
PromptsPerDraw = Annotated[
    int | None,
    typer.Option("--prompts", min=1, help="Prompts a draw; else as many as in training."),
]
Shots = Annotated[int, typer.Option("--shots", min=1, help="Labelled rows of the few_shot column.")]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Only the first rows of each dataset.")
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of the draws of prompts and of shots.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1)]
CacheDir = Annotated[
    Path, typer.Option("--cache-dir", help="Keeps what is trained here for the next time.")
]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="A directory for results.json, .md and .png."),
]


def evaluate(
    model: GeneratorPath,
    dataset: Datasets,
    data_root: DataRoot = "data_to_lora/cs",
    base_model: BaseModel = None,
    columns: Columns = None,
    multi_task: MultiTask = False,
    oracle: Oracle = False,
    draws: Draws = 5,
    prompts: PromptsPerDraw = None,
    shots: Shots = 4,
    limit: Limit = None,
    seed: Seed = 0,
    batch_size: BatchSize = 32,
    skip_bad_rows: SkipBadRows = False,
    cache_dir: CacheDir = Path(".loragen-cache"),
    output: Output = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Put generated adapters beside everything simpler, on any datasets.

    The columns: base, mean_adapter, nearest_adapter, few_shot, random_prompts, generated; and on
    demand multi_task and oracle, which are trained once and kept. See docs/evaluating.md.
    """
    from loragen.cli.progress import terminal_progress
    from loragen.core.evaluation.targets import find_targets
    from loragen.core.run.directory import generator_file

    wanted = _columns(columns, multi_task, oracle)
    file = generator_file(model)
    _make_sure_of(output, force)
    targets = find_targets(dataset, Path(data_root or "."), limit, skip_bad_rows)
    _check_oracles(wanted, targets)

    from loragen.core.evaluation.contest import evaluate_generator
    from loragen.core.evaluation.contestants import EvaluationOptions

    results = evaluate_generator(
        file,
        targets,
        wanted,
        options=EvaluationOptions(draws, prompts, shots, seed, batch_size),
        base_model=base_model,
        cache=cache_dir,
        progress=terminal_progress(),
        strict=columns is not None,
    )
    _write(results, file, output)
    if json:
        render.answer_json(results)
    else:
        answer_results(results)


def _columns(given: str | None, multi_task: bool, oracle: bool) -> list["Column"]:
    from loragen.core.evaluation.contestants import MULTI_TASK, ORACLE, chosen

    also = [name for name, on in ((MULTI_TASK, multi_task), (ORACLE, oracle)) if on]
    return chosen((given or "").split(","), also)


def _check_oracles(columns: Sequence["Column"], targets: Sequence["Target"]) -> None:
    """Raises UsageError where a dataset has no labels that an oracle could be trained on."""
    from loragen.core.evaluation.contestants import ORACLE
    from loragen.core.evaluation.targets import check_oracles

    if any(column.name == ORACLE for column in columns):
        check_oracles(targets)


def _make_sure_of(output: Path | None, force: bool) -> None:
    """Raises UsageError where the results cannot be written."""
    from loragen.core.files import refuse_existing, refuse_file

    if output:
        refuse_file(output)
        refuse_existing(output, force, marker="results.json")


def _write(results: dict[str, Any], file: Path, output: Path | None) -> None:
    from loragen.core.evaluation.report import write
    from loragen.core.run.directory import experiment_name

    if output:
        write(results, f"Does {experiment_name(file)} beat the rest?", output)


def answer_results(results: Mapping[str, Any]) -> None:
    """The tables, and what may be said of them."""
    from loragen.core.evaluation.report import remarks, tables

    for table in tables(results):
        render.answer(render.columns(table.header, table.rows) + "\n")
    render.answer("\n".join(remarks(results)))


app = typer.Typer(no_args_is_help=True, help="Train a generator, and generate adapters.")
for name, command in (("train", train), ("infer", infer), ("eval", evaluate)):
    app.command(name)(command)
