"""The demo's world: facts that never move, honest splits, and files that are checked."""

import pytest
import yaml

from loragen.core.errors import ConfigError, UsageError
from loragen.demo.world import (
    PAIRS,
    STYLES,
    TEST_CREATURES,
    TRAIN_CREATURES,
    VALUES,
    WORLD_FILE,
    Pair,
    World,
    expected_answer,
    prepare_demo,
)

SEEDS = range(20)


@pytest.fixture
def world():
    return World.load()


def test_forty_datasets_and_creatures_that_are_never_shared():
    assert len(PAIRS) == 40
    assert (len(TRAIN_CREATURES), len(TEST_CREATURES)) == (64, 32)
    assert not set(TRAIN_CREATURES) & set(TEST_CREATURES)


@pytest.mark.parametrize("seed", SEEDS)
def test_held_out_pairs_leave_every_attribute_and_style_to_train_on(world, seed):
    held_out, training = world.held_out_pairs(seed), world.training_pairs(seed)
    assert len(held_out) == 8
    assert len(training) == 32
    assert not set(held_out) & set(training)
    assert {pair.attribute for pair in training} == set(VALUES)
    assert {pair.style for pair in training} == set(STYLES)


def test_the_seed_moves_the_held_out_pairs(world):
    assert len({world.held_out_pairs(seed) for seed in SEEDS}) > 10


@pytest.mark.parametrize("seed", SEEDS)
def test_sampled_training_pairs_are_training_pairs_of_many_kinds(world, seed):
    sample = world.sample_training_pairs(seed, 8)
    assert len(set(sample)) == 8
    assert set(sample) <= set(world.training_pairs(seed))
    assert len({pair.attribute for pair in sample}) >= 6
    assert {pair.style for pair in sample} == set(STYLES)


def test_every_row_asks_about_its_creature_and_has_the_right_answer(world):
    pair = Pair("color", "sentence")
    for row, creature in zip(world.test_rows(pair, "train"), TEST_CREATURES, strict=True):
        assert creature in row["prompt"]
        assert row["response"] == expected_answer(creature, pair)
        assert row["response"].startswith("it is ")


def test_unseen_wordings_are_in_no_training_row(world):
    trained = "\n".join(row["prompt"] for pair in PAIRS for row in world.train_rows(pair))
    asked = [text for kind in world.attributes.values() for text in kind.unseen]
    styled = [text for kind in world.styles.values() for text in kind.unseen]
    for creature in TRAIN_CREATURES:
        assert not any(text.replace("{creature}", creature) in trained for text in asked)
    assert not any(f" {text}\n" in trained for text in styled)


def test_wordings_are_dealt_out_evenly(world):
    rows = world.train_rows(Pair("size", "word"))
    uses = [sum(row["prompt"].endswith(end) for row in rows) for end in world.styles["word"].train]
    assert max(uses) - min(uses) <= len(rows) // 8


def changed(**changes):
    return {**yaml.safe_load(WORLD_FILE.read_text(encoding="utf-8")), **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"attributes": {}, "styles": {}}, "attributes"),
        (changed(held_out=[["color", "wrod"]]), "wrod"),
        (changed(colours={}), "colours"),
        ([1, 2], "expected a mapping"),
    ],
)
def test_a_faulty_world_file_is_one_line_with_its_name(tmp_path, content, message):
    file = tmp_path / "world.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        World.load(file)
    for problem in caught.value.problems:
        assert problem.startswith(str(file))
        assert "\n" not in problem


def test_a_wording_without_the_creature_is_refused(tmp_path):
    content = changed()
    content["attributes"]["color"]["unseen"][0] = "what shade is it?"
    file = tmp_path / "world.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(ConfigError, match="creature"):
        World.load(file)


def test_a_file_may_name_the_held_out_pairs(tmp_path):
    file = tmp_path / "world.yaml"
    file.write_text(yaml.safe_dump(changed(held_out=[["color", "word"]])), encoding="utf-8")
    assert World.load(file).held_out_pairs(3) == (Pair("color", "word"),)


def test_a_whole_attribute_may_be_held_out_but_not_everything(tmp_path):
    file = tmp_path / "world.yaml"
    pairs = [list(pair) for pair in PAIRS if pair.attribute == "legs"]
    file.write_text(yaml.safe_dump(changed(held_out=pairs)), encoding="utf-8")
    training = World.load(file).training_pairs(0)
    assert len(training) == 35
    assert "legs" not in {pair.attribute for pair in training}
    file.write_text(yaml.safe_dump(changed(held_out=list(map(list, PAIRS)))), encoding="utf-8")
    with pytest.raises(ConfigError, match="nothing is left to train on"):
        World.load(file)


def test_a_directory_that_is_no_demo_is_not_changed(tmp_path):
    """A copy of world.yaml, which the README asks for, does not make it one."""
    kept = {"thesis.tex", "world.yaml", "data"}
    for name in kept:
        (tmp_path / name).write_text("years of work", encoding="utf-8")
    for force in (False, True):
        with pytest.raises(UsageError, match=str(tmp_path.name)):
            prepare_demo(tmp_path, 0, None, force)
    assert {file.name for file in tmp_path.iterdir()} == kept


def test_force_replaces_an_earlier_demo_and_nothing_else(tmp_path):
    out = tmp_path / "out"
    prepare_demo(out, 0, None, force=False)
    for name in ("thesis.tex", "runs", "results.md"):
        (out / name).write_text("text", encoding="utf-8")
    for name in ("results.md", "runs"):
        with pytest.raises(UsageError, match=f"{name} was not written by loragen"):
            prepare_demo(out, 0, None, force=True)
        (out / name).unlink()
    prepare_demo(out, 0, None, force=True)
    assert {path.name for path in out.iterdir()} == {"world.yaml", "data", "thesis.tex"}
