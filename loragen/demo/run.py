"""The stages of `loragen demo`, with the configurations of the commands.

One adapter is collected for each training pair, a generator is trained on them, and adapters
generated for held-out pairs are compared with the baselines of `gen eval`. Trainings and the
contest run in worker processes (`workers.py`).
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch

from loragen.core.config import DEMO, GenTrainConfig, LoraTrainConfig, Override, load
from loragen.core.data.dataset import Dataset
from loragen.core.evaluation.contest import hold_contest, training_sources
from loragen.core.evaluation.contestants import (
    ARROW,
    MULTI_TASK,
    ORACLE,
    EvaluationOptions,
    EvaluationSetup,
    TrainedAdapter,
    choose,
)
from loragen.core.evaluation.report import write_results
from loragen.core.evaluation.targets import Target
from loragen.core.evaluation.training import best_checkpoint
from loragen.core.files import write_text
from loragen.core.generator.model import Generator
from loragen.core.learning.arrays import embed_prompts_ahead
from loragen.core.learning.sources import TrainingSource
from loragen.core.learning.train import train as train_generator
from loragen.core.progress import Progress
from loragen.core.run.directory import LoraRun, generator_file
from loragen.demo.workers import base, train_in_worker
from loragen.demo.world import Demo, Pair, Wording

log = logging.getLogger(__name__)

Config = TypeVar("Config", LoraTrainConfig, GenTrainConfig)

SPLITS: dict[str, Wording] = {
    "new_wording": "unseen",  # of training pairs
    "new_combination": "train",  # of held-out pairs
    "both": "unseen",  # of held-out pairs
}
PROMPTS = 16
"""The number of prompts of a condition, and of a draw."""
MULTI_TASK_STEPS, MULTI_TASK_VAL_EVERY, MULTI_TASK_PATIENCE = 2400, 200, 400
NO_RESUME = 1_000_000
"""The interval of last.ckpt in steps; a training of seconds is never resumed."""
COLUMNS = [one for one in choose([], also=[MULTI_TASK, ORACLE]) if one.name != ARROW]
"""Without the columns for which all collected adapters have to be loaded with the base, or another
adapter to be trained."""


def demo_results(demo: Demo, pool: Executor, progress: Progress) -> dict[str, Any]:
    """Runs the demo with the workers of `worker_pool`; returns the content of results.json."""
    torch.set_num_threads(1)  # the workers have the other cores

    # Start all trainings, the longest first.
    targets = choose_targets(demo)
    datasets = [
        Dataset(demo.data_file(pair, "train", "train"), pair.name)
        for pair in demo.world.training_pairs(demo.seed)
    ]
    texts = [Path(str(dataset.source)).read_text(encoding="utf-8") for dataset in datasets]
    all_rows = demo.out / "data" / "multi-task" / "train.jsonl"
    write_text(all_rows, "".join(texts))
    config = joint_config(demo.out / "multi_task", demo.seed)
    multi_task = pool.submit(train_in_worker, config, Dataset(all_rows, "multi-task"))
    config = adapter_config(demo.out / "runs", demo.seed)
    adapters = [pool.submit(train_in_worker, config, dataset) for dataset in datasets]
    config = oracle_config(demo.out / "oracles", demo.seed)
    oracles = [pool.submit(train_in_worker, config, one.train) for one in targets if one.train]

    # Embed prompts while adapters are trained, and train the generator while oracles are trained.
    def generator_config_of(runs: Sequence[LoraRun]) -> GenTrainConfig:
        with_prompts = runs_with_prompts(
            demo, {run.manifest.dataset.name: run.directory for run in runs}
        )
        cache = demo.out / "cache"
        return generator_config(demo.out / "experiments", cache, with_prompts, demo.seed)

    collected = _finished(
        "collect", adapters, lambda runs: embed_prompts_ahead(generator_config_of(runs))
    )
    experiment = train_generator(generator_config_of(collected), progress)
    oracle_runs = _finished("oracles", oracles)
    (multi_task_run,) = _finished("multi-task", [multi_task])
    joint = TrainedAdapter(multi_task_run, best_checkpoint(multi_task_run))
    log.info("multi-task: stopped after %d steps, %.0f s", joint.steps, joint.seconds)

    # Hold the contest, in the workers again.
    shared = DemoSetup(
        generator_file(experiment.directory),
        joint,
        {
            target.key: TrainedAdapter(run, run.checkpoints[-1])
            for target, run in zip(targets, oracle_runs, strict=True)
        },
        demo.out / "generated",
    )

    def submit(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        return pool.submit(_call, shared, function, *arguments)

    results = hold_contest(shared.setup(), COLUMNS, targets, submit)
    results |= {
        "generator": str(generator_file(experiment.directory)),
        "seed": demo.seed,
        "held_out": [list(pair) for pair in demo.world.held_out_pairs(demo.seed)],
        "multi_task": {"steps": joint.steps, "patience": MULTI_TASK_PATIENCE},
    }
    seconds = results["seconds"]
    seconds["trained"] = "trained side by side, one thread each"
    seconds["total"] = round(time.perf_counter() - demo.started, 1)
    title = (
        f"Accuracy on unseen creatures (seed {demo.seed}): an adapter trained in "
        f"{seconds['train_adapter']:.1f} s, generated in {seconds['generate_adapter']:.2f} s"
    )
    write_results(results, title, demo.out)
    return results


def choose_targets(demo: Demo) -> list[Target]:
    """Returns held-out pairs in both wordings, and as many training pairs in unseen wordings."""
    held_out = demo.world.held_out_pairs(demo.seed)
    seen = demo.world.sample_training_pairs(demo.seed, len(held_out))
    chosen = {"new_wording": seen, "new_combination": held_out, "both": held_out}
    return [demo_target(demo, split, pair) for split, pairs in chosen.items() for pair in pairs]


def demo_target(demo: Demo, split: str, pair: Pair) -> Target:
    """Returns a pair's test dataset. The generator reads prompts about the test creatures; only the
    oracle and few-shot prompting read the labelled rows about the training creatures."""
    test, train = (demo.data_file(pair, kind, SPLITS[split]) for kind in ("test", "train"))
    dataset = Dataset(test, pair.name)
    return Target.of(dataset, Dataset(train, pair.name), group=split, prompts_from="tested rows")


def _finished(
    title: str,
    futures: Sequence[Future[LoraRun]],
    meanwhile: Callable[[Sequence[LoraRun]], object] | None = None,
) -> list[LoraRun]:
    """Returns the runs in the order of their jobs. After every eighth, logs a line and, while there
    are others, calls `meanwhile` with the runs that have finished."""
    runs: list[LoraRun] = []
    for future in as_completed(futures):
        runs.append(future.result())
        if len(runs) % 8 == 0:
            each = fmean(run.manifest.seconds or 0.0 for run in runs)
            log.info("%s: %d/%d adapters, %.1f s each", title, len(runs), len(futures), each)
            if meanwhile and len(runs) < len(futures):
                meanwhile(runs)
    return [future.result() for future in futures]


@dataclass(frozen=True)
class DemoSetup:
    """The files from which a process loads the `EvaluationSetup` of the contest."""

    generator: Path
    multi_task: TrainedAdapter
    oracles: Mapping[tuple[str, str], TrainedAdapter]
    keep: Path
    """The directory of the generated adapters."""

    def setup(self) -> EvaluationSetup:
        generator, sources = _load_generator(self.generator)
        options = EvaluationOptions(prompts=PROMPTS, choices=False, keep=self.keep)
        return EvaluationSetup(
            base(), generator, sources, self.multi_task, self.oracles, options=options
        )


def _call(shared: DemoSetup, function: Callable[..., Any], *arguments: Any) -> Any:
    """Runs a part of the contest in a worker."""
    return function(shared.setup(), *arguments)


@cache
def _load_generator(file: Path) -> tuple[Generator, list[TrainingSource]]:
    """Returns the generator and its training sources, loaded once per process."""
    generator = Generator.load(file)
    return generator, training_sources(generator)


def adapter_config(runs: Path, seed: int) -> LoraTrainConfig:
    """Returns the settings of one dataset's adapter: the two stages of `lora train`, with learning
    rates for a model of 0.6 M parameters."""
    return _lora_config(
        runs,
        seed,
        training={"batch_size": 8},
        schedule={
            "name": "two-stage",
            "learning_rate_stage1": 2e-3,
            "learning_rate_stage2": 2e-4,
        },
        checkpoints={"optimizer": "none", "last_every": NO_RESUME},
        loggers={"tensorboard": {}},
    )


def oracle_config(runs: Path, seed: int) -> LoraTrainConfig:
    """Returns the settings of one dataset's adapter, with only the last checkpoint kept."""
    config = adapter_config(runs, seed)
    config.loggers = {}
    config.checkpoints.first_step = config.training.max_steps
    return config


