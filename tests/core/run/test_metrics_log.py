import json
from math import inf, isnan, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.run.loggers import MetricsLog, read_metrics


@pytest.fixture
def file(tmp_path):
    return tmp_path / "metrics.jsonl"


def test_one_object_a_line_at_once(file):
    log = MetricsLog(file)
    log.log_metrics({"train/loss": 0.5, "train/准确率": 1.0}, step=1)
    assert json.loads(file.read_bytes()) == {"step": 1, "train/loss": 0.5, "train/准确率": 1.0}
    log.log_metrics({"val/loss": 2}, step=1)
    assert file.read_bytes().count(b"\n") == 2
    assert read_metrics(file)[1] == {"step": 1, "val/loss": 2}


def test_what_is_not_finite_is_null_and_nan_again(file):
    MetricsLog(file).log_metrics({"a": nan, "b": inf, "c": 1.0}, step=1)
    assert json.loads(file.read_bytes()) == {"step": 1, "a": None, "b": None, "c": 1.0}
    (entry,) = read_metrics(file)
    assert isnan(entry["a"])
    assert isnan(entry["b"])


def test_a_new_run_has_no_file_before_its_first_step(file):
    MetricsLog(file)
    MetricsLog(file, resume_step=4)
    assert not file.exists()


STEPS = st.lists(st.integers(1, 20), max_size=12)
TORN = st.one_of(st.just(b""), st.binary(max_size=40), st.integers(1, 25))


@given(STEPS, TORN, st.integers(1, 20))
def test_resuming_keeps_exactly_the_entries_up_to_the_step(tmp_path_factory, steps, torn, resume):
    """Whatever the killed run left at the end: a part of a line, another program's bytes."""
    file = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    log = MetricsLog(file)
    for index, step in enumerate(steps):
        log.log_metrics({"index": index}, step)
    whole = b'{"step": 1, "train/loss": 0.25}'
    tail = whole[:torn] if isinstance(torn, int) else torn.replace(b"\n", b"")
    with file.open("ab") as stream:
        stream.write(tail)
    kept = [{"step": s, "index": i} for i, s in enumerate(steps) if s <= resume]
    resumed = MetricsLog(file, resume)
    assert read_metrics(file) == kept
    resumed.log_metrics({"index": -1}, resume + 1)
    assert read_metrics(file) == [*kept, {"step": resume + 1, "index": -1}]
    assert [path.name for path in file.parent.iterdir()] == ["metrics.jsonl"]


def test_a_last_line_that_only_lost_its_end_of_line_is_an_entry(file):
    file.write_bytes(b'{"step": 1, "a": 1}\n{"step": 2, "a": 2}')
    MetricsLog(file, 2).log_metrics({"a": 3}, 3)
    assert [entry["step"] for entry in read_metrics(file)] == [1, 2, 3]
