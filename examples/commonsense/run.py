"""Runs the recipe, and prints each command before it runs.

    python run.py --data-root data_to_lora/cs --output commonsense-out

Every dataset is held out once: a generator is trained on the others and generates its adapter.
Base, adapters and results in --output are kept, so the same command resumes an interrupted run;
remove its results/ to evaluate again.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loragen.core.data.dataset import dataset_names

HERE = Path(__file__).parent
LORAGEN = [sys.executable, "-m", "loragen"]
MEASURES = {"accuracy": "exact match", "format_validity": "format validity"}


def main() -> None:
    parser = argparse.ArgumentParser(description="Collect adapters, train generators, evaluate.")
    parser.add_argument("--data-root", required=True, help="datasets, as for loragen")
    parser.add_argument("--output", type=Path, required=True, help="directory of all files")
    parser.add_argument("--minutes", type=float, default=5, help="minutes of pretraining")
    parser.add_argument("--held-out", action="append", help="a dataset; repeatable; default: each")
    parser.add_argument("--limit", type=int, help="test on the first rows of a dataset")
    parser.add_argument(
        "--multi-task", action="store_true", help="also train one LoRA on the others"
    )
    options = parser.parse_args()
    names = dataset_names(Path(options.data_root))
    held_out = options.held_out or names
    if not names or set(held_out) - set(names):
        raise SystemExit(f"datasets below {options.data_root}: {', '.join(names) or 'none'}")
    more = ["--oracle", *(["--multi-task"] if options.multi_task else [])]
    more += ["--limit", str(options.limit)] if options.limit else []
    base = pretrained(options.data_root, options.output, options.minutes)
    runs = collected(options.data_root, options.output, base)
    results = [evaluated(options.data_root, options.output, runs, name, more) for name in held_out]
    for measure, title in MEASURES.items():
        print("\n" + table(results, measure, title))


def pretrained(data: str, out: Path, minutes: float) -> Path:
    """Returns the directory of the base model."""
    base = out / "base"
    if not (base / "config.json").is_file():
        script = [sys.executable, str(HERE / "pretrain_base.py")]
        run([*script, "--data-root", data, "--output", str(base), "--minutes", str(minutes)])
    return base


def collected(data: str, out: Path, base: Path) -> dict[str, str]:
    """Returns {dataset: run of its adapter}; the generators of the other datasets train on it."""
    config = ["--config", str(HERE / "lora.yaml"), "--base-model", str(base)]
    paths = ["--data-root", data, "--runs-dir", str(out / "runs")]
    answer = run([*LORAGEN, "lora", "train", "--all", *config, *paths, "--json"])
    return {one["dataset"]["name"]: one["run"] for one in json.loads(answer)}


def evaluated(
    data: str, out: Path, runs: Mapping[str, str], name: str, more: Sequence[str]
) -> dict[str, Any]:
    """Returns the results of `gen eval` for a generator that was not trained on the dataset."""
    results = out / "results" / name
    if not (results / "results.json").is_file():
        model = trained(out, [run for other, run in runs.items() if other != name])
        paths = ["--data-root", data, "--cache-dir", str(out / "cache"), "--output", str(results)]
        command = [*LORAGEN, "gen", "eval", "--model", model, "--dataset", name, *paths, *more]
        print(run(command), file=sys.stderr)
    document: dict[str, Any] = json.loads((results / "results.json").read_text(encoding="utf-8"))
    return document


def trained(out: Path, runs: Sequence[str]) -> str:
    """Returns the experiment directory of a generator trained on these runs."""
    config = ["--config", str(HERE / "generator.yaml")]
    paths = {"experiments_dir": out / "experiments", "data.cache_dir": out / "cache"}
    settings = [part for key, path in paths.items() for part in ("--set", f"{key}={path}")]
    sources = [part for run in runs for part in ("--checkpoint-dir", run)]
    return run([*LORAGEN, "gen", "train", *config, *settings, *sources]).strip()


def table(results: Sequence[Mapping[str, Any]], measure: str, title: str) -> str:
    """Returns a Markdown table; a dataset without the measure has a dash."""
    columns = list(results[0]["columns"])
    lines = [
        [title, *(column.replace("_", " ") for column in columns)],
        ["---"] * (1 + len(columns)),
    ]
    for result in results:
        (dataset,) = result["datasets"]
        of = dataset.get(measure, {})
        cells = [f"{of[column]:.2f}" if column in of else "-" for column in columns]
        lines.append([dataset["name"], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(command: Sequence[str]) -> str:
    """Prints a command, runs it, and returns its stdout. Exits if the command fails."""
    print(f"\n$ {shlex.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
