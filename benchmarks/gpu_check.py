"""Tries loragen on one GPU, in ten minutes at most: what works, how fast, in how much memory.

    python benchmarks/gpu_check.py [--base MODEL] [--output gpu_check.json]
    python benchmarks/gpu_check.py --device cpu --tiny      # tries this script without a GPU

Each part has a time budget, and the part after one that fails, hangs or crashes its GPU context
runs in a new process, so that only the failed one is lost. The JSON file is rewritten after every
finding; a summary goes to stdout. Data are those of `loragen demo`, so the default base needs
nothing but the package. The exit code is 1 if a part failed or ran out of time; a part that cannot
run here is skipped with the reason.
"""

import argparse
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

from loragen.core.plugins import names

Facts = dict[str, Any]
MINUTES = 9.5
LEAST = 10.0
"""A part that would have fewer seconds than this is not started."""
BAD = ("failed", "out of time")
OF_THE_NETWORK = ("loragen.plugins.decoders", "loragen.core.generator")
"""Where the modules of a generator's network are defined."""


class Skipped(Exception):  # noqa: N818
    """A part cannot run on this machine, for the reason given."""


@dataclass(frozen=True)
class Check:
    """What all parts are told."""

    base: str
    """A base model: what `--base-model` of `lora train` takes."""
    device: str
    """cuda or cpu."""
    tiny: bool
    """Fewer steps, rows and datasets: enough to see that a part runs."""
    encoder: str
    """The `encoder.model` of `gen train`."""
    folder: str
    """A folder that the parts share: rows, collected adapters, experiments."""

    def size(self, tiny: int, full: int) -> int:
        return tiny if self.tiny else full

    @property
    def directory(self) -> Path:
        return Path(self.folder)

    @property
    def accelerator(self) -> str:
        """Lightning's name of the device."""
        return "gpu" if self.device == "cuda" else "cpu"


# ---------------------------------------------------------------------------- the parts


