"""The contest's own rules: who is a stranger, which prompts are drawn."""

from pathlib import Path

import pytest

from loragen.core.data.rows import Row
from loragen.demo.contest import Target, drawn_prompts, unrelated
from loragen.demo.settings import PROMPTS
from loragen.demo.world import World


@pytest.mark.parametrize("seed", range(10))
def test_the_control_shares_neither_attribute_nor_style(seed):
    pairs = World.load().held_out_pairs(seed)
    targets = [Target("both", pair, Path("train"), Path("test")) for pair in pairs]
    for target in targets:
        stranger = unrelated(target, targets)
        assert not set(stranger.pair) & set(target.pair)


def test_controls_come_from_the_same_split():
    first, second, *_ = World.load().held_out_pairs(0)
    targets = [
        Target("both", first, Path("a"), Path("a")),
        Target("new_wording", second, Path("b"), Path("b")),
        Target("both", second, Path("c"), Path("c")),
    ]
    assert unrelated(targets[0], targets).split == "both"


def test_every_draw_takes_other_prompts_and_no_answers():
    rows = [Row(prompt=f"question {n}", response=f"answer {n}", line=n) for n in range(32)]
    draws = drawn_prompts(rows, 3)
    assert all(len(set(draw)) == PROMPTS for draw in draws)
    assert len({frozenset(draw) for draw in draws}) == 3
    assert all(prompt.startswith("question") for draw in draws for prompt in draw)


def test_a_small_dataset_gives_all_it_has():
    rows = [Row(prompt=f"question {n}", response="answer", line=n) for n in range(5)]
    assert len(drawn_prompts(rows, 1)[0]) == 5
