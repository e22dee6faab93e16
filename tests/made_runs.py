"""Run directories that no training has made: their manifest, settings and metrics, and files of the
sizes that are given."""

import json

CONFIG = """\
base_model: demo
seed: 0
training:
  batch_size: 16
  max_steps: 8
"""


def make_run(folder, name, steps=8, losses=None, val=None, files=(), settings=CONFIG, **manifest):
    """Makes `folder/name`. `losses` are those of the steps 1, 2, ...; `val` is {step: val/loss}."""
    run = folder / name
    (run / "checkpoints").mkdir(parents=True)
    document = {
        "format_version": 1,
        "kind": "lora",
        "status": "success",
        "started": "2026-01-01T12:00:00+00:00",
        "seconds": 60.0,
        "base_model": "demo",
        "max_steps": 8,
        "steps": [7, 8],
        "dataset": {"name": name.partition("_")[0], "path": "", "sha256": "", "rows": 12},
        "plugins": [],
        **manifest,
    }
    (run / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    (run / "config.yaml").write_text(settings, encoding="utf-8")
    log(run, [{"step": i, "train/loss": v} for i, v in enumerate(losses or [1.0] * steps, 1)])
    log(run, [{"step": step, "val/loss": value} for step, value in (val or {}).items()])
    for file in ("checkpoints/checkpoint-step-007.ckpt", "checkpoints/checkpoint-step-008.ckpt"):
        (run / file).write_bytes(bytes(1000))
    for file in files:
        (run / file).parent.mkdir(parents=True, exist_ok=True)
        (run / file).write_bytes(bytes(10))
    return run


def log(run, entries):
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in entries)


def change_manifest(run, **changes):
    """In its place, as an editor would."""
    document = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    (run / "manifest.json").write_text(json.dumps({**document, **changes}), encoding="utf-8")


def aged(*paths, seconds=60):
    """Makes files look as if nobody had touched them for a while."""
    import os
    import time

    for root in paths:
        for path in [*root.rglob("*"), root]:
            os.utime(path, (time.time() - seconds,) * 2)
