"""A checkpoint of a generator's training is a generator, too."""

import shutil

import pytest
import torch

from loragen.core.errors import DataError
from loragen.core.generator.model import Generator
from loragen.core.learning.train import train
from loragen.core.progress import Silent
from loragen.core.run.directory import GENERATOR_FILE

PROMPTS = ["Question 1 about red?", "Question 2 about red?"]


class Kill(Silent):
    def __init__(self, at):
        self.at = at

    def step(self, step):
        if step.step == self.at:
            raise KeyboardInterrupt


@pytest.fixture
def finished(gen_config):
    return lambda settings: train(gen_config(settings), Silent()).directory


@pytest.fixture
def killed(gen_config, tmp_path):
    """`killed(step, settings)`: the run that ended in that step."""

    def run(step, settings):
        with pytest.raises(KeyboardInterrupt):
            train(gen_config(settings), Kill(step))
        (directory,) = (tmp_path / "experiments").iterdir()
        return directory

    return run


def written(path):
    return Generator.load(path).generate(PROMPTS).tensors


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"data.val_ratio": 0.0},
        {"training.ema_decay": 0.5},
        {"trainer.precision": "bf16-mixed"},
        {"encoder.frozen": False, "training.ema_decay": 0.5},
    ],
    ids=str,
)
def test_the_step_that_is_kept_generates_what_its_checkpoint_does(finished, settings):
    run = finished({**settings, "training.max_steps": 3})
    expected = written(run)
    (run / GENERATOR_FILE).unlink()
    assert equal(written(run), expected)


def test_the_best_step_of_a_killed_run_is_used_with_a_warning(killed, caplog):
    run = killed(6, {"training.val_every_epochs": 1, "training.last_every": 1})
    (best,) = (run / "checkpoints").glob("epoch=*")
    step = torch.load(best, weights_only=True)["global_step"]
    made = Generator.load(run).generate(PROMPTS)
    assert caplog.messages == [f"{best}: the training has not ended; loading step {step} of 8"]
    assert made.origin.generator == f"{run.name} (step {step} of 8)"
    assert made.origin.distance is not None
    assert sorted(made.origin.datasets) == ["animals", "colors"]


def test_any_checkpoint_does_wherever_it_lies(killed, tmp_path):
    run = killed(6, {"data.val_ratio": 0.0, "training.last_every": 1})
    moved = shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "mine.ckpt")
    assert Generator.load(moved).name == "mine (step 5 of 8)"
    assert equal(written(moved), written(run))


def test_what_cannot_be_used_says_what_to_do(killed, collection):
    run = killed(6, {"training.last_every": 1})
    (best,) = (run / "checkpoints").glob("epoch=*")
    document = dict(torch.load(best, weights_only=True))
    del document["generator"]
    torch.save(document, best)
    of_an_adapter = next((collection.runs["colors"] / "checkpoints").glob("*.ckpt"))
    for path in (run, of_an_adapter):
        with pytest.raises(DataError, match=r"\.ckpt: not a checkpoint of a generator: .* resume"):
            Generator.load(path)
