"""Compares `loragen lora train` with transformers' Trainer + PEFT and with TRL on a real base.

    pip install -e ".[benchmarks]" -c constraints.txt
    python benchmarks/lora_training.py --base DIR --rows easy=ROWS.jsonl --rows instructions

Every contestant ("arm") trains the same initial adapter on the same rows with the same learning
rates, and a step's loss is the mean over its answer tokens. All but TRL's packing, which chooses
its own batches, have the same rows in each step, so that their losses can be compared. The arms run
alternately, each in its own process. Times depend on the machine: compare the ratios, which are
computed within a round. CPU seconds say less of other work on the machine than seconds do.

Rows called `instructions` are made here: questions about Python's standard library, answered by its
docstrings of 50 to 200 tokens. They are real English and code, and depend on the Python version.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any

RATES = {"stage1_steps": 3, "learning_rate_stage1": 1e-3, "learning_rate_stage2": 1e-4}
INSTRUCTIONS = "instructions"
MODULES = (
    "argparse ast asyncio base64 calendar collections concurrent.futures configparser contextlib "
    "copy csv datetime decimal difflib email.message enum fractions functools gettext gzip hashlib "
    "heapq html http.client inspect io ipaddress itertools json locale logging mailbox math "
    "multiprocessing operator os os.path pathlib pickle platform queue random re sched selectors "
    "shutil signal socket sqlite3 ssl statistics string struct subprocess tarfile tempfile "
    "textwrap threading time timeit tokenize traceback types typing unittest unittest.mock "
    "urllib.parse urllib.request uuid warnings weakref xml.dom.minidom xml.etree.ElementTree "
    "zipfile"
)
QUESTIONS = (
    "What does {} do in Python?",
    "Explain {} from Python's standard library.",
    "I found {} in a Python program. What is it for?",
    "How is {} used?",
    "Describe {} in a few sentences.",
    "Please document {}.",
)


@dataclass(frozen=True)
class Arm:
    """One way to train the adapter."""

    library: str
    """loragen, transformers or trl."""
    dtype: str
    """The dtype of the base."""
    autocast: bool = False
    """Whether transformers and TRL compute in bfloat16 (`bf16=True`)."""
    packed: bool = True
    """Of loragen: `training.packing`; of TRL: `packing`, else `padding_free`."""


ARMS = {
    "Trainer, float32": Arm("transformers", "float32"),
    "TRL padding-free, float32": Arm("trl", "float32", packed=False),
    "TRL packing, float32": Arm("trl", "float32"),
    "loragen padded, float32": Arm("loragen", "float32", packed=False),
    "loragen, float32": Arm("loragen", "float32"),
    "Trainer, bfloat16 autocast": Arm("transformers", "float32", autocast=True),
    "Trainer, bfloat16 base": Arm("transformers", "bfloat16"),
    "Trainer, bfloat16 base and autocast": Arm("transformers", "bfloat16", autocast=True),
    "TRL padding-free, bfloat16": Arm("trl", "bfloat16", autocast=True, packed=False),
    "TRL packing, bfloat16": Arm("trl", "bfloat16", autocast=True),
    "loragen padded, bfloat16": Arm("loragen", "bfloat16", packed=False),
    "loragen, bfloat16": Arm("loragen", "bfloat16"),
}


@dataclass
class Measured:
    """The measurements of one training. The first step is left out of the times."""

    seconds: list[float]
    """The seconds of every step."""
    cpu_seconds: list[float]
    """The user and system time of the process in every step, over all threads."""
    rows: list[int]
    """The rows of every step."""
    losses: list[float]
    """The losses of all steps, in nats per answer token."""
    peak_gib: float
    refused: bool = False
    """Of loragen: whether its check refused packing."""
    checkpoint_mib: float = 0.0
    checkpoint_seconds: float = 0.0
    """The seconds to write one checkpoint, with the optimizer's state."""

    @property
    def per_row(self) -> float:
        """The median of the seconds per row."""
        return median(s / n for s, n in zip(self.seconds, self.rows, strict=True))

    @property
    def cpu_per_row(self) -> float:
        return sum(self.cpu_seconds) / sum(self.rows)