def environment(check: Check) -> Iterator[Facts]:
    """Whether torch finds the GPU, the versions, and what loragen chooses for this base."""
    import torch

    libraries = "torch transformers peft lightning accelerate sentence-transformers bitsandbytes"
    yield {"versions": {name: _version(name) for name in libraries.split()}}
    if check.device == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError(
                f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU; "
                "--device cpu --tiny tries this script without one"
            )
        properties = torch.cuda.get_device_properties(0)
        yield {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    yield {"cpu_threads": torch.get_num_threads(), "cpu": torch.backends.cpu.get_cpu_capability()}
    from loragen.core.base.load import dtype_name, fast_bfloat16, load_training_base

    base = load_training_base(_lora_config(check, "unused"))
    values = sum(parameter.numel() for parameter in base.model.parameters())
    chosen = dtype_name(base.model.dtype)
    fast = fast_bfloat16(check.accelerator)
    yield {"parameters": values, "base_dtype": chosen, "fast_bfloat16": fast}
    yield {"says": f"{values / 1e6:.1f} M parameters, trained in {chosen}"}


def lora(check: Check) -> Iterator[Facts]:
    """A run, the same run again, and the same run interrupted and resumed, with dropout, which
    draws on the device. The repetition shows what the device itself does not reproduce."""
    from loragen.core.adapter.files import attach_adapter, read_adapter
    from loragen.core.base.load import load_base
    from loragen.core.errors import Interrupted
    from loragen.core.lora.evaluate import evaluate_model
    from loragen.core.lora.train import LoraPoint

    steps, stop = check.size(6, 16), check.size(4, 9)
    settings = {"training.max_steps": steps, "lora.dropout": 0.1, "checkpoints.first_step": steps}
    dataset = _datasets(check)[0]
    first = _train(check, dataset, "lora/first", settings)
    yield first.facts()
    again = _train(check, dataset, "lora/again", settings)
    yield {"repeated": (repeated := _apart(first.directory, again.directory))}
    with suppress(Interrupted):
        _train(check, dataset, "lora/interrupted", settings, stop_at=stop)
    (directory,) = (check.directory / "lora/interrupted").iterdir()
    point = LoraPoint.find(directory)
    _train(check, dataset, "lora/interrupted", settings, resume=point)
    resumed = _apart(first.directory, directory)
    yield {"resumed_from": point.step, "resumed": resumed}
    told = f"resumed from step {point.step}: {_verdict(resumed)}; repeated: {_verdict(repeated)}"
    yield {"says": told}

    # Answers of the trained adapter, in float32 on both devices.
    base = load_base(check.base, _torch().float32)
    model = attach_adapter(base.model, read_adapter(first.directory / "adapter"), "the adapter")
    rows, found = dataset.rows()[: check.size(8, 32)], {}
    for device in dict.fromkeys(("cpu", check.device)):
        score = evaluate_model(model.to(device), base.tokenizer, rows, choices=False)
        found[device] = {
            "exact_match": score.exact_match,
            "loss": score.loss,
            "seconds": score.seconds,
        }
        yield {"answers": found}
    losses = ", ".join(f"{device} {one['loss']:.6f}" for device, one in found.items())
    yield {"says": f"{told}; loss of its answers: {losses}"}


def packing(check: Check) -> Iterator[Facts]:
    """The losses of rows packed into one sequence and padded, and what the check decides."""
    torch = _torch()
    from loragen.core.base.load import load_base
    from loragen.core.data.chat import pad_id
    from loragen.core.lora.data import load_rows
    from loragen.core.lora.packing import (
        Cost,
        answer_losses,
        cheapest_packing,
        collate,
        in_float32,
        packing_cost,
    )

    said = []
    for dtype in (torch.float32, torch.bfloat16):
        base = load_base(check.base, dtype)
        model, padding = base.model, pad_id(base.tokenizer)
        rows = load_rows(_lora_config(check, "unused"), _datasets(check)[0], base.tokenizer)
        longest = sorted(rows.longest, key=lambda row: -len(row.ids))[: check.size(8, 16)]
        one_sequence = Cost(token=1.0, pair=0.0)
        order = [longest[i] for bin_ in cheapest_packing(longest, one_sequence)[1] for i in bin_]
        padded, packed = collate(order, padding), collate(longest, padding, one_sequence)

        def losses(device: str, model: Any = model, padded: Any = padded, packed: Any = packed):  # noqa: ANN202
            with torch.no_grad():
                model.to(device)
                batches = [batch.to(torch.device(device)) for batch in (padded, packed)]
                return [answer_losses(model, batch).float().cpu() for batch in batches]

        on_cpu = losses("cpu")
        narrow = dtype == torch.bfloat16
        autocast = torch.autocast(check.device, torch.bfloat16) if narrow else nullcontext()
        with autocast:  # as in training
            here = losses(check.device)
        with in_float32(model):
            wide = losses(check.device)
        with _messages() as messages:
            cost = packing_cost(model, longest, padding, len(longest))
        decision = "packed" if cost else next(iter(messages), "padded")
        name = str(dtype).removeprefix("torch.")
        found = {
            "attention": model.config._attn_implementation,
            "packed_and_padded": _mean_difference(*here),
            "packed_and_padded_in_float32": _mean_difference(*wide),
            "padded_here_and_on_cpu": _mean_difference(here[0], on_cpu[0]),
            "decision": decision,
        }
        said.append(
            f"{name}: packed and padded differ by {found['packed_and_padded']:.1e} nats "
            f"({found['packed_and_padded_in_float32']:.1e} in float32), decision: {decision}"
        )
        yield {name: found, "says": "; ".join(said)}


def encoder(check: Check) -> Iterator[Facts]:
    """The sentence encoder on the device beside the CPU."""
    torch = _torch()
    from loragen.core.plugins import create

    texts = [p for one in _datasets(check) for p in one.prompts()][: check.size(32, 2048)]
    model = create("encoder", "sbert", {"model": check.encoder})
    embeddings, seconds = {}, {}
    for device in dict.fromkeys(("cpu", check.device)):
        model.to(device)
        with torch.inference_mode():
            model(texts[:32])
            began = time.perf_counter()
            embeddings[device] = model(texts)[0].cpu()
            seconds[device] = time.perf_counter() - began
    apart = float((embeddings["cpu"] - embeddings[check.device]).abs().max())
    speed = {device: len(texts) / one for device, one in seconds.items()}
    told = ", ".join(f"{device} {one:.0f} texts/s" for device, one in speed.items())
    yield {"texts_per_second": speed, "largest_difference": apart}
    yield {"says": f"{told}; largest difference {apart:.1e}"}


def collect(check: Check) -> Iterator[Facts]:
    """An adapter for each dataset, on one base, for the parts below."""
    from loragen.core.base.load import load_training_base

    steps = check.size(4, 24)
    settings = {"training.max_steps": steps, "checkpoints.first_step": steps - 3}
    base = load_training_base(_lora_config(check, "collected"))
    began, losses = time.perf_counter(), {}
    for dataset in _datasets(check):
        run = _train(check, dataset, "collected", settings, base=base)
        losses[dataset.name] = run.losses[-1]
        yield {"last_losses": losses, "seconds_each": (time.perf_counter() - began) / len(losses)}
    yield {
        "says": f"{len(losses)} adapters, {(time.perf_counter() - began) / len(losses):.1f} s each"
    }


def gen_train(check: Check, objective: str) -> Iterator[Facts]:
    """`gen train` of one objective with every decoder that it trains; those that need the base
    also with gradient checkpointing."""
    from loragen.core.errors import UsageError
    from loragen.core.learning.plan import make_plan
    from loragen.core.learning.sources import open_sources
    from loragen.core.plugins import find

    automatic = objective == "auto"
    decoders = ["auto"] if automatic else names("decoder")
    needs_base = not automatic and find("objective", objective).needs_base
    said, trained, elsewhere = [], 0, []
    for decoder in decoders:
        config = _gen_config(check, objective, decoder)
        try:
            plan = make_plan(config, open_sources(config))
        except UsageError as refusal:
            yield {decoder: {"refused": str(refusal)}}
            continue
        for saving in (False, True) if needs_base else (False,):
            name = f"{decoder}, gradient checkpointing" if saving else decoder
            config.behaviour.gradient_checkpointing = saving
            config.data.cache_dir = str(check.directory / f"cache/{objective} {name}")
            found = {"objective": plan.config.training.objective, **_train_generator(config)}
            found["decoder"] = plan.config.decoder.name
            if any(check.device not in seen for seen in found["computed_on"].values()):
                elsewhere.append(f"{name}: {found['computed_on']}")
            trained += 1
            peak = found["peak_gib"]
            said.append(
                f"{name} {found['step_seconds']:.3f} s/step"
                f"{f', {peak:.2f} GiB' if peak else ''}, loss {found['losses'][0]:.3f} -> "
                f"{found['losses'][-1]:.3f}"
            )
            yield {name: found, "says": "; ".join(said)}
    if not trained:
        raise RuntimeError(f"no installed decoder could be trained for {objective}")
    if elsewhere:
        raise RuntimeError(f"not everything computed on {check.device}: {'; '.join(elsewhere)}")


def generation(check: Check) -> Iterator[Facts]:
    """Prompts -> an adapter, by every generator trained above, and its loss on the device."""
    from loragen import Generator
    from loragen.core.base.load import load_base
    from loragen.core.lora.evaluate import evaluate_model
    from loragen.core.run.directory import GENERATOR_FILE

    home = check.directory / "experiments"
    # One of each decoder: gradient checkpointing gives the same generator again.
    files = {f.relative_to(home).parts[0]: f for f in sorted(home.rglob(str(GENERATOR_FILE)))}
    if not files:
        raise Skipped("no generator was trained above")
    dataset, said = _datasets(check)[0], []
    rows, prompts = dataset.rows()[: check.size(8, 32)], dataset.prompts()[:64]
    base = load_base(check.base, _torch().float32)
    base.model.to(check.device)
    before = evaluate_model(base.model, base.tokenizer, rows, choices=False).loss
    yield {"base_loss": before}
    for name, file in files.items():
        began = time.perf_counter()
        generator = Generator.load(file)
        loaded = time.perf_counter()
        adapter = generator.generate(prompts)
        times = [time.perf_counter()]
        for _ in range(check.size(2, 5)):
            adapter = generator.generate(prompts)
            times.append(time.perf_counter())
        model = adapter.attach(base.model).to(check.device)
        score = evaluate_model(model, base.tokenizer, rows, choices=False)
        base.model = model.unload()
        found = {
            "load_seconds": loaded - began,
            "first_seconds": times[0] - loaded,
            "seconds": median(b - a for a, b in pairwise(times)),
            "computed_on": str(next(generator.network.parameters()).device),
            "loss": score.loss,
        }
        said.append(f"{name} {found['seconds']:.2f} s, loss {before:.2f} -> {score.loss:.2f}")
        yield {name: found, "says": "; ".join(said)}


def checkpointing(check: Check) -> Iterator[Facts]:
    """`training.gradient_checkpointing` off and on, on long padded rows: time, memory, result."""
    from loragen.core.data.dataset import Dataset

    steps = check.size(3, 8)
    settings = {
        "training.max_steps": steps,
        "checkpoints.first_step": steps,
        "training.packing": False,
        "data.max_length": 512,
    }
    short = _datasets(check)[0].rows()
    long = [
        {"prompt": " ".join(row.prompt for row in short[i : i + 12]), "response": short[i].response}
        for i in range(0, len(short) - 12, 2)
    ]
    dataset = Dataset(_written(check.directory / "long.jsonl", long), "long")
    runs = {}
    for name, saving in (("off", False), ("on", True)):
        setting = {"training.gradient_checkpointing": saving}
        runs[name] = _train(check, dataset, f"checkpointing/{name}", settings | setting)
        yield {name: runs[name].facts()}
    apart = _apart(runs["off"].directory, runs["on"].directory)
    yield {"results": apart}
    memory = " -> ".join(f"{run.peak_gib:.2f}" for run in runs.values() if run.peak_gib)
    times = " -> ".join(f"{run.step_seconds:.3f}" for run in runs.values())
    yield {
        "says": f"off -> on: {f'{memory} GiB, ' if memory else ''}{times} s/step; results: "
        f"{_verdict(apart)}"
    }


def four_bits(check: Check) -> Iterator[Facts]:
    """A base in 4 bits (QLoRA) beside the same base without, and what the packing check says."""
    if find_spec("bitsandbytes") is None:
        raise Skipped("bitsandbytes is not installed: pip install -e '.[quantization]'")
    if check.device != "cuda":
        raise Skipped("a base in 4 bits needs a CUDA GPU")
    steps = check.size(3, 10)
    settings = {"training.max_steps": steps, "checkpoints.first_step": steps}
    runs = {}
    for bits in ("none", "4bit"):
        quantized = {"base_quantization": bits}
        run = _train(check, _datasets(check)[0], f"four bits/{bits}", settings | quantized)
        runs[bits] = run
        yield {bits: run.facts()}
    losses = " and ".join(f"{run.losses[-1]:.4f}" for run in runs.values())
    times = " and ".join(f"{run.step_seconds:.3f}" for run in runs.values())
    yield {
        "says": f"without and with: last losses {losses}, {times} s/step; "
        f"{runs['4bit'].refusal or 'packed'}"
    }


def step_times(check: Check) -> Iterator[Facts]:
    """Step times and memory beside transformers' Trainer + PEFT, by `lora_training.py`."""
    missing = [name for name in ("datasets", "trl") if find_spec(name) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} missing: pip install -e '.[benchmarks]'")
    trainers = ["Trainer, bfloat16 autocast"]
    if not check.tiny:
        trainers.append("Trainer, bfloat16 base and autocast")
    output = check.directory / "step_times.json"
    command = [sys.executable, str(Path(__file__).with_name("lora_training.py"))]
    command += ["--base", check.base, "--rows", f"short={_datasets(check)[0].source}"]
    if check.base != "demo" and not check.tiny:
        command += ["--rows", "instructions"]
    command += ["--batch-size", str(check.size(4, 16)), "--steps", str(check.size(3, 20))]
    command += ["--rounds", "1", "--output", str(output)]
    command += ["--arms", *trainers, "loragen padded, bfloat16", "loragen, bfloat16"]
    done = subprocess.run(command, stderr=subprocess.PIPE, stdout=sys.stderr, text=True)
    if output.is_file():
        rows = json.loads(output.read_text(encoding="utf-8"))["rows"]
        tables = {name: one["table"] for name, one in rows.items()}
        lines = (
            f"{name}: "
            + ", ".join(f"{arm} {line['seconds_per_batch']:.3f}" for arm, line in table.items())
            for name, table in tables.items()
        )
        yield {"tables": tables, "says": f"s/step of {'; of '.join(lines)}"}
    if done.returncode:
        raise RuntimeError(f"lora_training.py: {(done.stderr.splitlines() or ['?'])[-1]}")


Part = Callable[[Check], Iterator[Facts]]


def parts() -> dict[str, tuple[Part, int]]:
    """Returns the parts, the most important first, each with its budget in seconds."""
    objectives = {
        f"gen train: {one}": (partial(gen_train, objective=one), 75)
        for one in [*names("objective"), "auto"]
    }
    return {
        "environment": (environment, 60),
        "lora": (lora, 120),
        "packing": (packing, 60),
        "encoder": (encoder, 45),
        "collect": (collect, 90),
        **objectives,
        "generation": (generation, 60),
        "step times": (step_times, 180),
        "checkpointing": (checkpointing, 60),
        "four bits": (four_bits, 60),
    }


# ---------------------------------------------------------------------------- what they share


@dataclass
class Trained:
    """One `lora train`."""

    directory: Path
    times: list[float]
    """When each step ended, in seconds."""
    losses: list[float]
    refusal: str
    """Why rows were padded; empty if they were packed."""
    peak_gib: float | None

    @property
    def step_seconds(self) -> float:
        """The median; the first step is left out."""
        return median(b - a for a, b in pairwise(self.times))

    def facts(self) -> Facts:
        return {
            "losses": self.losses,
            "step_seconds": self.step_seconds,
            "rows": self.refusal or "packed",
            "peak_gib": self.peak_gib,
        }


def _train(
    check: Check,
    dataset: Any,
    runs: str,
    settings: Mapping[str, Any],
    stop_at: int = 0,
    resume: Any = None,
    base: Any = None,
) -> Trained:
    """Trains an adapter into the folder `runs`. Raises Interrupted after step `stop_at`, by the
    signal of Ctrl+C."""
    from loragen.core.base.load import load_training_base
    from loragen.core.lora.train import load_resumed_base, train_adapter
    from loragen.core.progress import Silent, Step

    times, losses = [], []

    class Watch(Silent):
        def step(self, step: Step) -> None:
            times.append(time.perf_counter())
            losses.append(step.loss)
            if step.step == stop_at:
                signal.raise_signal(signal.SIGINT)

    config = _lora_config(check, runs, settings)
    _peak(reset=True)
    if base is None:
        base = load_resumed_base(resume, config) if resume else load_training_base(config)
    with _messages() as messages:
        run = train_adapter(config, dataset, base, Watch(), resume)
    refusal = next((one for one in messages if one.startswith("rows are padded")), "")
    if not settings.get("training.packing", True):
        refusal = "padded, as configured"
    return Trained(run.directory, times, losses, refusal, _peak())


def _lora_config(check: Check, runs: str, settings: Mapping[str, Any] | None = None) -> Any:
    from loragen.core.config import LoraTrainConfig

    return _configured(
        LoraTrainConfig,
        {
            "base_model": check.base,
            "runs_dir": str(check.directory / runs),
            "training.batch_size": check.size(4, 16),
            "lora.rank": check.size(2, 8),
            "schedule.learning_rate_stage1": 1e-3,
            "loggers": {},
            "trainer.accelerator": check.accelerator,
            **(settings or {}),
        },
    )


def _gen_config(check: Check, objective: str, decoder: str) -> Any:
    from loragen.core.config import GenTrainConfig

    collected = sorted((check.directory / "collected").glob("*/manifest.json"))
    if not collected:
        raise Skipped("no adapter was collected above")
    steps = check.size(3, 30)
    return _configured(
        GenTrainConfig,
        {
            "sources": [{"run": str(file.parent)} for file in collected],
            "experiments_dir": str(check.directory / f"experiments/{objective} {decoder}"),
            "encoder.model": check.encoder,
            "decoder": {"name": decoder},
            "data.batch_size": 4,
            "data.samples_per_prompt": 1,
            "training.objective": objective,
            "training.max_steps": steps,
            "training.val_every_epochs": 1000,  # after the last step alone
            "training.val_rows": check.size(2, 16),
            "behaviour.max_steps": steps,
            "behaviour.batch_size": check.size(2, 4),
            "behaviour.rows_per_adapter": check.size(2, 8),
            "loggers": {},
            "trainer.accelerator": check.accelerator,
        },
    )


def _configured(model: Any, settings: Mapping[str, Any]) -> Any:
    from loragen.core.config import Override, load

    flags = [Override(tuple(key.split(".")), value, key) for key, value in settings.items()]
    return load(model, flags=flags, environment={})


def _train_generator(config: Any) -> Facts:
    """Trains a generator; returns its losses, times, memory, and on which devices the sentence
    encoder and the network computed."""
    from torch import Tensor
    from torch.nn.modules.module import register_module_forward_hook

    from loragen.core.learning.train import train
    from loragen.core.plugins import find
    from loragen.core.progress import Silent, Step

    times, losses = [], []
    places: dict[str, set[str]] = {"encoder": set(), "network": set()}
    encoder_class = find("encoder", config.encoder.name)

    class Watch(Silent):
        def step(self, step: Step) -> None:
            times.append(time.perf_counter())
            losses.append(step.loss)

    def see(module: Any, _: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(module, encoder_class):
            places["encoder"].add(tensor.device.type)
        elif isinstance(tensor, Tensor) and type(module).__module__.startswith(OF_THE_NETWORK):
            places["network"].add(tensor.device.type)

    _peak(reset=True)
    handle = register_module_forward_hook(see)
    began = time.perf_counter()
    try:
        run = train(config, Watch())
    finally:
        handle.remove()
    return {
        "losses": losses,
        "step_seconds": median(b - a for a, b in pairwise(times)),
        "seconds": time.perf_counter() - began,
        "metrics": run.manifest.metrics,
        "computed_on": {name: sorted(found - {"meta"}) for name, found in places.items()},
        "peak_gib": _peak(),
    }


def _datasets(check: Check) -> list[Any]:
    """Returns datasets of the demo's world; the files are written once."""
    from loragen.core.data.dataset import Dataset
    from loragen.demo.world import World

    world, found = World.load(), []
    for pair in world.sample_training_pairs(0, check.size(4, 8)):
        file = check.directory / "data" / f"{pair.name}.jsonl"
        if not file.is_file():
            _written(file, world.train_rows(pair))
        found.append(Dataset(file, pair.name))
    return found


def _written(file: Path, rows: Sequence[Mapping[str, str]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@contextmanager
def _messages() -> Iterator[list[str]]:
    """Yields the list of what loragen logs within the block."""
    logger, found = logging.getLogger("loragen"), []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    handler, level = Keep(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _apart(one: Path, other: Path) -> Facts:
    """Returns the largest differences of two runs: of their adapters' values (beside the largest
    value) and of their losses at one step."""
    from loragen.core.adapter.files import read_adapter
    from loragen.core.run.metrics import read_metrics

    tensors = [read_adapter(run / "adapter").tensors for run in (one, other)]
    curves = [
        {entry["step"]: entry["train/loss"] for entry in read_metrics(run / "metrics.jsonl")}
        for run in (one, other)
    ]
    if tensors[0].keys() != tensors[1].keys() or curves[0].keys() != curves[1].keys():
        raise RuntimeError(f"{other.name} has other tensors or steps than {one.name}")
    return {
        "adapter": max(float((tensors[0][k] - tensors[1][k]).abs().max()) for k in tensors[0]),
        "adapter_largest_value": max(float(tensor.abs().max()) for tensor in tensors[0].values()),
        "loss": max(abs(curves[0][step] - curves[1][step]) for step in curves[0]),
    }


def _verdict(apart: Facts) -> str:
    if apart["adapter"] == apart["loss"] == 0:
        return "equal to the bit"
    return (
        f"adapters differ by up to {apart['adapter']:.1e} (largest value "
        f"{apart['adapter_largest_value']:.1e}), losses by up to {apart['loss']:.1e}"
    )


def _mean_difference(one: Any, other: Any) -> float:
    return float((one - other).abs().mean())


_peaks: list[float] = []
"""The peaks of the current part before each reset."""


def _peak(reset: bool = False) -> float | None:
    """Returns the most GPU memory (GiB) that tensors took since the last reset; None on the CPU."""
    torch = _torch()
    if not torch.cuda.is_available():
        return None
    if reset:
        _peaks.append(torch.cuda.max_memory_allocated() / 2**30)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.max_memory_allocated() / 2**30)


def _torch() -> Any:
    from loragen.core.base.load import quiet_libraries

    quiet_libraries()
    import torch

    return torch


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---------------------------------------------------------------------------- all parts in turn


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", default="demo", help="a hub id, a directory, a GGUF file or demo")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="as little of every part as possible")
    parser.add_argument("--encoder", default="all-MiniLM-L6-v2", help="encoder.model of gen train")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for all parts; scales the budget of each"
    )
    parser.add_argument("--parts", nargs="+", default=list(parts()), choices=list(parts()))
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(Check(**json.loads(arguments.worker)))
        return 0
    deadline, worker = time.monotonic() + 60 * arguments.minutes, None
    found: dict[str, Facts] = {}
    document = {"base": arguments.base, "device": arguments.device, "tiny": arguments.tiny}
    document |= {"encoder": arguments.encoder, "loragen": _version("loragen"), "parts": found}

    def save() -> None:
        temporary = arguments.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=1), encoding="utf-8")
        temporary.replace(arguments.output)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        check = Check(arguments.base, arguments.device, arguments.tiny, arguments.encoder, folder)
        try:
            for name in arguments.parts:
                entry = found[name] = {"status": "running"}
                left = deadline - time.monotonic()
                if found.get("environment", {}).get("status") == "failed":
                    entry |= {"status": "skipped", "why": "see environment"}
                elif left < LEAST:
                    why = f"the {arguments.minutes:g} minutes are over"
                    entry |= {"status": "skipped", "why": why}
                else:
                    worker = worker or Worker(check)
                    budget = min(left, parts()[name][1] * arguments.minutes / MINUTES)
                    worker.run(name, budget, entry, save)
                    if entry["status"] in BAD:
                        worker.kill()
                        worker = None
                save()
                _print(name, entry)
        finally:
            if worker:
                worker.kill()
    bad = [name for name, entry in found.items() if entry["status"] in BAD]
    print(f"\n{arguments.output}: {len(bad)} of {len(found)} parts failed {bad or ''}".rstrip())
    return int(bool(bad))


class Worker:
    """A process that runs parts until one fails, and the head of a group with its children."""

    def __init__(self, check: Check) -> None:
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if check.device == "cpu" else {}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--worker", json.dumps(asdict(check))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | hidden | {"TOKENIZERS_PARALLELISM": "false"},
        )

    def run(self, name: str, budget: float, entry: Facts, save: Callable[[], None]) -> None:
        """Runs a part and collects what it finds in `entry`; the process is killed once the
        `budget` (seconds) is spent."""
        began, timer = time.monotonic(), Timer(budget, self.kill)
        timer.start()
        assert self.process.stdin and self.process.stdout
        with suppress(BrokenPipeError):
            self.process.stdin.write(name + "\n")
            self.process.stdin.flush()
        try:
            for line in self.process.stdout:
                entry |= json.loads(line)
                save()
                if entry["status"] != "running":
                    break
        finally:
            timer.cancel()
        entry["seconds"] = round(time.monotonic() - began, 1)
        if entry["status"] != "running":
            return
        if entry["seconds"] >= budget:
            entry |= {"status": "out of time", "error": f"not finished within {budget:.0f} s"}
        else:
            code = self.process.wait()
            entry |= {"status": "failed", "error": f"its process ended with the code {code}"}

    def kill(self) -> None:
        if self.process.poll() is None:
            if hasattr(os, "killpg"):
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()


