"""Measures the speed, memory and quality of a generator in training and generation.

    python benchmarks/generator.py step                        # optimizer steps, data path included
    python benchmarks/generator.py latency --sizes 4.4M 40M    # prompts -> files on disk
    python benchmarks/generator.py memory --checkpoints 50 1000
    python benchmarks/generator.py quality --steps 60          # on held-out prompts and mixtures

The adapters are made up, in the shapes of real ones (`_adapters.py`), with 0.2 to 40 million
values. The baseline is the paper's geometry (arXiv 2506.16406) in the same code. Each measurement
runs in its own process and prints a JSON line, with the machine's rate of float32 matrix products
and its load: absolute times depend on the machine, so compare ratios.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from _adapters import SIZES, Dataset, write_collection

LAST_MAP, TOKENS = 4296, 11_592
"""The rows of the paper's last map for Qwen2.5-0.5B at rank 8, and the tokens of its adapter."""


def geometries(tokens: int) -> dict[str, dict[str, Any]]:
    """Returns {name: options of the decoder} for an adapter of so many tokens of 384 values."""
    last = [-(-LAST_MAP * tokens // TOKENS), 10, 130]
    maps = [[16, 64, 384], [64, 32, 256], [256, 20, 192], [576, 10, 160], last]
    return {
        "default": {},
        "frozen": {"train_directions": False},
        "paper": {"shapes": maps},
    }


def main() -> None:
    arguments = _arguments()
    if arguments.job:
        job = json.loads(arguments.job)
        print(json.dumps({**job["labels"], **JOBS[job["what"]](job), **_machine()}))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        MEASUREMENTS[arguments.what](arguments, Path(folder))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=list(MEASUREMENTS), nargs="?", default="step")
    parser.add_argument("--sizes", nargs="+", default=["4.4M"], choices=list(SIZES))
    parser.add_argument(
        "--geometries", nargs="+", default=["default", "paper"], choices=list(geometries(1))
    )
    parser.add_argument(
        "--checkpoints", type=int, nargs="+", help="checkpoints of ten datasets together"
    )
    parser.add_argument("--batch-size", type=int, default=2, help="pairs per optimizer step")
    parser.add_argument("--prompts", type=int, default=16, help="prompt texts per condition")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--folder", type=Path, help="directory for some gigabytes of temporary files"
    )
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def _step(arguments: argparse.Namespace, folder: Path) -> None:
    for size in arguments.sizes:
        datasets = write_collection(folder / size, SIZES[size], (arguments.checkpoints or [10])[0])
        for _ in range(arguments.rounds):
            for geometry in arguments.geometries:
                _measured(arguments, folder, "train", size, geometry, datasets)


def _memory(arguments: argparse.Namespace, folder: Path) -> None:
    for size in arguments.sizes:
        for count in arguments.checkpoints or [50, 1000]:
            home = folder / f"{size}-{count}"
            datasets = write_collection(home, SIZES[size], count)
            for geometry in arguments.geometries:
                _measured(arguments, home, "train", size, geometry, datasets, checkpoints=count)


def _latency(arguments: argparse.Namespace, folder: Path) -> None:
    for size in arguments.sizes:
        datasets = write_collection(folder / size, SIZES[size], 10)
        arguments.steps = 1
        for geometry in arguments.geometries:
            trained = _measured(arguments, folder, "train", size, geometry, datasets)
            for _ in range(arguments.rounds):
                _measured(arguments, folder, "generate", size, geometry, datasets, **trained)


def _quality(arguments: argparse.Namespace, folder: Path) -> None:
    for size in arguments.sizes:
        count = (arguments.checkpoints or [50])[0]
        datasets = write_collection(folder / size, SIZES[size], count, held_out=True)
        for geometry in arguments.geometries:
            _measured(arguments, folder, "judge", size, geometry, datasets, checkpoints=count)


def _measured(
    arguments: argparse.Namespace,
    folder: Path,
    what: str,
    size: str,
    geometry: str,
    datasets: Sequence[Dataset],
    **more: Any,
) -> dict[str, Any]:
    """Runs one measurement in its own process, prints its JSON line, and returns its run."""
    labels = {"what": arguments.what, "size": size, "geometry": geometry}
    labels |= {"batch": arguments.batch_size, "prompts": arguments.prompts}
    labels |= {key: value for key, value in more.items() if key == "checkpoints"}
    job = {
        **vars(arguments),
        **more,
        "what": what,
        "labels": labels,
        "folder": str(folder),
        "geometry": geometry,
        "datasets": [one._asdict() for one in datasets],
    }
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job, default=str)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    line = done.stdout.splitlines()[-1]
    print(line, flush=True)
    found: dict[str, Any] = json.loads(line)
    return {"run": found["run"]} if "run" in found else {}


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """Measures `gen train` from the files of checkpoints and prompts to the last step."""
    from loragen.core.learning.train import train
    from loragen.core.progress import Silent, Step

    times, losses, anonymous = [], [], []

    class Watch(Silent):
        def step(self, step: Step) -> None:
            times.append(time.perf_counter())
            losses.append(step.loss)
            anonymous.append(_memory_mib()["RssAnon"])

    began = time.perf_counter()
    run = train(_config(job), Watch())
    seconds = [after - before for before, after in pairwise(times)]
    return {
        "run": str(run.directory),
        "steps": len(times),
        "seconds_to_first_step": round(times[0] - began, 2),
        "step_seconds": round(median(seconds), 4) if seconds else None,
        "best_step_seconds": round(min(seconds), 4) if seconds else None,
        "loss": [round(losses[0], 4), round(losses[-1], 4)],
        "peak_mib": _memory_mib()["VmHWM"],
        "anonymous_mib": max(anonymous),
    }