# ---------------------------------------------------------------------------- all arms in turn


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", help="a base model: what `--base-model` of `lora train` takes")
    parser.add_argument(
        "--rows",
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="rows to train on, or a folder of tasks, whose *train*.jsonl are mixed; or "
        f"{INSTRUCTIONS}",
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--output", type=Path, help="write all measurements to this JSON file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(asdict(_measure(json.loads(arguments.worker)))))
        return
    if not arguments.base or not arguments.rows:
        parser.error("--base MODEL and --rows NAME=PATH are required")
    if arguments.steps < 2:
        parser.error("--steps has to be at least 2: the first step is not timed")
    document: dict[str, Any] = {"setup": _setup(arguments), "rows": {}}
    with tempfile.TemporaryDirectory() as folder:
        for named in arguments.rows:
            name, _, path = named.partition("=")
            file, facts = _rows(name, path, arguments.base, Path(folder))
            results: dict[str, list[Measured]] = {arm: [] for arm in arguments.arms}
            for _ in range(arguments.rounds):
                for arm in arguments.arms:
                    results[arm].append(_in_a_process(arguments, arm, file, folder))
                    print(f"  {name}: {arm}: {_summary(results[arm][-1])}", file=sys.stderr)
            table = _table(results, arguments.batch_size)
            document["rows"][name] = {
                **facts,
                "table": table,
                "measured": {arm: [asdict(one) for one in every] for arm, every in results.items()},
            }
            if arguments.output:  # after every set of rows: a long measurement may be interrupted
                arguments.output.write_text(json.dumps(document, indent=1), encoding="utf-8")
            _print(name, facts, table)


def _setup(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    libraries = ("torch", "transformers", "peft", "trl", "lightning")
    return {
        "base": Path(arguments.base).name,
        "batch_size": arguments.batch_size,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "load_before": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in libraries},
    }