def _work(check: Check) -> None:
    """Runs the parts named on stdin, one a line, and writes what they find to stdout, a JSON object
    a line. Whatever libraries print goes to stderr."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def tell(facts: Facts) -> None:
        pipe.write(json.dumps(facts) + "\n")
        pipe.flush()

    for line in sys.stdin:
        gc.collect()
        _peak(reset=True)
        _peaks.clear()
        try:
            for facts in parts()[line.strip()][0](check):
                tell(facts)
            end: Facts = {"status": "ok"}
        except Skipped as reason:
            end = {"status": "skipped", "why": str(reason)}
        except Exception as error:  # noqa: BLE001  # the other parts run whatever this one raises
            end = {"status": "failed", "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            end["traceback"] = traceback.format_exc().splitlines()[-16:]
        with suppress(Exception):  # a GPU context that has crashed answers nothing
            end["peak_gib"] = max([p for p in (*_peaks, _peak()) if p is not None], default=None)
        tell(end)


def _print(name: str, entry: Facts) -> None:
    peak = f"{entry['peak_gib']:7.2f} GiB" if entry.get("peak_gib") else ""
    print(f"{entry['status']:11} {name:26} {entry.get('seconds', 0):6.1f} s {peak}")
    for key in ("says", "why", "error"):
        if key in entry:
            print(f"            {entry[key]}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
