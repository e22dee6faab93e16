"""What results say: paired bootstrap, recovered headroom, margins, several results as one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.errors import UsageError
from loragen.core.evaluation.statistics import (
    Bootstrap,
    bits_of,
    combine,
    hits_of,
    summaries,
    summary,
)

bits = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3)
tables = st.lists(bits, min_size=1, max_size=4)  # [datasets][draws][rows]


def dataset(columns, name="it", group="all", **more):
    """`dataset({"base": ["0010"], "generated": ["0110", "1100"]}, loss={...})`"""
    shares = {key: [one.count("1") / len(one) for one in of] for key, of in columns.items()}
    return {
        "name": name,
        "group": group,
        "rows": len(next(iter(columns.values()))[0]),
        "accuracy": {key: sum(of) / len(of) for key, of in shares.items()},
        "correct": columns,
        "novelty": None,
        **more,
    }


def several(rights, rows=40, **columns):
    """Datasets with one draw each; `rights` are the generated column's numbers of right rows."""
    rights = {"generated": rights, **columns}
    return [
        dataset(
            {key: ["1" * of[i] + "0" * (rows - of[i])] for key, of in rights.items()}, f"task-{i}"
        )
        for i in range(len(rights["generated"]))
    ]


@settings(max_examples=20)
@given(tables)
def test_identical_columns_do_not_differ_at_all(table):
    datasets = [
        dataset({"other": [bits_of(one) for one in of], "generated": [bits_of(one) for one in of]})
        for of in (draws[:1] for draws in table)
    ]
    found = summary(datasets, ["other", "generated"])
    assert found["differences"]["other"] == {"mean": 0, "low": 0, "high": 0}
    assert (found["beats"], found["beaten_by"]) == ([], [])


@settings(max_examples=20)
@given(tables)
def test_the_mean_is_inside_its_interval_and_all_within_0_and_1(table):
    datasets = [dataset({"generated": [bits_of(one) for one in draws]}) for draws in table]
    found = summary(datasets, ["generated"])
    low, high = found["interval"]["generated"]
    assert 0 <= low <= found["accuracy"]["generated"] + 1e-4
    assert found["accuracy"]["generated"] - 1e-4 <= high <= 1


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_rows_survive_the_file(rows):
    assert hits_of({"correct": {"it": [bits_of(rows)]}}, "it").tolist() == [rows]


def test_pairing_finds_a_difference_that_the_columns_own_intervals_hide():
    """Every row that the other column answers, and three more of 40 in each dataset."""
    rights = [5, 12, 20, 28, 33, 8, 16, 25, 30, 11]
    datasets = several([right + 3 for right in rights], other=rights)
    found = summary(datasets, ["other", "generated"])
    assert found["interval"]["other"][1] > found["accuracy"]["generated"]
    assert found["beats"] == ["other"]
    assert found["differences"]["other"]["mean"] == pytest.approx(3 / 40, abs=1e-3)


def test_the_interval_of_one_dataset_is_that_of_its_rows():
    """Of 100 rows, of which half are right: the binomial error is 0.05."""
    (one,) = several([50], rows=100)
    low, high = summary([one], ["generated"])["interval"]["generated"]
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.05, 0.5 + 1.96 * 0.05), abs=0.015)


def test_datasets_that_differ_widen_the_interval_as_students_t_says():
    """Ten datasets, each all right or all wrong: no error within, a deviation of 0.527 between."""
    found = summary(several([40, 0] * 5), ["generated"])["interval"]["generated"]
    half = 2.262 * 0.527 / 10**0.5
    assert found == pytest.approx([0.5 - half, 0.5 + half], abs=0.06)


def test_two_datasets_say_little_about_a_third():
    found = summary(several([40, 20], other=[10, 15]), ["other", "generated"])
    assert found["beats"] == ["other"]  # better on both, and on every row
    unsure = summary(several([40, 10], other=[10, 15]), ["other", "generated"])
    assert (unsure["beats"], unsure["beaten_by"]) == ([], [])


def test_draws_are_drawn_again():
    """All rows right in one draw, none in the other: the rows alone have no error."""
    (one,) = [dataset({"generated": ["1" * 50, "0" * 50]})]
    low, high = summary([one], ["generated"])["interval"]["generated"]
    assert (low, high) == (0, 1)


def test_replicates_are_the_same_every_time_and_shared_by_the_columns():
    hits = [np.arange(12).reshape(1, 12) % 2 == 0, np.arange(12).reshape(1, 12) % 3 == 0]
    first = Bootstrap([12, 12]).means({"a": hits, "b": hits})
    again = Bootstrap([12, 12]).means({"b": hits})
    assert np.array_equal(first["a"], first["b"])
    assert np.array_equal(first["b"], again["b"])


