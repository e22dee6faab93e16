"""The demo: the whole path on the made-up world, and the table that judges it.

Collect one adapter per training pair, train a generator on them, generate adapters for targets
that were held out, and put them beside everything simpler.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from loragen.core.config import GenTrainConfig
from loragen.core.evaluation.report import write
from loragen.core.evaluation.targets import Target
from loragen.core.files import write_text
from loragen.core.learning.train import read_ahead
from loragen.core.learning.train import train as train_generator
from loragen.core.run.directory import generator_file
from loragen.demo import settings
from loragen.demo.contest import contest, target
from loragen.demo.data import Demo
from loragen.demo.workers import Done, Job, Workers
from loragen.demo.world import Wording

SPLITS: dict[str, Wording] = {
    "new_wording": "unseen",  # of training pairs
    "new_combination": "train",  # of held-out pairs
    "both": "unseen",  # of held-out pairs
}


def run(demo: Demo, workers: Workers) -> dict[str, Any]:
    """Runs the demo and returns what `results.json` holds."""
    torch.set_num_threads(1)  # the workers have the other cores, and threads would fight over them
    targets = choose_targets(demo)
    multi_task = workers.train([multi_task_job(demo)])  # the longest goes first
    collection = workers.train(collection_jobs(demo))
    oracles = workers.train(oracle_jobs(demo, targets))
    collected = finished(demo, "collect", collection, meanwhile=partial(read_prompts, demo))
    generator = learn(demo, collected)  # while the workers go on with the oracles
    judges = finished(demo, "oracles", oracles)
    everything = finished(demo, "multi-task", multi_task)[0]
    demo.say(f"multi-task: stopped after {everything.steps} steps, {everything.seconds:.0f} s")
    results = {
        **contest(workers, generator, targets, everything, judges, demo.out / "generated"),
        "seed": demo.seed,
        "held_out": [list(pair) for pair in demo.world.held_out_pairs(demo.seed)],
        "multi_task": {"steps": everything.steps, "patience": settings.MULTI_TASK_PATIENCE},
    }
    results["seconds"]["total"] = round(time.perf_counter() - demo.started, 1)
    write(results, _title(results), demo.out)
    return results


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


def finished(
    demo: Demo,
    title: str,
    futures: Sequence[Future[Done]],
    meanwhile: Callable[[Sequence[Done]], None] | None = None,
) -> list[Done]:
    """The results in the order of the jobs. After every eighth there is a line, and, as long as
    others are awaited, `meanwhile` is given what is there: this process has nothing else to do."""
    done: list[Done] = []
    for future in as_completed(futures):
        done.append(future.result())
        if len(done) % 8 == 0:
            each = fmean(one.seconds for one in done)
            demo.say(f"{title}: {len(done)}/{len(futures)} adapters, {each:.1f} s each")
            if meanwhile and len(done) < len(futures):
                meanwhile(done)
    return [future.result() for future in futures]


def read_prompts(demo: Demo, collected: Sequence[Done]) -> None:
    read_ahead(generator_config(demo, collected))


def learn(demo: Demo, collected: Sequence[Done]) -> Path:
    """The file of the generator."""
    run = train_generator(generator_config(demo, collected), demo.progress)
    return generator_file(run.directory)


def generator_config(demo: Demo, collected: Sequence[Done]) -> GenTrainConfig:
    runs = {done.job.name: done.directory for done in collected}
    return settings.generator_config(
        demo.out / "experiments", demo.out / "cache", with_prompts(demo, runs), demo.seed
    )


def with_prompts(demo: Demo, runs: Mapping[str, Path]) -> list[tuple[Path, Path]]:
    """The runs of training pairs, in the order of these, each with its dataset's prompts."""
    return [
        (runs[pair.name], demo.data(pair, "prompts", "train"))
        for pair in demo.world.training_pairs(demo.seed)
        if pair.name in runs
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
