"""The demo's targets, as the contest sees them."""

import pytest

from loragen.core.data.rows import read_rows
from loragen.core.progress import Silent
from loragen.demo.contest import target
from loragen.demo.data import begin
from loragen.demo.run import choose_targets
from loragen.demo.world import VALUES, Pair


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return begin(tmp_path_factory.mktemp("demo"), 0, None, False, lambda _: None, Silent())


def test_the_generator_sees_the_tested_prompts_and_no_labels(demo):
    pair = Pair("color", "word")
    files = demo.data(pair, "train", "train"), demo.data(pair, "test", "train")
    made = target("both", pair, *files)
    assert made.prompts == [row.prompt for row in made.rows]
    assert made.prompts_from == "tested rows"
    assert not {row.prompt for row in made.train_rows} & set(made.prompts)
    assert made.closed == sorted(VALUES["color"])


def test_what_the_generator_reads_is_of_what_its_adapters_learned(demo):
    """So that the rows of prompts that it holds out are there to be tried on."""
    for pair in demo.world.training_pairs(demo.seed):
        files = (demo.data(pair, split, "train") for split in ("prompts", "train"))
        read, learned = ({row.prompt for row in read_rows(file)} for file in files)
        assert len(read) > 100
        assert read < learned


def test_each_split_has_as_many_targets_and_every_target_is_one_of_a_kind(demo):
    targets = choose_targets(demo)
    groups = [one.group for one in targets]
    assert {groups.count(group) for group in groups} == {8}
    assert len({one.key for one in targets}) == len(targets)