def test_headroom_is_recovered_where_there_is_some():
    datasets = several([20, 5, 40], base=[0, 10, 10], oracle=[40, 14, 20], mean=[10, 10, 10])
    columns = ["base", "mean", "generated", "oracle"]
    found = summary(datasets, columns)["headroom"]
    assert (found["datasets"], found["of"]) == (2, 3)  # the second leads by 0.1 only
    assert found["columns"]["generated"] == {"mean": 1.75, "median": 1.75, "positive": 1.0}
    assert found["columns"]["mean"] == {"mean": 0.125, "median": 0.125, "positive": 0.5}
    assert found["columns"]["base"]["mean"] == 0
    assert found["columns"]["oracle"]["mean"] == 1


def test_no_headroom_is_no_number():
    found = summary(several([3], base=[3], oracle=[3]), ["base", "generated", "oracle"])
    assert found["headroom"] == {"datasets": 0, "of": 1, "columns": {}}


def test_a_margin_is_the_loss_of_the_control_above_that_of_the_right_prompts():
    datasets = [
        dataset({"generated": ["10"], "gibberish_prompts": ["10"]}, f"task-{i}", loss=loss)
        for i, loss in enumerate(
            [{"generated": 1.0, "gibberish_prompts": 1.0 + margin} for margin in (0.5, 0.7, -0.3)]
        )
    ]
    columns = ["generated", "gibberish_prompts"]
    found = summary(datasets, columns)["margins"]["gibberish_prompts"]
    assert (found["mean"], found["positive"]) == (pytest.approx(0.3), pytest.approx(0.6667))
    assert found["low"] < 0 < found["high"]
    alone = summary(datasets[:1], columns)["margins"]["gibberish_prompts"]
    assert alone == {"mean": 0.5, "positive": 1.0}  # no interval over datasets


def result(datasets, columns=("base", "generated"), **more):
    document = {
        "generator": "g.pt",
        "base_model": "b",
        "columns": list(columns),
        **summaries(datasets, columns),
        "seconds": {
            "train_adapter": 10.0,
            "generate_adapter": 0.5,
            "ratio": 20.0,
            "obtain": dict.fromkeys(columns, 0.5),
        },
        "multi_task": None,
        "novelty": None,
        "options": {"draws": 1, "shots": 4},
        "datasets": datasets,
    }
    return {**document, **more}


class TestCombine:
    def test_the_folds_of_an_experiment_are_as_one_evaluation(self):
        datasets = several([20, 5, 40, 9], base=[0, 10, 10, 1])
        whole = result(datasets)
        folds = combine([result(datasets[:1]), result(datasets[1:])])
        for key in ("accuracy", "interval", "differences", "beats", "datasets", "columns"):
            assert folds[key] == whole[key]
        assert folds["seconds"]["ratio"] == 20

    def test_times_and_novelty_count_by_their_datasets(self):
        datasets = several([20, 5, 40], base=[0, 10, 10])
        for one, share in zip(datasets, (0.1, 0.2, 0.6), strict=True):
            one["novelty"] = {"delta_w": share, "factors": 0.0}
        slow = result(datasets[:1], novelty={"collected": {"delta_w": 0.9}, "groups": {}})
        slow["seconds"] = {**slow["seconds"], "train_adapter": 40.0}
        fast = result(datasets[1:], novelty={"collected": {"delta_w": 0.6}, "groups": {}})
        folds = combine([slow, fast])
        assert folds["seconds"]["train_adapter"] == 20
        assert folds["novelty"]["collected"]["delta_w"] == pytest.approx(0.7)
        assert folds["novelty"]["groups"]["all"]["delta_w"] == pytest.approx(0.3)

    def test_a_column_that_one_lacks_is_left_out(self):
        datasets = several([20, 5], base=[0, 10])
        lone = result(datasets[1:], columns=["generated"])
        assert combine([result(datasets[:1]), lone])["columns"] == ["generated"]

    def test_what_is_not_one_experiment_is_refused(self):
        datasets = several([20, 5], base=[0, 10])
        with pytest.raises(UsageError, match="task-0"):
            combine([result(datasets[:1]), result(datasets)])
        with pytest.raises(UsageError, match="several base models"):
            combine([result(datasets[:1]), result(datasets[1:], base_model="c")])
        other = result(datasets[1:], options={"shots": 8, "seed": 1})
        with pytest.raises(UsageError, match="shots"):
            combine([result(datasets[:1]), other])
        with pytest.raises(UsageError, match="no results"):
            combine([])
