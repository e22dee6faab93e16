"""The demo from end to end, with a few steps in place of the real number."""

import json

import pytest
import yaml
from peft import PeftModel

from loragen.core.base.load import load_base
from loragen.core.config import DEMO
from loragen.core.data.dataset import Dataset
from loragen.core.progress import Silent
from loragen.demo import run, world
from loragen.demo.run import SPLITS, choose_targets, demo_results, demo_target
from loragen.demo.workers import worker_pool
from loragen.demo.world import VALUES, WORLD_FILE, Pair, prepare_demo

STEPS = 2
DATASETS = 8  # of 32
CREATURES = 20  # of 32 to be asked about: more than a draw's 16 prompts


@pytest.fixture
def few_steps(monkeypatch):
    """The same configurations with fewer steps, on fewer and smaller datasets."""

    def shorten(name):
        recipe = getattr(run, name)

        def short(*arguments):
            config = recipe(*arguments)
            config.training.max_steps = STEPS
            if hasattr(config, "checkpoints"):
                config.checkpoints.first_step = STEPS
            else:
                config.behaviour.max_steps = STEPS
            return config

        monkeypatch.setattr(run, name, short)

    for name in ("adapter_config", "oracle_config", "joint_config", "generator_config"):
        shorten(name)
    monkeypatch.setattr(world, "TRAIN_REPEATS", 1)
    monkeypatch.setattr(world, "TEST_CREATURES", world.TEST_CREATURES[:CREATURES])
    all_pairs = world.World.training_pairs
    monkeypatch.setattr(
        world.World, "training_pairs", lambda self, seed: all_pairs(self, seed)[:DATASETS]
    )


def test_the_whole_demo_with_the_users_own_world(few_steps, tmp_path, caplog):
    document = yaml.safe_load(WORLD_FILE.read_text(encoding="utf-8"))
    document["held_out"] = [["color", "word"], ["size", "list"]]
    file = tmp_path / "my-world.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    out = tmp_path / "out"
    with caplog.at_level("INFO", logger="loragen"), worker_pool() as workers:
        results = demo_results(prepare_demo(out, 3, file, force=False), workers, Silent())

    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert results["held_out"] == [["color", "word"], ["size", "list"]]
    assert results["seed"] == 3
    assert {"train_adapter", "generate_adapter", "ratio", "total"} <= set(results["seconds"])
    assert set(results["accuracy"]) == set(SPLITS)
    for columns in results["accuracy"].values():
        assert list(columns) == [column.name for column in run.COLUMNS]
        assert all(0 <= value <= 1 for value in columns.values())
    assert (out / "results.png").stat().st_size > 10_000
    assert len(list((out / "runs").iterdir())) == DATASETS
    assert (out / "world.yaml").read_text(encoding="utf-8") == file.read_text(encoding="utf-8")
    for split in ("train", "test"):
        assert (out / "data" / "color-word" / f"{split}.jsonl").is_file()
    generated = out / "generated" / "both" / "color-word" / "draw-0"
    PeftModel.from_pretrained(load_base(DEMO).model, str(generated))
    assert "collect: 8/8 adapters" in caplog.text


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return prepare_demo(tmp_path_factory.mktemp("demo"), 0, None, force=False)


def test_the_generator_sees_the_tested_prompts_and_no_labels(demo):
    target = demo_target(demo, "new_combination", Pair("color", "word"))
    assert target.prompts == [row.prompt for row in target.rows]
    assert target.prompts_from == "tested rows"
    assert not {row.prompt for row in target.train_rows} & set(target.prompts)
    assert target.closed == sorted(VALUES["color"])


def test_the_generator_reads_a_part_of_the_rows_that_its_adapters_are_trained_on(demo):
    """So that the rows of its validation prompts are known."""
    for pair in demo.world.training_pairs(demo.seed):
        files = (demo.data_file(pair, split, "train") for split in ("prompts", "train"))
        read, learned = ({row.prompt for row in Dataset(file).rows()} for file in files)
        assert len(read) > 100
        assert read < learned


def test_each_split_has_as_many_targets_and_all_keys_differ(demo):
    targets = choose_targets(demo)
    groups = [one.group for one in targets]
    assert {groups.count(group) for group in groups} == {8}
    assert len({one.key for one in targets}) == len(targets)
