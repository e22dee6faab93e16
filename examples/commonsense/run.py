"""The whole recipe, command by command, each shown before it runs.

    python run.py --data-root data_to_lora/cs --output commonsense-out

Every dataset is held out once: a generator learns from the others and makes its adapter. Base,
adapters and results that are in --output already are not made again, so an interrupted run goes on
by the same command; remove its results/ to judge anew.
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
    parser = argparse.ArgumentParser(description="Collect, learn, generate and judge.")
    parser.add_argument("--data-root", required=True, help="datasets, as for loragen")
    parser.add_argument("--output", type=Path, required=True, help="everything is written below it")
    parser.add_argument("--minutes", type=float, default=5, help="of pretraining")
    parser.add_argument("--held-out", action="append", help="a dataset; repeatable; default: each")
    parser.add_argument("--limit", type=int, help="test on the first so many rows of a dataset")
    parser.add_argument("--multi-task", action="store_true", help="one LoRA for the others, too")
    options = parser.parse_args()
    names = dataset_names(Path(options.data_root))
    held_out = options.held_out or names
    if not names or set(held_out) - set(names):
        raise SystemExit(f"datasets below {options.data_root}: {', '.join(names) or 'none'}")
    more = ["--oracle", *(["--multi-task"] if options.multi_task else [])]
    more += ["--limit", str(options.limit)] if options.limit else []
    base = pretrained(options.data_root, options.output, options.minutes)
    runs = collected(options.data_root, options.output, base)
    judgements = [judged(options.data_root, options.output, runs, name, more) for name in held_out]
    for measure, title in MEASURES.items():
        print("\n" + table(judgements, measure, title))


def pretrained(data: str, out: Path, minutes: float) -> Path:
    """The directory of the base model."""
    base = out / "base"
    if not (base / "config.json").is_file():
        script = [sys.executable, str(HERE / "pretrain_base.py")]
        run([*script, "--data-root", data, "--output", str(base), "--minutes", str(minutes)])
    return base


def collected(data: str, out: Path, base: Path) -> dict[str, str]:
    """Dataset name -> the run with its adapters; each is for the generators of the others."""
    config = ["--config", str(HERE / "lora.yaml"), "--base-model", str(base)]
    places = ["--data-root", data, "--runs-dir", str(out / "runs")]
    answer = run([*LORAGEN, "lora", "train", "--all", *config, *places, "--json"])
    return {one["dataset"]["name"]: one["run"] for one in json.loads(answer)}


def judged(
    data: str, out: Path, runs: Mapping[str, str], name: str, more: Sequence[str]
) -> dict[str, Any]:
    """What `gen eval` says of a generator that has never seen the dataset."""
    results = out / "results" / name
    if not (results / "results.json").is_file():
        model = learned(out, [run for other, run in runs.items() if other != name])
        where = ["--data-root", data, "--cache-dir", str(out / "cache"), "--output", str(results)]
        command = [*LORAGEN, "gen", "eval", "--model", model, "--dataset", name, *where, *more]
        print(run(command), file=sys.stderr)
    document: dict[str, Any] = json.loads((results / "results.json").read_text(encoding="utf-8"))
    return document


def learned(out: Path, runs: Sequence[str]) -> str:
    """The experiment directory of a generator trained on these runs."""
    config = ["--config", str(HERE / "generator.yaml")]
    places = {"experiments_dir": out / "experiments", "data.cache_dir": out / "cache"}
    settings = [part for key, path in places.items() for part in ("--set", f"{key}={path}")]
    sources = [part for run in runs for part in ("--checkpoint-dir", run)]
    return run([*LORAGEN, "gen", "train", *config, *settings, *sources]).strip()


def table(judgements: Sequence[Mapping[str, Any]], measure: str, title: str) -> str:
    """Markdown; a dataset that does not have the measure shows a dash."""
    columns = list(judgements[0]["columns"])
    lines = [
        [title, *(column.replace("_", " ") for column in columns)],
        ["---"] * (1 + len(columns)),
    ]
    for judgement in judgements:
        (dataset,) = judgement["datasets"]
        of = dataset.get(measure, {})
        cells = [f"{of[column]:.2f}" if column in of else "-" for column in columns]
        lines.append([dataset["name"], *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(command: Sequence[str]) -> str:
    """Shows a command, runs it, and gives back its stdout; ends here where it fails."""
    print(f"\n$ {shlex.join(command)}", file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout


if __name__ == "__main__":
    main()
