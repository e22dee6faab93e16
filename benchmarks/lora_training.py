"""Compares `loragen lora train` with a plain loop of `transformers.Trainer` and PEFT.

    python benchmarks/lora_training.py --data ROWS.jsonl                        # a tiny model
    python benchmarks/lora_training.py --data ROWS.jsonl --model DIR --steps 4  # its architecture

Both start from the same random weights and adapter, train on the same rows in the same batches with
the same learning rates, and run alternately, each in its own process. The table has seconds per
step and rows per second after the first step, peak memory, the largest difference of the loss
curves, and the cost of checkpoints. Absolute times depend on the machine, so compare ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

RATES = {"stage1_steps": 3, "learning_rate_stage1": 1e-3, "learning_rate_stage2": 1e-4}
# {arm: settings of `lora train`}; None is the Trainer, the baseline, which comes first.
ARMS: dict[str, dict[str, Any] | None] = {
    "transformers.Trainer": None,
    "loragen, padded": {"training.packing": False, "base_dtype": "float32"},
    "loragen": {"base_dtype": "float32"},
    "loragen, base in bfloat16": {"base_dtype": "bfloat16"},
}


@dataclass
class Measured:
    """The measurements of one training."""

    seconds: list[float]
    """The seconds of every step but the first."""
    losses: list[float]
    peak_gib: float
    checkpoint_mib: float = 0.0
    checkpoint_seconds: float = 0.0
    """The seconds to write one checkpoint, with the optimizer's state."""


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(asdict(_measure(json.loads(arguments.worker)))))
        return
    if arguments.data is None:
        parser.error("--data ROWS is required")
    with tempfile.TemporaryDirectory() as folder:
        model = _random_model(arguments.model, arguments.data, Path(folder) / "model")
        results: dict[str, list[Measured]] = {arm: [] for arm in arguments.arms}
        for _ in range(arguments.rounds):
            for arm in arguments.arms:
                results[arm].append(_in_a_process(arguments, arm, model, folder))
                print(f"  {arm}: {median(results[arm][-1].seconds):.3f} s a step", file=sys.stderr)
    _report(results, arguments.batch_size)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", type=Path, help="rows to train on")
    parser.add_argument("--model", type=Path, help="a directory with config and tokenizer")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser


def _random_model(source: Path | None, data: Path, target: Path) -> Path:
    """Writes a model with random weights: of `source`'s architecture, or a tiny Qwen2 with a
    vocabulary of 4,000 learned from the rows. Returns its directory."""
    import torch
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        Qwen2Config,
        Qwen2Tokenizer,
    )

    torch.manual_seed(0)
    if source:
        tokenizer = AutoTokenizer.from_pretrained(source)
        config = AutoConfig.from_pretrained(source)
    else:
        texts = data.read_text(encoding="utf-8").splitlines()
        tokenizer = Qwen2Tokenizer(vocab=None, merges=None).train_new_from_iterator(texts, 4000)
        config = Qwen2Config(
            vocab_size=4000,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def _in_a_process(arguments: argparse.Namespace, arm: str, model: Path, folder: str) -> Measured:
    job = {
        "arm": arm,
        "model": str(model),
        "data": str(arguments.data.absolute()),
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "runs": folder,
    }
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(job)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _measure(job: dict[str, Any]) -> Measured:
    settings = ARMS[job["arm"]]
    return _trainer(job) if settings is None else _loragen(job, settings)


def _config(job: dict[str, Any], settings: dict[str, Any]) -> Any:
    from loragen.core.config import LoraTrainConfig, Override, load

    ours = {
        "base_model": job["model"],
        "runs_dir": job["runs"],
        "training.batch_size": job["batch_size"],
        "training.max_steps": job["steps"],
        "checkpoints.first_step": job["steps"],
        "checkpoints.last_every": job["steps"],
        "final_model": "none",
        "loggers": {},
        **{f"schedule.{key}": value for key, value in RATES.items()},
        **settings,
    }
    flags = [Override(tuple(key.split(".")), value, key) for key, value in ours.items()]
    return load(LoraTrainConfig, flags=flags, environment={})


def _loragen(job: dict[str, Any], settings: dict[str, Any]) -> Measured:
    from loragen.core.base.load import load_training_base
    from loragen.core.data.dataset import Dataset
    from loragen.core.lora.train import train_adapter
    from loragen.core.progress import Silent, Step

    times, losses = [], []

    class Watch(Silent):
        def step(self, step: Step) -> None:
            times.append(time.perf_counter())
            losses.append(step.loss)

    config = _config(job, settings)
    dataset = Dataset(Path(job["data"]), "rows")
    run = train_adapter(config, dataset, load_training_base(config), Watch())
    file = max((run.directory / "checkpoints").iterdir())
    return Measured(
        _differences(times),
        losses,
        _peak_gib(),
        checkpoint_mib=file.stat().st_size / 2**20,
        checkpoint_seconds=_seconds_to_write(file),
    )


def _trainer(job: dict[str, Any]) -> Measured:
    """Trains with transformers and PEFT: labels for the answers alone, dynamic padding."""
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import (
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from loragen.core.base.load import load_base
    from loragen.core.data.batches import batch_indices
    from loragen.core.data.dataset import Dataset
    from loragen.core.lora.data import load_rows
    from loragen.core.lora.train import new_adapter
    from loragen.core.plugins import create

    config = _config(job, {})
    base = load_base(job["model"], torch.float32)
    dataset = Dataset(Path(job["data"]), "rows")
    rows = load_rows(config, dataset, base.tokenizer).training
    order = [
        index
        for step in range(job["steps"])
        for index in batch_indices(len(rows), job["batch_size"], config.seed, step)
    ]
    dataset = [
        {
            "input_ids": rows[i].ids,
            "attention_mask": [1] * len(rows[i].ids),
            "labels": [-100] * (len(rows[i].ids) - rows[i].num_label_tokens)
            + rows[i].ids[-rows[i].num_label_tokens :],
        }
        for i in order
    ]
    model = new_adapter(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0, fused=True)
    schedule = create("schedule", "two-stage", RATES)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: schedule(done + 1, job["steps"]).learning_rate
    )
    times: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    class InOrder(Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(dataset)  # type: ignore[arg-type]  # a list has a length

    trainer = InOrder(
        model=model,
        args=TrainingArguments(
            output_dir=job["runs"] + "/trainer",
            per_device_train_batch_size=job["batch_size"],
            max_steps=job["steps"],
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
            max_grad_norm=0.0,
        ),
        train_dataset=dataset,  # type: ignore[arg-type]  # a list can be indexed
        data_collator=DataCollatorForSeq2Seq(base.tokenizer),
        optimizers=(optimizer, rates),
        callbacks=[Watch()],
    )
    stdout, sys.stdout = sys.stdout, sys.stderr  # the Trainer prints its logs
    trainer.train()
    sys.stdout = stdout
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return Measured(_differences(times), [float(loss) for loss in losses], _peak_gib())


def _seconds_to_write(file: Path) -> float:
    """Returns the median time of writing the checkpoint's content, of ten."""
    import torch

    from loragen.core.run.checkpoints import AtomicCheckpointIO

    document, seconds = torch.load(file, weights_only=True), []
    for _ in range(10):
        began = time.perf_counter()
        AtomicCheckpointIO().save_checkpoint(document, file.with_suffix(".again"))
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def _differences(times: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(times)]


def _peak_gib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _report(results: dict[str, list[Measured]], batch_size: int) -> None:
    baseline = next(iter(results))
    base_seconds = [median(one.seconds) for one in results[baseline]]
    curve = results[baseline][0].losses
    print(f"{'':28} s/step  rows/s  ratio  peak GiB  loss differs  50 checkpoints")
    for arm, rounds in results.items():
        seconds = [median(one.seconds) for one in rounds]
        ratio = median(a / b for a, b in zip(base_seconds, seconds, strict=True))
        differs = max(abs(a - b) for a, b in zip(curve, rounds[0].losses, strict=True))
        line = (
            f"{arm:28} {median(seconds):6.3f}  {batch_size / median(seconds):6.2f}  {ratio:5.2f}"
            f"  {max(one.peak_gib for one in rounds):8.2f}  {differs:12.1e}"
        )
        if rounds[0].checkpoint_mib:
            cost = 50 * rounds[0].checkpoint_seconds / (125 * median(seconds))
            line += (
                f"  {rounds[0].checkpoint_mib * 50 / 1000 * 1.048576:.3f} GB, {cost:.1%} of a run"
            )
        print(line)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
