"""The demo: the whole path on the made-up world, and the table that judges it.

Collect one adapter per training pair, train a generator on them, generate adapters for targets
that were held out, and put them beside everything simpler.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from loragen.core.errors import UsageError
from loragen.core.evaluation.report import write
from loragen.core.evaluation.targets import Target
from loragen.core.files import write_text
from loragen.core.generator.training.train import train as train_generator
from loragen.core.progress import Progress
from loragen.core.runs import generator_file
from loragen.demo import settings
from loragen.demo.contest import contest, target
from loragen.demo.workers import Done, Job, Workers
from loragen.demo.world import (
    PAIRS,
    TRAIN_CREATURES,
    WORLD_FILE,
    Pair,
    Row,
    Wording,
    World,
)

SPLITS: dict[str, Wording] = {
    "new_wording": "unseen",  # of training pairs
    "new_combination": "train",  # of held-out pairs
    "both": "unseen",  # of held-out pairs
}
PROMPT_REPEATS = 2
"""Of every training creature in what the generator reads: more would mostly take time to embed."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Demo:
    """Where things are and what was drawn."""

    out: Path
    seed: int
    world: World
    say: Say
    progress: Progress

    def data(self, pair: Pair, split: str, wordings: Wording) -> Path:
        suffix = "" if wordings == "train" else "_unseen"
        return self.out / "data" / pair.name / f"{split}{suffix}.jsonl"


def run(
    out: Path, seed: int, world_file: Path | None, force: bool, say: Say, progress: Progress
) -> dict[str, Any]:
    """Runs the demo into `out` and returns what `results.json` holds."""
    started = time.perf_counter()
    torch.set_num_threads(1)  # the workers have the other cores, and threads would fight over them
    world = World.load(world_file)
    world_text = (world_file or WORLD_FILE).read_text(encoding="utf-8")
    _make_room(out, force)
    demo = Demo(out, seed, world, say, progress)
    write_data(demo, world_text)
    targets = choose_targets(demo)
    with Workers() as workers:
        multi_task = workers.train([multi_task_job(demo)])  # the longest goes first
        collection = workers.train(collection_jobs(demo))
        oracles = workers.train(oracle_jobs(demo, targets))
        collected = finished(demo, "collect", collection)
        runs = [done.directory for done in collected]
        generator = learn(demo, runs)  # while the workers go on with the oracles
        judges = finished(demo, "oracles", oracles)
        everything = finished(demo, "multi-task", multi_task)[0]
        demo.say(f"multi-task: stopped after {everything.steps} steps, {everything.seconds:.0f} s")
        told = contest(workers, generator, targets, everything, judges, out / "generated")
    results = {
        **told,
        "seed": seed,
        "held_out": [list(pair) for pair in world.held_out_pairs(seed)],
        "multi_task": {"steps": everything.steps, "patience": settings.MULTI_TASK_PATIENCE},
    }
    results["seconds"]["total"] = round(time.perf_counter() - started, 1)
    write(results, _title(results), out)
    return results


def write_data(demo: Demo, world_text: str) -> None:
    """The world file, every dataset in both kinds of wording, and what the generator reads."""
    write_text(demo.out / "world.yaml", world_text)
    for pair in PAIRS:
        read = demo.world.rows(pair, TRAIN_CREATURES, repeats=PROMPT_REPEATS)
        write_text(demo.data(pair, "prompts", "train"), _lines(read))
        for wordings in ("train", "unseen"):
            for split, rows in (
                ("train", demo.world.train_rows(pair, wordings=wordings)),
                ("test", demo.world.test_rows(pair, wordings)),
            ):
                write_text(demo.data(pair, split, wordings), _lines(rows))


def _lines(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def collection_jobs(demo: Demo) -> list[Job]:
    """One adapter per training pair."""
    config = settings.adapter_config(demo.out / "runs", demo.seed)
    pairs = demo.world.training_pairs(demo.seed)
    return [Job(pair.name, demo.data(pair, "train", "train"), config) for pair in pairs]


def oracle_jobs(demo: Demo, targets: Sequence[Target]) -> list[Job]:
    """One adapter per target, from the target's own labels, in the target's wordings."""
    config = settings.oracle_config(demo.out / "oracles", demo.seed)
    return [Job(target.name, Path(str(target.train_source)), config) for target in targets]


def multi_task_job(demo: Demo) -> Job:
    """One LoRA for the rows of all training pairs together."""
    files = [job.file for job in collection_jobs(demo)]
    file = demo.out / "data" / "multi-task" / "train.jsonl"
    write_text(file, "".join(one.read_text(encoding="utf-8") for one in files))
    return Job("multi-task", file, settings.multi_task_config(demo.out / "multi_task", demo.seed))


def finished(demo: Demo, title: str, futures: Sequence[Future[Done]]) -> list[Done]:
    """The results in the order of the jobs; while they come, a line after every eighth."""
    seconds: list[float] = []
    for future in as_completed(futures):
        seconds.append(future.result().seconds)
        if len(seconds) % 8 == 0:
            each = fmean(seconds)
            demo.say(f"{title}: {len(seconds)}/{len(futures)} adapters, {each:.1f} s each")
    return [future.result() for future in futures]


def learn(demo: Demo, runs: Sequence[Path]) -> Path:
    """The file of the generator, trained on the collected runs."""
    config = settings.generator_config(
        demo.out / "experiments", demo.out / "cache", with_prompts(demo, runs), demo.seed
    )
    run = train_generator(config, demo.progress)
    return generator_file(run.directory)


def with_prompts(demo: Demo, runs: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Runs in the order of the training pairs, each with its dataset's prompts."""
    pairs = demo.world.training_pairs(demo.seed)
    return [
        (run, demo.data(pair, "prompts", "train")) for run, pair in zip(runs, pairs, strict=True)
    ]


def choose_targets(demo: Demo) -> list[Target]:
    """The held-out pairs in both wordings, and as many training pairs in unseen wordings."""
    held_out = demo.world.held_out_pairs(demo.seed)
    seen = demo.world.sample_training_pairs(demo.seed, len(held_out))
    chosen = {"new_wording": seen, "new_combination": held_out, "both": held_out}
    return [
        target(
            split,
            pair,
            train_file=demo.data(pair, "train", SPLITS[split]),
            test_file=demo.data(pair, "test", SPLITS[split]),
        )
        for split, pairs in chosen.items()
        for pair in pairs
    ]


def _title(results: dict[str, Any]) -> str:
    seconds = results["seconds"]
    return (
        f"Accuracy on unseen creatures (seed {results['seed']}): an adapter trained in "
        f"{seconds['train_adapter']:.1f} s, generated in {seconds['generate_adapter']:.2f} s"
    )


def _make_room(out: Path, force: bool) -> None:
    """Raises UsageError rather than touch anything that is not an earlier demo."""
    if out.exists() and any(out.iterdir()):
        if not force:
            raise UsageError(f"{out} exists already; choose another --output or add --force")
        if not (out / "world.yaml").is_file():
            raise UsageError(f"{out} is not the directory of a demo; choose another --output")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