def joint_config(runs: Path, seed: int) -> LoraTrainConfig:
    """Returns the settings of one LoRA for all datasets, with early stopping."""
    return _lora_config(
        runs,
        seed,
        data={"val_ratio": 0.05},
        training={
            "max_steps": MULTI_TASK_STEPS,
            "batch_size": 24,
            "val_every": MULTI_TASK_VAL_EVERY,
            "patience": MULTI_TASK_PATIENCE,
        },
        schedule={"name": "constant", "learning_rate": 1.5e-3},
        trainer={"accelerator": "cpu", "gradient_clip_val": 1.0},
        checkpoints={  # at every validation; the best one is used
            "optimizer": "none",
            "first_step": MULTI_TASK_VAL_EVERY,
            "every": MULTI_TASK_VAL_EVERY,
            "last_every": NO_RESUME,
        },
        loggers={},
    )


def _lora_config(runs: Path, seed: int, **sections: Any) -> LoraTrainConfig:
    common = {
        "base_model": DEMO,
        "seed": seed,
        "runs_dir": str(runs),
        "lora": {"rank": 4, "alpha": 32},
        "trainer": {"accelerator": "cpu"},
    }
    return _validated(LoraTrainConfig, common | sections)


def generator_config(
    experiments: Path, cache: Path, runs: Sequence[tuple[Path, Path]], seed: int
) -> GenTrainConfig:
    """Returns the settings of a generator; each run comes with the file of its prompts."""
    return _validated(
        GenTrainConfig,
        {
            "seed": seed,
            "experiments_dir": str(experiments),
            "sources": [{"run": str(run), "prompts": str(rows)} for run, rows in runs],
            "decoder": {"name": "mixture", "hidden_dim": 256},
            "layout": {"token_dim": 128},
            "data": {
                "batch_size": 16,
                "prompts_per_condition": PROMPTS,
                "samples_per_prompt": 1,
                "cache_dir": str(cache),
            },
            "training": {
                "objective": "transfer",
                "condition_noise": 0.5,
                "val_every_epochs": 4,
                "val_rows": 16,
            },
            "behaviour": {"max_steps": 200, "learning_rate": 1e-3, "rows_per_adapter": 8},
            "loggers": {"tensorboard": {}},
            "trainer": {"accelerator": "cpu"},
        },
    )


def runs_with_prompts(demo: Demo, runs: Mapping[str, Path]) -> list[tuple[Path, Path]]:
    """Returns the runs in the order of the training pairs, each with its dataset's prompts."""
    return [
        (runs[pair.name], demo.data_file(pair, "prompts", "train"))
        for pair in demo.world.training_pairs(demo.seed)
        if pair.name in runs
    ]


def _validated(kind: type[Config], values: dict[str, Any]) -> Config:
    """Returns a validated configuration, without settings from the environment."""
    overrides = [Override((key,), value, "demo") for key, value in values.items()]
    return load(kind, flags=overrides, environment={})
