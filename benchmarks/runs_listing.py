"""Measures `loragen runs list` on many run directories: the first time, and once they are known.

    python benchmarks/runs_listing.py --runs 5000

The directories have a manifest, 50 small files as checkpoints and the metrics of 125 steps, made by
this script. Each listing is a process of its own; the time of `loragen --help`, which imports the
same command line and reads nothing, is beside them. Processor time is that of the process; it
depends less on what else the machine does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, CHECKPOINTS = 125, 50
PAST = 1_700_000_000
"""A time long ago: what has changed within two seconds is not kept in the index."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--folder", type=Path, help="Where to make them. Default: a temporary one.")
    given = parser.parse_args()
    print("| listing | runs | seconds | processor seconds |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        runs = Path(folder) / "runs"
        for number in range(given.runs):
            make_run(runs / f"data-{number % 40:02}_lora_20260101_{number:06}", number)
        measured = {}
        for name, arguments in (
            ("`--help`", ["--help"]),
            ("the first", ["runs", "list", str(runs)]),
            ("the second", ["runs", "list", str(runs)]),
            ("the third, with one run changed", ["runs", "list", str(runs)]),
            ("`--limit 20 --json`", ["runs", "list", str(runs), "--limit", "20", "--json"]),
        ):
            if "changed" in name:
                with (runs / f"data-00_lora_20260101_{0:06}" / "metrics.jsonl").open("a") as file:
                    file.write(json.dumps({"step": 126, "train/loss": 0.1}) + "\n")
            wall, processor, lines = timed(arguments)
            measured[name] = wall, processor
            print(f"| {name} | {lines} | {wall:.2f} | {processor:.2f} |", flush=True)
        ratios = [
            one / other
            for one, other in zip(measured["the first"], measured["the second"], strict=True)
        ]
        print(f"\nfirst / second: {ratios[0]:.1f} in seconds, {ratios[1]:.1f} in processor seconds")


def make_run(run: Path, seed: int) -> None:
    """Makes a run directory as `lora train` leaves it, with small files for checkpoints."""
    (run / "checkpoints").mkdir(parents=True)
    (run / "adapter").mkdir()
    manifest = {
        "format_version": 1,
        "kind": "lora",
        "status": "success",
        "started": f"2026-01-01T{seed // 3600 % 24:02}:{seed // 60 % 60:02}:{seed % 60:02}+00:00",
        "seconds": 100.0 + seed % 7,
        "plugins": [
            {"kind": "schedule", "name": "two-stage", "distribution": "loragen", "version": "0"}
        ],
        "base_model": "Qwen/Qwen2.5-0.5B-Instruct",
        "dataset": {"name": f"data-{seed % 40:02}", "path": "/data/rows.jsonl", "sha256": "0" * 64},
        "adapter_config": {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "v_proj"]},
        "seed": seed,
        "max_steps": STEPS,
        "steps": list(range(STEPS - CHECKPOINTS + 1, STEPS + 1)),
    }
    (run / "manifest.json").write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    (run / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    lines = [
        {
            "step": s,
            "train/loss": 2.0 / s + seed % 5,
            "train/lr": 1e-4,
            "train/tokens_per_second": 9.0,
        }
        for s in range(1, STEPS + 1)
    ]
    lines += [
        {"step": s, "val/loss": 2.0 / s, "val/accuracy": 0.5} for s in range(25, STEPS + 1, 25)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")
    for step in manifest["steps"]:
        (run / "checkpoints" / f"checkpoint-step-{step:03}.ckpt").write_bytes(b"x")
    for path in (run / "manifest.json", run / "metrics.jsonl", run / "checkpoints", run):
        os.utime(path, (PAST, PAST))


def timed(arguments: list[str]) -> tuple[float, float, int]:
    """Returns (seconds, processor seconds, lines of runs) of a command."""
    before, began = os.times(), time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-m", "loragen", *arguments], capture_output=True, text=True, check=True
    )
    wall, after = time.perf_counter() - began, os.times()
    processor = after.children_user - before.children_user
    processor += after.children_system - before.children_system
    if "--json" in arguments:
        return wall, processor, len(json.loads(result.stdout)["runs"])
    return wall, processor, result.stdout.count("_lora_")


if __name__ == "__main__":
    main()
