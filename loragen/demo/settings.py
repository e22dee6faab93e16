"""How the demo is trained: the real commands' configurations, at the size of a toy world."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from loragen.core.config import DEMO, GenTrainConfig, LoraTrainConfig, Override, load

Model = TypeVar("Model", LoraTrainConfig, GenTrainConfig)

PROMPTS = 16
MULTI_TASK_VAL = 200  # steps from one validation to the next
NEVER = 1_000_000  # steps: a training of seconds is not gone on with
MULTI_TASK_PATIENCE = 400  # steps without a better validation loss


def adapter_config(runs: Path, seed: int) -> LoraTrainConfig:
    """One adapter: the two stages of `lora train`, at rates for a model of 0.6 M parameters."""
    return _lora(
        runs,
        seed,
        training={"batch_size": 8},
        schedule={
            "name": "two-stage",
            "learning_rate_stage1": 2e-3,
            "learning_rate_stage2": 2e-4,
        },
        checkpoints={"optimizer": "none", "last_every": NEVER},
        loggers={"tensorboard": {}},
    )


def oracle_config(runs: Path, seed: int) -> LoraTrainConfig:
    """As one adapter, with only its last checkpoint kept."""
    config = adapter_config(runs, seed)
    config.loggers = {}
    config.checkpoints.first_step = config.training.max_steps
    return config


def multi_task_config(runs: Path, seed: int) -> LoraTrainConfig:
    """One LoRA for all datasets, trained until its validation loss stops improving."""
    steps = 2400
    return _lora(
        runs,
        seed,
        data={"val_ratio": 0.05},
        training={
            "max_steps": steps,
            "batch_size": 24,
            "val_every": MULTI_TASK_VAL,
            "patience": MULTI_TASK_PATIENCE,
        },
        schedule={"name": "constant", "learning_rate": 1.5e-3},
        trainer={"accelerator": "cpu", "gradient_clip_val": 1.0},
        checkpoints={  # the best is taken
            "optimizer": "none",
            "first_step": MULTI_TASK_VAL,
            "every": MULTI_TASK_VAL,
            "last_every": NEVER,
        },
        loggers={},
    )


def generator_config(
    experiments: Path, cache: Path, runs: Sequence[tuple[Path, Path]], seed: int
) -> GenTrainConfig:
    """`runs`, each with the rows that the generator reads of it."""
    return _built(
        GenTrainConfig,
        {
            "seed": seed,
            "experiments_dir": str(experiments),
            "sources": [{"run": str(run), "prompts": str(rows)} for run, rows in runs],
            "decoder": {"name": "hyperconv", "blocks": 1, "hidden_dim": 128, "rank": 32},
            "layout": {"token_dim": 128},
            "data": {
                "batch_size": 16,
                "prompts_per_condition": PROMPTS,
                "samples_per_prompt": 1,
                "cache_dir": str(cache),
            },
            "training": {"condition_noise": 0.5, "val_every_epochs": 4, "val_rows": 16},
            "behaviour": {"max_steps": 200, "learning_rate": 1e-3},
            "loggers": {"tensorboard": {}},
            "trainer": {"accelerator": "cpu"},
        },
    )


def _lora(runs: Path, seed: int, **sections: Any) -> LoraTrainConfig:
    ours = {
        "base_model": DEMO,
        "seed": seed,
        "runs_dir": str(runs),
        "final_model": "none",
        "lora": {"rank": 4, "alpha": 32},
        "trainer": {"accelerator": "cpu"},
    }
    return _built(LoraTrainConfig, ours | sections)


def _built(model: type[Model], values: dict[str, Any]) -> Model:
    """As from a file: validated, with the plugins' own defaults. The environment has no say."""
    overrides = [Override((key,), value, "demo") for key, value in values.items()]
    return load(model, flags=overrides, environment={})
