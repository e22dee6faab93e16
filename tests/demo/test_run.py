"""The demo from end to end, with a few steps in place of the real number."""

import json

import pytest
import yaml
from peft import PeftModel

from loragen.core.base.load import load_base
from loragen.core.config import DEMO
from loragen.core.errors import UsageError
from loragen.core.evaluation.contestants import NAMES
from loragen.core.progress import Silent
from loragen.demo import settings, world
from loragen.demo.data import begin
from loragen.demo.run import SPLITS, run
from loragen.demo.workers import Workers
from loragen.demo.world import WORLD_FILE

STEPS = 2
DATASETS = 8  # of 32
CREATURES = 20  # of 32 to be asked about: more than a draw's 16 prompts


@pytest.fixture
def few_steps(monkeypatch):
    """The same recipes, cut short, on fewer and smaller datasets."""

    def shorten(name):
        recipe = getattr(settings, name)

        def short(*arguments):
            config = recipe(*arguments)
            config.training.max_steps = STEPS
            if hasattr(config, "checkpoints"):
                config.checkpoints.first_step = STEPS
            else:
                config.behaviour.max_steps = STEPS
            return config

        monkeypatch.setattr(settings, name, short)

    for name in ("adapter_config", "oracle_config", "multi_task_config", "generator_config"):
        shorten(name)
    monkeypatch.setattr(world, "TRAIN_REPEATS", 1)
    monkeypatch.setattr(world, "TEST_CREATURES", world.TEST_CREATURES[:CREATURES])
    all_pairs = world.World.training_pairs
    monkeypatch.setattr(
        world.World, "training_pairs", lambda self, seed: all_pairs(self, seed)[:DATASETS]
    )


def test_the_whole_path_with_a_world_of_ones_own(few_steps, tmp_path):
    document = yaml.safe_load(WORLD_FILE.read_text(encoding="utf-8"))
    document["held_out"] = [["color", "word"], ["size", "list"]]
    file = tmp_path / "my-world.yaml"
    file.write_text(yaml.safe_dump(document), encoding="utf-8")
    out = tmp_path / "out"
    said = []
    with Workers() as workers:
        results = run(begin(out, 3, file, False, said.append, Silent()), workers)

    assert json.loads((out / "results.json").read_text(encoding="utf-8")) == results
    assert results["held_out"] == [["color", "word"], ["size", "list"]]
    assert results["seed"] == 3
    assert {"train_adapter", "generate_adapter", "ratio", "total"} <= set(results["seconds"])
    assert set(results["accuracy"]) == set(SPLITS)
    for columns in results["accuracy"].values():
        assert tuple(columns) == NAMES
        assert all(0 <= value <= 1 for value in columns.values())
    assert (out / "results.png").stat().st_size > 10_000
    assert len(list((out / "runs").iterdir())) == DATASETS
    assert (out / "world.yaml").read_text(encoding="utf-8") == file.read_text(encoding="utf-8")
    for split in ("train", "test"):
        assert (out / "data" / "color-word" / f"{split}.jsonl").is_file()
    generated = out / "generated" / "both" / "color-word" / "draw-0"
    PeftModel.from_pretrained(load_base(DEMO).model, str(generated))
    assert said


def test_a_directory_that_is_no_demo_is_never_touched(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    for force in (False, True):
        with pytest.raises(UsageError, match=str(tmp_path.name)):
            begin(tmp_path, 0, None, force, print, Silent())
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]