def _config(job: dict[str, Any]) -> Any:
    from loragen.core.adapter.layout import Layout
    from loragen.core.config import GenTrainConfig, Override, load
    from loragen.core.run.checkpoints import load_adapter
    from loragen.core.run.directory import find_checkpoints

    trained_on = [one for one in job["datasets"] if one["trained_on"]]
    first = find_checkpoints(Path(trained_on[0]["checkpoints"]))[0]
    options = geometries(Layout.of(load_adapter(first).tensors, 384).tokens)[job["geometry"]]
    ours = {
        "sources": [{key: one[key] for key in ("checkpoints", "prompts")} for one in trained_on],
        "decoder": {"name": "hyperconv", **options},
        "experiments_dir": f"{job['folder']}/experiments",
        "data.cache_dir": f"{job['folder']}/cache",
        "data.batch_size": job["batch_size"],
        "data.prompts_per_condition": job["prompts"],
        "data.samples_per_prompt": 1,
        "data.max_checkpoints": 1000,
        "data.val_ratio": 0,
        "training.objective": "reconstruction",
        "training.max_epochs": 10_000,
        "training.max_steps": job["steps"],
        "training.learning_rate": job["learning_rate"],
        "training.last_every": 10_000,
        "trainer.precision": job["precision"],
        "trainer.accelerator": "cpu",
        "loggers": {},
    }
    flags = [Override(tuple(key.split(".")), value, key) for key, value in ours.items()]
    return load(GenTrainConfig, flags=flags, environment={})


def _generate(job: dict[str, Any]) -> dict[str, Any]:
    """Measures generation from prompts to files, after the generator and its encoder are loaded."""
    from loragen.core.generator.model import Generator

    began = time.perf_counter()
    generator = Generator.load(job["run"])
    _ = generator.text_encoder
    loaded = time.perf_counter() - began
    seconds, parts = [], []
    for round_ in range(8):
        one = job["datasets"][round_ % len(job["datasets"])]
        output = Path(job["folder"]) / "generated"
        prompts = one["other_prompts"][: job["prompts"]]
        started = time.perf_counter()
        generator.generate(prompts).save(output, overwrite=True)
        seconds.append(round(time.perf_counter() - started, 4))
        started = time.perf_counter()
        generator.embed(prompts)
        embedded = time.perf_counter()
        adapter = generator.generate(prompts)
        parts.append((embedded - started, time.perf_counter() - embedded))
        del adapter
    return {
        "load_seconds": round(loaded, 2),
        "seconds": round(median(seconds[1:]), 4),
        "best_seconds": min(seconds),
        "embed_seconds": round(median(one[0] for one in parts), 4),
        "embed_and_decode_seconds": round(median(one[1] for one in parts), 4),
        "peak_mib": _memory_mib()["VmHWM"],
        "anonymous_mib": _memory_mib()["RssAnon"],
    }


def _judge(job: dict[str, Any]) -> dict[str, Any]:
    """Trains, then generates from prompts in other words, for trained-on and held-out datasets."""
    from loragen.core.generator.model import Generator
    from loragen.core.run.checkpoints import load_adapter

    trained = _train(job)
    generator = Generator.load(trained["run"])
    errors: dict[bool, list[float]] = {True: [], False: []}
    for one in job["datasets"]:
        layout, scale = generator.layout, generator.normalization.scale
        truth = layout.pack(load_adapter(Path(one["truth"])).tensors)
        made = layout.pack(generator.generate(one["other_prompts"][: job["prompts"]]).tensors)
        error = ((made - truth) / scale).norm() / (
            (generator.normalization.mean - truth) / scale
        ).norm()
        errors[one["trained_on"]].append(float(error))
    return {
        **trained,
        "error_on_new_prompts": round(median(errors[True]), 4),
        "error_on_new_mixtures": round(median(errors[False]), 4),
        "worst_error_on_new_mixtures": round(max(errors[False]), 4),
        "error_of_the_mean": 1.0,
    }


def _memory_mib() -> dict[str, int]:
    """Returns VmHWM, the peak of the resident memory with memory-mapped files, and RssAnon, the
    process's own memory now. Needs Linux."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return {name: int(fields[name].split()[0]) // 2**10 for name in ("VmHWM", "RssAnon")}


def _machine() -> dict[str, Any]:
    """Returns GFLOP/s of float32 matrix products, the best of ten, the threads and the load."""
    import torch

    a, seconds = torch.randn(2048, 2048), []
    for _ in range(10):
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    rate = 2 * 2048**3 / min(seconds) / 1e9
    threads, load = torch.get_num_threads(), round(os.getloadavg()[0], 1)
    return {"gflops": round(rate), "threads": threads, "load": load}


MEASUREMENTS = {"step": _step, "latency": _latency, "memory": _memory, "quality": _quality}
JOBS = {"train": _train, "generate": _generate, "judge": _judge}

if __name__ == "__main__":
    # The command line sets the same: see loragen/cli/main.py.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
