"""What differs between runs."""

import pytest

from loragen.core.errors import UsageError
from loragen.core.run.history.comparison import (
    OpenedRun,
    chosen_metrics,
    differing_settings,
    last_and_lowest,
)
from loragen.core.run.history.listing import find_run
from tests.made_runs import CONFIG, log, make_run


def opened(run):
    return OpenedRun(find_run(str(run)))


@pytest.fixture
def pair(tmp_path):
    one = make_run(tmp_path, "arc_lora_1", losses=[3.0, 1.0, 2.0], val={3: 0.5})
    settings = CONFIG.replace("batch_size: 16", "batch_size: 32") + "runs_dir: other\nextra: true\n"
    two = make_run(
        tmp_path,
        "arc_lora_2",
        losses=[4.0, 3.0],
        settings=settings,
        base_fingerprint="f",
        plugins=[{"kind": "schedule", "name": "wsd", "distribution": "x", "version": "2"}],
    )
    return [opened(one), opened(two)]


def test_the_settings_that_differ_and_what_was_read(pair):
    assert differing_settings(pair) == {
        "training.batch_size": [16, 32],
        "extra": [None, True],
        "base_fingerprint": [None, "f"],
        "version of schedule wsd": [None, "x 2"],
    }
    assert differing_settings([pair[0], pair[0]]) == {}


def test_a_configuration_that_cannot_be_read_stops_nothing(pair):
    (pair[0].run.path / "config.yaml").write_text("a: [1")
    assert differing_settings(pair)["training.batch_size"] == [None, 32]


def test_the_curves_without_the_hardware(pair):
    log(pair[0].run.path, [{"step": 3, "train/loss": 1.5, "hardware/cpu_percent": 9.0}])
    log(pair[0].run.path, [{"step": 4, "train/loss": None}])
    assert pair[0].curves == {
        "train/loss": ([1, 2, 3], [3.0, 1.0, 1.5]),
        "val/loss": ([3], [0.5]),
    }
    assert last_and_lowest(pair[0], "train/loss") == (1.5, 1.0, 2)
    assert last_and_lowest(pair[1], "val/loss") is None


def test_which_metrics_are_drawn(pair):
    assert chosen_metrics(pair, []) == ["train/loss", "val/loss"]
    assert chosen_metrics(pair, ["val/loss"]) == ["val/loss"]
    with pytest.raises(UsageError, match=r"logged by none of the runs, .* Did you mean 'val/loss'"):
        chosen_metrics(pair, ["val/los"])
