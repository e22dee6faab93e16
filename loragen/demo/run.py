"""The demo: the whole path on the made-up world, and the table that judges it.

Collect one adapter per training pair, train a generator on them, generate adapters for targets
that were held out, and put them beside everything simpler.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from loragen.core.adapters import Adapter, read_adapter
from loragen.core.base_models import DEMO, load_base
from loragen.core.errors import UsageError
from loragen.core.files import write_json, write_text
from loragen.core.generator.model import Generator
from loragen.core.generator.train import train as train_generator
from loragen.core.progress import Progress
from loragen.core.protocols import Encoder
from loragen.core.runs import generator_file
from loragen.demo import settings
from loragen.demo.contest import Contest, Target
from loragen.demo.workers import Done, Job, Workers, as_they_finish
from loragen.demo.world import PAIRS, WORLD_FILE, Pair, Wording, World

SPLITS: dict[str, Wording] = {
    "new_wording": "unseen",  # of training pairs
    "new_combination": "train",  # of held-out pairs
    "both": "unseen",  # of held-out pairs
}
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


@dataclass(frozen=True)
class Trained:
    """What gradient descent made."""

    runs: list[Path]
    seconds_each: float
    multi_task: Adapter
    oracles: dict[Path, Adapter]
    """By the file each was trained on."""


def run(
    out: Path, seed: int, world_file: Path | None, force: bool, say: Say, progress: Progress
) -> dict[str, Any]:
    """Runs the demo into `out` and returns what `results.json` holds."""
    started = time.perf_counter()
    world = World.load(world_file)
    _make_room(out, force)
    demo = Demo(out, seed, world, say, progress)
    write_data(demo, world_file or WORLD_FILE)
    targets = choose_targets(demo)
    trained = train_adapters(demo, targets)
    generator = learn(demo, trained.runs)
    encoder: Encoder = generator.load_encoder()
    contest = Contest(
        load_base(DEMO),
        generator,
        encoder,
        trained.runs,
        trained.multi_task,
        trained.oracles,
        out / "generated",
    )
    table = contest.hold(targets)
    results = {
        "accuracy": table.accuracy,
        "spread": table.spread,
        "seconds": {
            "train_adapter": round(trained.seconds_each, 3),
            "generate_adapter": round(table.seconds_to_generate, 4),
            "total": round(time.perf_counter() - started, 1),
        },
        "seed": seed,
        "held_out": [list(pair) for pair in world.held_out_pairs(seed)],
        "targets": {split: [t.pair.name for t in targets if t.split == split] for split in SPLITS},
    }
    write_json(out / "results.json", results)
    return results


def write_data(demo: Demo, world_file: Path) -> None:
    """The world file, and every dataset in both kinds of wording."""
    shutil.copyfile(world_file, demo.out / "world.yaml")
    for pair in PAIRS:
        for wordings in ("train", "unseen"):
            for split, rows in (
                ("train", demo.world.train_rows(pair, wordings=wordings)),
                ("test", demo.world.test_rows(pair, wordings)),
            ):
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                write_text(demo.data(pair, split, wordings), lines)


def train_adapters(demo: Demo, targets: Sequence[Target]) -> Trained:
    """The collection, the multi-task LoRA and the oracles, all by `lora train`."""
    pairs = demo.world.training_pairs(demo.seed)
    config = settings.adapter_config(demo.out / "runs", demo.seed)
    collection = [Job(pair.name, demo.data(pair, "train", "train"), config) for pair in pairs]
    config = settings.oracle_config(demo.out / "oracles", demo.seed)
    oracles = [Job(target.pair.name, target.train_file, config) for target in targets]
    with Workers() as workers:
        multi_task = workers.submit([_multi_task_job(demo, pairs)])  # the longest goes first
        collected = _watched(demo, "collect", workers.submit(collection))
        judged = _watched(demo, "oracles", workers.submit(oracles))
        everything = next(as_they_finish(multi_task))
    demo.say(
        f"multi-task: {everything.steps} steps in {everything.seconds:.0f} s, until the validation "
        f"loss had not improved for {settings.MULTI_TASK_PATIENCE}"
    )
    order = [job.name for job in collection]
    collected.sort(key=lambda done: order.index(done.job.name))
    return Trained(
        runs=[done.directory for done in collected],
        seconds_each=fmean(done.seconds for done in collected),
        multi_task=read_adapter(everything.directory / "adapter"),
        oracles={done.job.file: read_adapter(done.directory / "adapter") for done in judged},
    )


def _multi_task_job(demo: Demo, pairs: Sequence[Pair]) -> Job:
    """One LoRA on the rows of all training pairs."""
    texts = [demo.data(pair, "train", "train").read_text(encoding="utf-8") for pair in pairs]
    file = demo.out / "data" / "multi-task" / "train.jsonl"
    write_text(file, "".join(texts))
    config = settings.multi_task_config(demo.out / "multi_task", demo.seed)
    return Job("multi-task", file, config)


def _watched(demo: Demo, title: str, futures: Sequence[Future[Done]]) -> list[Done]:
    """Results as they come, with a line after every eighth."""
    finished: list[Done] = []
    for done in as_they_finish(futures):
        finished.append(done)
        if len(finished) % 8 == 0 or len(finished) == len(futures):
            each = fmean(one.seconds for one in finished)
            demo.say(f"{title}: {len(finished)}/{len(futures)} adapters, {each:.1f} s each")
    return finished


def learn(demo: Demo, runs: Sequence[Path]) -> Generator:
    """The generator, trained on the collected runs."""
    config = settings.generator_config(
        demo.out / "experiments", demo.out / "cache", list(runs), demo.seed
    )
    run = train_generator(config, demo.progress)
    return Generator.load(generator_file(run.directory))


def choose_targets(demo: Demo) -> list[Target]:
    """The held-out pairs in both wordings, and as many training pairs in unseen wordings."""
    held_out = demo.world.held_out_pairs(demo.seed)
    seen = demo.world.sample_training_pairs(demo.seed, len(held_out))
    chosen = {"new_wording": seen, "new_combination": held_out, "both": held_out}
    return [
        Target(
            split=split,
            pair=pair,
            train_file=demo.data(pair, "train", SPLITS[split]),
            test_file=demo.data(pair, "test", SPLITS[split]),
        )
        for split, pairs in chosen.items()
        for pair in pairs
    ]


def _make_room(out: Path, force: bool) -> None:
    """Raises UsageError rather than touch anything that is not an earlier demo."""
    if out.exists() and any(out.iterdir()):
        if not force:
            raise UsageError(f"{out} exists already; choose another --out or add --force")
        if not (out / "world.yaml").is_file():
            raise UsageError(f"{out} is not the directory of a demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