def _rows(name: str, path: str, base: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the file of a set of rows, and what the rows are like."""
    from loragen.core.base.load import load_tokenizer
    from loragen.core.data.dataset import Dataset
    from loragen.core.data.tokenize import TokenizedRows, shared_prefix

    tokenizer = load_tokenizer(base)
    file = folder / f"{name}.jsonl"
    if name == INSTRUCTIONS and not path:
        rows = [json.dumps(row) + "\n" for row in _docstrings(tokenizer)]
        file.write_text("".join(rows), encoding="utf-8")
    elif Path(path).is_dir():
        parts = sorted(Path(path).rglob("*train*.jsonl"))
        file.write_text("".join(p.read_text(encoding="utf-8") for p in parts), encoding="utf-8")
    else:
        file = Path(path).absolute()
    dataset = Dataset(file, name)
    sample = list(islice(TokenizedRows(dataset.rows(), tokenizer, 1024), 500))
    return file, {
        "count": len(dataset.rows()),
        "sha256": dataset.sha256,
        "median_tokens": median(len(item.ids) for item in sample),
        "median_answer_tokens": median(item.num_label_tokens for item in sample),
        "shared_tokens": shared_prefix([item.ids for item in sample]),
    }


def _docstrings(tokenizer: Any) -> list[dict[str, str]]:
    """Returns questions about functions and classes of the standard library, in an order that
    depends on nothing but their names; the answers are docstrings of 50 to 200 tokens."""
    import hashlib
    import importlib
    import inspect

    found: dict[str, str] = {}  # docstring: the name that has it first
    for module in MODULES.split():
        members = vars(importlib.import_module(module))
        for name in sorted(n for n in members if not n.startswith("_")):
            documented = {name: members[name]}
            if inspect.isclass(members[name]):
                methods = vars(members[name]).items()
                documented |= {f"{name}.{n}": m for n, m in methods if not n.startswith("_")}
            for path, thing in documented.items():
                text = getattr(thing, "__doc__", None)
                if (inspect.isclass(thing) or callable(thing)) and isinstance(text, str):
                    found.setdefault(inspect.cleandoc(text), f"`{module}.{path}`")
    rows = []
    for text, name in found.items():
        order = int(hashlib.sha256(name.encode()).hexdigest(), 16)
        if 50 <= len(tokenizer(text).input_ids) <= 200:
            prompt = QUESTIONS[order % len(QUESTIONS)].format(name)
            rows.append((order, {"prompt": prompt, "response": text}))
    return [row for _, row in sorted(rows, key=lambda item: item[0])]


def _in_a_process(arguments: argparse.Namespace, arm: str, file: Path, folder: str) -> Measured:
    job = {
        "arm": arm,
        "base": arguments.base,
        "data": str(file),
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


# ---------------------------------------------------------------------------- one arm


def _measure(job: dict[str, Any]) -> Measured:
    arm = ARMS[job["arm"]]
    return _loragen(job, arm) if arm.library == "loragen" else _opponent(job, arm)


def _config(job: dict[str, Any], arm: Arm) -> Any:
    from loragen.core.config import LoraTrainConfig, Override, load

    ours = {
        "base_model": job["base"],
        "base_dtype": arm.dtype,
        "runs_dir": job["runs"],
        "training.batch_size": job["batch_size"],
        "training.max_steps": job["steps"],
        "training.packing": arm.packed,
        "checkpoints.first_step": job["steps"],
        "checkpoints.last_every": job["steps"],
        "final_model": "none",
        "loggers": {},
        **{f"schedule.{key}": value for key, value in RATES.items()},
    }
    flags = [Override(tuple(key.split(".")), value, key) for key, value in ours.items()]
    return load(LoraTrainConfig, flags=flags, environment={})


class Clock:
    """The times at which steps end."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []

    def tick(self) -> None:
        self.seconds.append(time.perf_counter())
        self.cpu_seconds.append(time.process_time())

    def measured(self, rows: list[int], losses: list[float], **more: Any) -> Measured:
        both = [[b - a for a, b in pairwise(t)] for t in (self.seconds, self.cpu_seconds)]
        return Measured(both[0], both[1], rows[1:], losses, _peak_gib(), **more)


def _loragen(job: dict[str, Any], arm: Arm) -> Measured:
    import logging

    from loragen.core.base.load import load_training_base
    from loragen.core.data.dataset import Dataset
    from loragen.core.lora.train import train_adapter
    from loragen.core.progress import Silent, Step

    clock, losses, refusals = Clock(), [], []

    class Watch(Silent):
        def step(self, step: Step) -> None:
            clock.tick()
            losses.append(step.loss)

    class Refusals(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.getMessage().startswith("rows are padded, not packed"):
                refusals.append(record.getMessage())
                print(record.getMessage(), file=sys.stderr)

    logger = logging.getLogger("loragen")
    logger.setLevel(logging.INFO)
    logger.addHandler(Refusals())
    config = _config(job, arm)
    dataset = Dataset(Path(job["data"]), "rows")
    run = train_adapter(config, dataset, load_training_base(config), Watch())
    file = max((run.directory / "checkpoints").iterdir())
    return clock.measured(
        [job["batch_size"]] * job["steps"],
        losses,
        refused=bool(refusals),
        checkpoint_mib=file.stat().st_size / 2**20,
        checkpoint_seconds=_seconds_to_write(file),
    )


def _opponent(job: dict[str, Any], arm: Arm) -> Measured:
    """Trains with transformers' Trainer or TRL's SFTTrainer, as a careful user would: labels for
    the answers alone, a fused AdamW, no padding beyond the batch, no gradient checkpointing."""
    import datasets
    import torch
    from torch.utils.data import SequentialSampler
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    from loragen.core.base.load import load_base
    from loragen.core.data.batches import batch_indices
    from loragen.core.data.dataset import Dataset
    from loragen.core.lora.data import load_rows
    from loragen.core.lora.train import new_adapter
    from loragen.core.plugins import create

    config = _config(job, arm)
    base = load_base(job["base"], getattr(torch, arm.dtype))
    rows = load_rows(config, Dataset(Path(job["data"]), "rows"), base.tokenizer).training
    drawn = [
        rows[index]
        for step in range(job["steps"])
        for index in batch_indices(len(rows), job["batch_size"], config.seed, step)
    ]
    columns = {
        "input_ids": [item.ids for item in drawn],
        "labels": [
            [-100] * (len(item.ids) - item.num_label_tokens) + item.ids[-item.num_label_tokens :]
            for item in drawn
        ],
    }
    model = new_adapter(base, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1.0, weight_decay=0.0, fused=True)
    schedule = create("schedule", "two-stage", RATES)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: schedule(done + 1, job["steps"]).learning_rate
    )
    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

    settings: dict[str, Any] = {
        "output_dir": job["runs"] + "/trainer",
        "per_device_train_batch_size": job["batch_size"],
        "num_train_epochs": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "max_grad_norm": 0.0,
        "bf16": arm.autocast,
        "gradient_checkpointing": False,
    }
    trainer_class: type[Trainer] = Trainer
    if arm.library == "trl":
        from trl import SFTConfig, SFTTrainer

        if arm.packed:  # sequences of as many tokens as a batch has
            tokens = sum(len(item.ids) for item in drawn)
            settings |= {
                "packing": True,
                "max_length": max(tokens // job["steps"], *(len(item.ids) for item in drawn)),
                "per_device_train_batch_size": 1,
                "shuffle_dataset": False,
            }
        else:
            settings |= {"padding_free": True, "max_length": None}
        trainer_class, arguments = SFTTrainer, SFTConfig(**settings)
        collator = {}
    else:
        columns["attention_mask"] = [[1] * len(ids) for ids in columns["input_ids"]]
        arguments = TrainingArguments(**settings)
        collator = {"data_collator": DataCollatorForSeq2Seq(base.tokenizer)}

    class InOrder(trainer_class):  # type: ignore[misc, valid-type]  # chosen above
        def _get_train_sampler(self, *_: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    stdout, sys.stdout = sys.stdout, sys.stderr  # the Trainer prints its logs
    trainer = InOrder(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(columns),
        processing_class=base.tokenizer,
        optimizers=(optimizer, rates),
        callbacks=[Watch()],
        **collator,
    )
    trainer.train()
    sys.stdout = stdout
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    counts = [job["batch_size"]] * job["steps"]
    if arm.library == "trl" and arm.packed:
        counts = [len(lengths) for lengths in trainer.train_dataset["seq_lengths"]]
    return clock.measured(counts, losses)


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


def _peak_gib() -> float:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


# ---------------------------------------------------------------------------- the table


def _table(results: dict[str, list[Measured]], batch_size: int) -> dict[str, dict[str, Any]]:
    """Returns a line per arm. Ratios are to the Trainer that is fastest in the same precision."""
    trainers: dict[bool, str] = {}
    for arm in sorted(results, key=lambda arm: -median(one.per_row for one in results[arm])):
        if ARMS[arm].library == "transformers":
            trainers[_is_narrow(arm)] = arm  # the fastest comes last
    reference = next((a for a in results if a == "Trainer, float32"), next(iter(results)))
    table: dict[str, dict[str, Any]] = {}
    for arm, rounds in results.items():
        against = trainers.get(_is_narrow(arm), arm)
        pairs = list(zip(results[against], rounds, strict=True))
        ratios = [theirs.per_row / ours.per_row for theirs, ours in pairs]
        own_batches = ARMS[arm].library == "trl" and ARMS[arm].packed
        curves = zip(results[reference][0].losses, rounds[0].losses, strict=not own_batches)
        table[arm] = {
            "seconds_per_batch": batch_size * median(one.per_row for one in rounds),
            "cpu_seconds_per_batch": batch_size * median(one.cpu_per_row for one in rounds),
            "against": against,
            "ratio": median(ratios),
            "ratio_least": min(ratios),
            "ratio_most": max(ratios),
            "cpu_ratio": median(a.cpu_per_row / b.cpu_per_row for a, b in pairs),
            "peak_gib": max(one.peak_gib for one in rounds),
            "loss_differs": None if own_batches else max(abs(a - b) for a, b in curves),
            "refused": rounds[0].refused,
        }
    return table


def _is_narrow(arm: str) -> bool:
    return ARMS[arm].dtype == "bfloat16" or ARMS[arm].autocast


def _summary(one: Measured) -> str:
    return f"{one.per_row:.3f} s a row, last loss {one.losses[-1]:.4f}"


def _print(name: str, facts: dict[str, Any], table: dict[str, dict[str, Any]]) -> None:
    print(
        f"\n{name}: {facts['count']} rows, median {facts['median_tokens']} tokens, of which "
        f"{facts['shared_tokens']} shared by all and {facts['median_answer_tokens']} of the answer"
    )
    print(f"{'':36} s/batch  CPU s  ratio  (least-most)  CPU ratio  peak GiB  loss differs")
    for arm, line in table.items():
        differs = line["loss_differs"]
        print(
            f"{arm:36} {line['seconds_per_batch']:7.2f} {line['cpu_seconds_per_batch']:6.2f} "
            f"{line['ratio']:6.2f}  ({line['ratio_least']:.2f}-{line['ratio_most']:.2f}) "
            f"{line['cpu_ratio']:10.2f} {line['peak_gib']:9.2f}  "
            f"{'own batches' if differs is None else format(differs, '.1e')}"
            f"{'  packing refused' if line['refused'] else ''}"
        )


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
