"""The demo: the whole path on the made-up world, and the table that judges it.

Collect one adapter per training pair, train a generator on them, generate adapters for targets
that were held out, and put them beside everything simpler.
"""

import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loragen.core.adapters import Adapter, read_adapter
from loragen.core.base_models import DEMO, BaseModel, load_base
from loragen.core.config import LoraTrainConfig
from loragen.core.errors import UsageError
from loragen.core.files import write_json, write_text
from loragen.core.generator.model import Generator
from loragen.core.generator.train import train as train_generator
from loragen.core.lora.train import train as train_lora
from loragen.core.progress import Progress, Silent
from loragen.core.protocols import Encoder
from loragen.core.runs import generator_file
from loragen.demo import settings
from loragen.demo.contest import Contest, Target
from loragen.demo.world import WORLD_FILE, Pair, Wording, World

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


def run(
    out: Path, seed: int, world_file: Path | None, force: bool, say: Say, progress: Progress
) -> dict[str, Any]:
    """Runs the demo into `out` and returns what `results.json` holds."""
    started = time.perf_counter()
    world = World.load(world_file)
    _make_room(out, force)
    demo = Demo(out, seed, world, say, progress)
    write_data(demo, world_file or WORLD_FILE)
    base = load_base(DEMO)

    training = world.training_pairs(seed)
    runs, seconds_each = collect(demo, base, training)
    multi_task = train_multi_task(demo, base, training)
    generator = learn(demo, runs)
    targets = choose_targets(demo)
    oracles = train_oracles(demo, base, targets)
    encoder: Encoder = generator.load_encoder()
    contest = Contest(
        base, generator, encoder, runs, multi_task, oracles, demo.out / "generated", say
    )
    table = contest.hold(targets)
    results = {
        "accuracy": table.accuracy,
        "spread": table.spread,
        "seconds": {
            "train_adapter": round(seconds_each, 3),
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
    from loragen.demo.world import PAIRS

    shutil.copyfile(world_file, demo.out / "world.yaml")
    for pair in PAIRS:
        for wordings in ("train", "unseen"):
            for split, rows in (
                ("train", demo.world.train_rows(pair, wordings=wordings)),
                ("test", demo.world.test_rows(pair, wordings)),
            ):
                lines = "".join(json.dumps(row) + "\n" for row in rows)
                write_text(demo.data(pair, split, wordings), lines)


def collect(demo: Demo, base: BaseModel, pairs: Sequence[Pair]) -> tuple[list[Path], float]:
    """The run directories of the training pairs, and the seconds that each took on average."""
    config = settings.adapter_config(demo.out / "runs", demo.seed, logs=True)
    started = time.perf_counter()
    runs = []
    for count, pair in enumerate(pairs, start=1):
        runs.append(_train(config, pair.name, demo.data(pair, "train", "train"), base))
        each = (time.perf_counter() - started) / count
        if count % 8 == 0 or count == len(pairs):
            demo.say(f"collect: {count}/{len(pairs)} adapters, {each:.1f} s each")
    return runs, each


def train_multi_task(demo: Demo, base: BaseModel, pairs: Sequence[Pair]) -> Adapter:
    """One LoRA on the rows of all training pairs."""
    texts = [demo.data(pair, "train", "train").read_text(encoding="utf-8") for pair in pairs]
    file = demo.out / "data" / "multi-task" / "train.jsonl"
    write_text(file, "".join(texts))
    config = settings.multi_task_config(demo.out / "multi_task", demo.seed)
    started = time.perf_counter()
    run = train_lora(config, "multi-task", file, base, Silent())
    demo.say(
        f"multi-task: stopped after {run.manifest.steps[-1]} steps, validation loss not better for "
        f"{settings.MULTI_TASK_PATIENCE} ({time.perf_counter() - started:.0f} s)"
    )
    return read_adapter(run.directory / "adapter")


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


def train_oracles(demo: Demo, base: BaseModel, targets: Sequence[Target]) -> dict[Path, Adapter]:
    """Per target a LoRA trained on its own labels, in the same wordings."""
    config = settings.oracle_config(demo.out / "oracles", demo.seed)
    started = time.perf_counter()
    oracles = {}
    for target in targets:
        run = _train(config, target.pair.name, target.train_file, base)
        oracles[target.train_file] = read_adapter(run / "adapter")
    demo.say(f"oracles: {len(targets)} adapters in {time.perf_counter() - started:.0f} s")
    return oracles


def _train(config: LoraTrainConfig, name: str, file: Path, base: BaseModel) -> Path:
    return train_lora(config, name, file, base, Silent()).directory


def _make_room(out: Path, force: bool) -> None:
    """Raises UsageError rather than touch anything that is not an earlier demo."""
    if out.exists() and any(out.iterdir()):
        if not force:
            raise UsageError(f"{out} exists already; choose another --out or add --force")
        if not (out / "world.yaml").is_file():
            raise UsageError(f"{out} is not the directory of a demo; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
