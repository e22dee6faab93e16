from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loragen.core.config.schema import GenTrainingSection
from loragen.core.generator.network import Network
from loragen.core.learning.batches import PairBatch
from loragen.core.learning.module import GeneratorModule
from loragen.core.learning.objectives.behaviour import Objectives

CONDITION = torch.randn(2, 3, 1, 5, generator=torch.Generator().manual_seed(0))
BATCH = PairBatch(CONDITION, torch.ones(2, 3, 1, dtype=torch.bool), torch.zeros(2, 4, 2))


class Seen(nn.Module):
    """Remembers its conditions."""

    def __init__(self):
        super().__init__()
        self.conditions = []

    def forward(self, condition, mask):
        self.conditions.append(condition)
        return condition.mean((1, 2))


class Judge:
    """Gives what it is told, and remembers the noise that was asked for."""

    def __init__(self, *values):
        self.values, self.noise = list(values), []

    def __call__(self, written, target, noise=0.0):
        self.noise.append(noise)
        loss = torch.tensor(self.values.pop(0), requires_grad=True)
        return loss, {"loss": loss.detach(), "mse": 2 * loss.detach()}

    def in_own_units(self, written, target):
        return {}


class Tried:
    def __init__(self, *values):
        self.values = list(values)

    def __call__(self, written, rows):
        loss = torch.tensor(self.values.pop(0), requires_grad=True)
        return loss, {"behaviour": loss.detach()}


@pytest.fixture
def training():
    """`training(reconstruction, ...)`: a module beside a trainer that accumulates `parts`."""

    def make(reconstruction, behaviour=None, share=0.0, parts=1, spread=1.0, **options):
        network = Network(Seen(), 5)
        network.condition_spread.fill_(spread)
        objectives = Objectives(reconstruction, behaviour, share)
        module = GeneratorModule(network, None, objectives, GenTrainingSection(**options))
        module._trainer = SimpleNamespace(accumulate_grad_batches=parts)
        module.log = lambda *_, **__: None
        return module

    return make


def test_the_metrics_of_a_step_are_the_mean_of_its_micro_batches(training):
    module = training(Judge(1.0, 3.0, 5.0, 7.0), parts=2)
    for index in range(2):
        module.training_step(BATCH, index)
    assert module.step_metrics == {"train/loss": 2.0, "train/mse": 4.0}
    for index in range(2, 4):
        module.training_step(BATCH, index)
    assert module.step_metrics["train/loss"] == 6.0


def test_a_step_keeps_nothing_of_the_objective_before(training):
    module = training(Judge(1.0), Tried(4.0))
    module.training_step(BATCH, 0)
    assert module.training_step(BATCH._replace(rows=object()), 1).item() == 4.0
    assert module.step_metrics == {"train/loss": 4.0, "train/behaviour": 4.0}


def test_reconstruction_may_have_a_share_in_the_behaviour(training):
    module = training(Judge(10.0), Tried(4.0), share=0.1, target_noise=0.3)
    loss = module.training_step(BATCH._replace(rows=object()), 0)
    assert loss.item() == 5.0
    found = {"train/loss": 5.0, "train/behaviour": 4.0, "train/mse": 20.0}
    assert module.step_metrics == found


def test_noise_is_for_training_alone(training):
    judge = Judge(1.0, 1.0)
    module = training(judge, condition_noise=0.2, target_noise=0.3)
    module.training_step(BATCH, 0)
    module.validation_step(BATCH, 0, 0)
    trained, validated = module.network.decoder.conditions
    assert not torch.allclose(trained, CONDITION)
    assert validated.equal(CONDITION)
    assert judge.noise == [0.3, 0.0]


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_noise_is_in_units_of_the_spread_of_the_conditions(training, spread):
    batch = PairBatch(torch.zeros(3000, 2, 1, 5), torch.ones(3000, 2, 1), torch.zeros(3000, 4, 2))
    module = training(Judge(1.0), spread=spread, condition_noise=0.3)
    module.training_step(batch, 0)
    (standard,) = module.network.decoder.conditions
    assert standard.std().item() == pytest.approx(0.3, rel=0.05)
    assert (standard[:, 0] != standard[:, 1]).all()
