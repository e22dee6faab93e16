"""Compares settings of a generator on the adapters that a demo has collected.

    loragen demo --seed 0 --output demo-out
    python benchmarks/demo_ablation.py demo-out \
        --variant "reconstruction: training.objective=reconstruction" \
        --variant "behaviour: training.objective=behaviour behaviour.max_steps=800"
    python benchmarks/demo_ablation.py demo-out --hold-out legs --hold-out list

Every variant is the demo's configuration with the named settings changed, trained on the runs in
`demo-out/runs`. With `--hold-out`, the runs of an attribute or style are held out, once for each
that is named, and their datasets are the new combinations. The score is that of the demo: exact
match on creatures that no training row names, as the mean over 5 draws of 16 prompts with the 95 %
interval. A second column has adapters generated from gibberish (the control of `gen eval`), a third
the additive adapter for a known attribute and style (`_known_task.py`). Prints one JSON line per
variant.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from _known_task import KnownTask

from loragen.core.base.load import load_base
from loragen.core.config import DEMO, GenTrainConfig, dump, load
from loragen.core.evaluation.contest import results_document, score_contestants, training_sources
from loragen.core.evaluation.contestants import (
    GENERATED,
    EvaluationOptions,
    EvaluationSetup,
    GeneratedAdapters,
    GibberishPrompts,
)
from loragen.core.evaluation.targets import Target
from loragen.core.generator.model import Generator
from loragen.core.learning.train import train
from loragen.core.progress import Silent
from loragen.demo.run import PROMPTS, choose_targets, generator_config, runs_with_prompts
from loragen.demo.world import PAIRS, Demo, World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("demo", type=Path, help="The --output of a demo.")
    parser.add_argument(
        "--seed", type=int, help="The seed of that demo; by default, that in its results.json."
    )
    parser.add_argument("--variant", action="append", default=[], help="NAME: KEY=VALUE ...")
    parser.add_argument("--hold-out", action="append", default=[], help="An attribute or a style.")
    parser.add_argument("--draws", type=int, default=5)
    arguments = parser.parse_args()
    seed = arguments.seed
    if seed is None:
        seed = json.loads((arguments.demo / "results.json").read_text(encoding="utf-8"))["seed"]
    world = World.load(arguments.demo / "world.yaml")
    for part, variant in product(arguments.hold_out or [None], arguments.variant or ["as it is:"]):
        name, _, changed = variant.partition(":")
        demo = Demo(arguments.demo, seed, without(world, seed, part))
        targets = [one for one in choose_targets(demo) if has_part(one, part)]
        found = judged(demo, targets, changed.split(), arguments.draws)
        print(json.dumps({"variant": name, "held_out": part, **found}), flush=True)


def without(world: World, seed: int, part: str | None) -> World:
    """Returns the world with all pairs of an attribute or style held out, too."""
    kept = world.held_out_pairs(seed)
    return replace(world, held_out=tuple(p for p in PAIRS if p in kept or part in p))


def has_part(target: Target, part: str | None) -> bool:
    """Returns whether a target is evaluated if `part` is held out."""
    return part is None or target.group == "new_wording" or part in target.name.split("-")


def judged(demo: Demo, targets: Sequence[Target], changed: list[str], draws: int) -> dict[str, Any]:
    """Trains a generator with other settings; returns its seconds, accuracies and intervals."""
    folders = sorted(path for path in (demo.out / "runs").iterdir() if path.is_dir())
    collected = {path.name.partition("_lora_")[0]: path for path in folders}
    runs = runs_with_prompts(demo, collected)
    with tempfile.TemporaryDirectory() as folder:
        standard = generator_config(Path(folder), demo.out / "cache", runs, demo.seed)
        file = Path(folder) / "generator.yaml"
        file.write_text(dump(standard), encoding="utf-8")
        config = load(GenTrainConfig, file, settings=changed, environment={})
        started = time.perf_counter()
        generator = Generator.load(train(config, Silent()).directory)
        seconds = time.perf_counter() - started
    options = EvaluationOptions(prompts=PROMPTS, draws=draws, choices=False)
    sources = training_sources(generator)
    setup = EvaluationSetup(load_base(DEMO), generator, sources, options=options)
    columns = [GeneratedAdapters, GibberishPrompts, KnownTask]
    outcomes = score_contestants(setup, columns, targets, targets)
    results = results_document(outcomes, setup, None)
    return {
        "datasets": len(runs),
        "train_seconds": round(seconds, 1),
        **{split: of[GENERATED] for split, of in results["accuracy"].items()},
        "interval": {split: of[GENERATED] for split, of in results["interval"].items()},
        **{
            column.name: {split: of[column.name] for split, of in results["accuracy"].items()}
            for column in columns[1:]
        },
        "chosen_by": generator.provenance["chosen_by"],
    }


if __name__ == "__main__":
    main()
