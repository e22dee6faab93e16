"""The evaluation as a whole, up to where the contest begins."""

import pytest
import torch

from loragen.core.evaluation import contest as run
from loragen.core.evaluation.contestants import EvaluationOptions, chosen
from loragen.core.progress import Silent


class Begun(Exception):  # noqa: N818
    """The contest would begin now."""


def test_the_base_answers_on_the_best_device(experiment, targets, tmp_path, monkeypatch):
    """`meta` stands for a GPU."""
    devices = []

    def hold(bench, *_):
        devices.append(bench.base.model.device)
        raise Begun

    monkeypatch.setattr(run, "best_device", lambda: torch.device("meta"))
    monkeypatch.setattr(run, "hold", hold)
    with pytest.raises(Begun):
        run.evaluate_generator(
            experiment,
            targets,
            chosen(["base"], []),
            options=EvaluationOptions(draws=2),
            base_model=None,
            cache=tmp_path,
            progress=Silent(),
            strict=False,
        )
    assert devices == [torch.device("meta")]
