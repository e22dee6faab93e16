import pytest

from loragen.core.data.rows import Row, allowed_answers, closed_answers


def row(prompt, response, **more):
    return Row(prompt=prompt, response=response, line=1, **more)


@pytest.mark.parametrize(
    "responses, closed",
    [
        (["a", "b", "a", "b"], ["a", "b"]),
        (["b", "a"] * 10, ["a", "b"]),
        (["a"] * 8, None),  # one answer is no choice
        (["a", "b", "c"], None),  # they do not recur
        ([f"{i % 16}" for i in range(32)], sorted(f"{i}" for i in range(16))),
        ([f"{i % 17}" for i in range(100)], None),  # too many
        ([f"free text {i}" for i in range(10)], None),
    ],
)
def test_a_closed_answer_set_is_small_and_recurs(responses, closed):
    assert closed_answers([row("p", response) for response in responses]) == closed


def test_a_rows_own_choices_come_before_the_closed_set():
    rows = [row("p", "a", choices=["a", "z"]), row("q", "b")]
    assert allowed_answers(rows, ["a", "b"]) == [["a", "z"], ["a", "b"]]
    assert allowed_answers(rows, None) is None
