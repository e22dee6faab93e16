import pytest
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.errors import UsageError
from loragen.core.generator.requests import draw_prompts, with_text

PROMPTS = [f"prompt {i}" for i in range(20)]


def test_by_default_all_prompts_are_read_at_once():
    assert draw_prompts(PROMPTS, 1, None, 0, usual=8) == [PROMPTS]


@given(draws=st.integers(1, 9), size=st.integers(1, 19), seed=st.integers(0, 99))
def test_draws_are_different_prompts_in_their_order(draws, size, seed):
    drawn = draw_prompts(PROMPTS, draws, size, seed, usual=8)
    assert len(drawn) == draws
    for draw in drawn:
        assert len(set(draw)) == size
        assert draw == [prompt for prompt in PROMPTS if prompt in draw]
    assert draw_prompts(PROMPTS, draws + 1, size, seed, usual=8)[:draws] == drawn


def test_a_draw_has_as_many_prompts_as_in_training_and_at_most_half():
    assert len(draw_prompts(PROMPTS, 2, None, 0, usual=8)[0]) == 8
    assert len(draw_prompts(PROMPTS, 2, None, 0, usual=64)[0]) == 10


def test_another_seed_draws_others():
    one, other = (draw_prompts(PROMPTS, 3, 5, seed, usual=8) for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize("prompts, size", [(PROMPTS, 20), (PROMPTS, 30), (PROMPTS[:1], None)])
def test_draws_that_could_not_differ_are_refused(prompts, size):
    with pytest.raises(UsageError, match=rf"there are {len(prompts)}$"):
        draw_prompts(prompts, 3, size, 0, usual=8)


def test_prompts_without_text_are_left_out():
    assert with_text(["a", " ", "b"]) == ["a", "b"]
    assert with_text("one prompt") == ["one prompt"]
    for empty in ([], ["", "\n"], " "):
        with pytest.raises(UsageError, match="no prompts"):
            with_text(empty)
