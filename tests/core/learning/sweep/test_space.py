"""What `--param` takes, and what is wrong with it, all at once."""

import pytest

from loragen.core.learning.sweep.space import MOST_CORNERS, Param, corners, parse_params


def parsed(*texts):
    params, problems = parse_params(texts)
    assert not problems
    return params


def test_ranges():
    rate, rank, steps, choice = parsed(
        "a.rate=log:1e-5:1e-3", "rank=logint:4:64", "steps=int:1:10:4", "c=choice:on-x,8,[q, v]"
    )
    assert (rate.kind, rate.low, rate.high) == ("log", 1e-5, 1e-3)
    assert (rank.low, rank.high) == (4, 64)
    assert (steps.high, steps.step) == (9, 4)  # 1, 5, 9
    assert choice.choices == ("on-x", 8, ["q", "v"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rank", "expected KEY=RANGE"),
        ("rank=int", "'int' is no range"),
        ("rank=lgo:1:2", "Did you mean 'log'?"),
        ("rank=int:1:2.5", "'2.5' is no whole number"),
        ("rank=float:2:1", "2 is not below 1"),
        ("rank=log:0:1", "begins above 0"),
        ("rank=int:1:4:9", "between 1 and 3"),
        ("rank=float:0:inf", "not finite"),
        ("rank=float:0", "expected float:LOW:HIGH"),
        ("rank=choice:8", "two choices"),
        ("rank=choice:8,8", "given twice"),
    ],
)
def test_what_is_wrong(text, said):
    params, (problem,) = parse_params([text])
    assert not params
    assert problem.startswith(f"--param {text}: ")
    assert said in problem


def test_all_problems_at_once_and_the_others_are_read():
    params, problems = parse_params(["a=int:1:2", "b=nonsense:1", "a=int:1:3", "c"])
    assert [param.key for param in params] == ["a"]
    assert len(problems) == 3
    assert "given twice" in problems[1]


def test_nothing_to_search():
    assert "--param training" in parse_params([])[1][0]


def test_every_end_is_tried_before_the_first_trial():
    few = parsed("a=int:1:3", "b=choice:x,y,z")
    assert len(list(corners(few))) == 6
    many = [Param(f"k{i}", "float", "", 0.0, 1.0) for i in range(12)]
    found = list(corners(many))
    assert len(found) == 13 < MOST_CORNERS
    assert all(any(one[param.key] == 1.0 for one in found) for param in many)
