"""What the tests of exact resume share: a run that is killed, and what two runs must have alike."""

import torch

from loragen.core.progress import Silent
from loragen.core.run.directory import read_manifest
from loragen.core.run.metrics import read_metrics

CLOCKED = ("train/tokens_per_second", "hardware/")


class Kill(Exception):  # noqa: N818
    """Ends a run as a kill would: nothing of the step is saved."""


class StopAt(Silent):
    """Ends the run after the step is logged and before it is saved."""

    def __init__(self, step=0):
        self.at, self.steps = step, []

    def step(self, step):
        self.steps.append(step.step)
        if step.step == self.at:
            raise Kill


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.equal(other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_course(one, other, manifest):
    """Checkpoints, optimizers, metrics and manifest of two runs."""
    names = sorted(file.name for file in (one / "checkpoints").iterdir())
    assert sorted(file.name for file in (other / "checkpoints").iterdir()) == names
    for name in names:
        first, second = (
            torch.load(run / "checkpoints" / name, weights_only=True) for run in (one, other)
        )
        for key in ("state_dict", "optimizer_states", "global_step", "callbacks"):
            assert same(first[key], second[key]), (name, key)
    assert entries(one) == entries(other)
    free = {"started", "seconds", "resumed_from"}
    first, second = (read_manifest(run, manifest).model_dump(exclude=free) for run in (one, other))
    assert first == second


def entries(run):
    """metrics.jsonl without what a clock or a sensor has measured."""
    return [
        {key: value for key, value in entry.items() if not key.startswith(CLOCKED)}
        for entry in read_metrics(run / "metrics.jsonl")
    ]
