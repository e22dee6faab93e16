"""Following a run that another process writes, here or on another machine, by asking its files."""

import time
from math import isfinite
from pathlib import Path

from loragen.core.errors import UsageError
from loragen.core.progress import Progress, Step, Validation
from loragen.core.run import MANIFEST
from loragen.core.run.history.summary import LOSS, ListedRun, listed, summarize
from loragen.core.run.metrics import METRICS, MetricsReader

TOKENS, STAGE = "train/tokens_per_second", "train/stage"


def follow(run: ListedRun, progress: Progress, seconds: float = 1.0) -> ListedRun:
    """Sends the steps and validations of a run to `progress` as they are logged, asking every so
    many seconds, and returns the run once it is no longer in training.

    Raises UsageError if the run is removed meanwhile.
    """
    reader, began = MetricsReader(run.path / METRICS), time.monotonic()
    first: int | None = None
    progress.training_started(run.name, run.max_steps)
    try:
        while True:
            ended = run.state != "running"  # asked before its last lines are read
            first = _report(reader, run, progress, began, first)
            if ended:
                return run
            time.sleep(seconds)
            run = _renewed(run.path)
    finally:
        progress.training_ended(run.name)


def _renewed(path: Path) -> ListedRun:
    try:
        return listed(path, summarize(path))
    except FileNotFoundError:
        raise UsageError(f"{path} was removed: it has no {MANIFEST} any more") from None


def _report(
    reader: MetricsReader, run: ListedRun, progress: Progress, began: float, first: int | None
) -> int | None:
    """Sends what is new: validations, of those before the first call the last one, and the last
    step. Returns the step from which the speed is measured."""
    new = reader.new_entries()
    validations = [entry for entry in new if run.metric in entry and run.metric != LOSS]
    for entry in validations[-1:] if first is None else validations:
        metrics = {name: value for name, value in entry.items() if name.startswith("val")}
        at = int(entry["step"])
        known = [one for one in reader.entries if run.metric in one and one["step"] <= at]
        best = min(known, key=lambda one: (not isfinite(one[run.metric]), one[run.metric]))
        progress.validated(
            Validation(
                "training",
                (at, max(run.max_steps, at)),
                metrics,
                ("training", int(best["step"])),
                run.name,
            )
        )
    steps = [entry for entry in new if LOSS in entry]
    if not steps:
        return first
    last = steps[-1]
    at = int(last["step"])
    first = at if first is None else first
    passed = time.monotonic() - began
    rate, unit = last.get(TOKENS, 0.0), "answer tokens/s"
    if TOKENS not in last:
        rate, unit = (at - first) / passed if at > first else at / max(run.age, 1.0), "steps/s"
    stage = int(last.get(STAGE, 1))
    progress.step(Step(at, max(run.max_steps, at), stage, last[LOSS], rate, unit, name=run.name))
    return first
