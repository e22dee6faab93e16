"""Measures memory and time of `loragen ckpt analyze --html` for several numbers of checkpoints.

    python benchmarks/checkpoint_analysis.py --checkpoints 50 1000

Each series is a random walk of a tiny adapter, analysed in its own process. Needs a system that
reports a child's peak memory (`os.wait4`: Linux, macOS).
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

LAYERS, WIDTH, RANK = 4, 128, 4
KINDS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "out_proj")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[50, 1000])
    print("| checkpoints | peak MiB | seconds |\n|---|---|---|")
    for count in parser.parse_args().checkpoints:
        with tempfile.TemporaryDirectory() as folder:
            walk(Path(folder), count)
            peak, seconds = analyzed(Path(folder))
        print(f"| {count:,} | {peak:.0f} | {seconds:.1f} |", flush=True)


def walk(folder: Path, count: int) -> None:
    """Writes checkpoints, each a small random step from the previous one."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    tensors = {
        f"base_model.model.layers.{layer}.{kind}.lora_{matrix}.weight": torch.randn(
            size, generator=generator
        )
        for layer in range(LAYERS)
        for kind in KINDS
        for matrix, size in sizes.items()
    }
    for step in range(1, count + 1):
        for key, tensor in tensors.items():
            tensors[key] = tensor + 0.01 * torch.randn(tensor.shape, generator=generator)
        torch.save({"state_dict": tensors}, folder / f"checkpoint-step-{step:04d}.ckpt")


def analyzed(folder: Path) -> tuple[float, float]:
    """Returns (peak MiB, seconds), with the start of Python and torch."""
    command = ["ckpt", "analyze", str(folder), "--html", str(folder / "page.html")]
    started = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "loragen", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"loragen {' '.join(command)} failed")
    kib = usage.ru_maxrss / (1024 if sys.platform == "darwin" else 1)
    return kib / 1024, time.perf_counter() - started


if __name__ == "__main__":
    main()
