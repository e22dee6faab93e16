from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loragen.core.config.schema import GenTrainingSection
from loragen.core.generator.network import Network
from loragen.core.learning.data import PairBatch
from loragen.core.learning.module import GeneratorModule, new_optimizer
from loragen.core.learning.plan import Phase, Phases
from loragen.core.protocols import Objective, SupportSet

CONDITION = torch.randn(2, 3, 1, 5, generator=torch.Generator().manual_seed(0))
BATCH = PairBatch(CONDITION, torch.ones(2, 3, 1, dtype=torch.bool), torch.zeros(2, 4, 2))


class Decoder(nn.Module):
    """Remembers its conditions."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.conditions = []

    def forward(self, condition, mask):
        self.conditions.append(condition)
        return self.weight * condition.mean((1, 2))


class Listed(Objective):
    """Its losses are given, one after the other."""

    def __init__(self, *values, name="loss"):
        self.values, self.name = list(values), name
        self.support, self.finalized = [], 0

    def loss(self, network, batch):
        network(batch.condition, batch.mask)
        if batch.support is not None:
            self.support.append(batch.support.condition)
        loss = torch.tensor(self.values.pop(0), requires_grad=True)
        return loss, {"loss": loss.detach(), self.name: 2 * loss.detach()}

    def validate(self, network, batch):
        network(batch.condition, batch.mask)
        return {"loss": torch.zeros(())}

    def finalize(self, network):
        self.finalized += 1


@pytest.fixture
def training():
    """`training(objective, ...)`: a module beside a trainer, with two steps of each objective."""

    def make(*objectives, accumulation=1, spread=1.0, **options):
        network = Network(Decoder(), 5)
        network.condition_spread.fill_(spread)
        phases = Phases([Phase(str(i), one, 2, None) for i, one in enumerate(objectives)], 1)
        module = GeneratorModule(network, phases, GenTrainingSection(**options))
        trainer = SimpleNamespace(accumulate_grad_batches=accumulation, global_step=0)
        module._trainer, module.log = trainer, lambda *_, **__: None
        return module, trainer

    return make


def test_the_metrics_of_a_step_are_the_mean_of_its_micro_batches(training):
    module, _ = training(Listed(1.0, 3.0, 5.0, 7.0, name="mse"), accumulation=2)
    for index in range(2):
        module.training_step(BATCH, index)
    assert module.step_metrics == {"train/loss": 2.0, "train/mse": 4.0}
    for index in range(2, 4):
        module.training_step(BATCH, index)
    assert module.step_metrics["train/loss"] == 6.0


def test_each_phase_has_its_own_loss_and_metrics(training):
    module, trainer = training(Listed(1.0, name="mse"), Listed(4.0, name="behaviour"))
    module.training_step(BATCH, 0)
    trainer.global_step = 2  # the third step
    assert module.training_step(BATCH, 1).item() == 4.0
    assert module.step_metrics == {"train/loss": 4.0, "train/behaviour": 8.0}


def test_noise_is_for_training_alone(training):
    objective = Listed(1.0)
    module, _ = training(objective, condition_noise=0.2)
    others = SupportSet(CONDITION, BATCH.mask, torch.arange(2), torch.eye(2, dtype=torch.bool))
    module.training_step(BATCH._replace(support=others), 0)
    module.validation_step(BATCH, 0, 0)
    trained, validated = module.network.decoder.conditions
    assert not torch.allclose(trained, CONDITION)
    assert not torch.allclose(objective.support[0], CONDITION)
    assert validated.equal(CONDITION)


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_noise_is_in_units_of_the_spread_of_the_conditions(training, spread):
    batch = PairBatch(torch.zeros(3000, 2, 1, 5), torch.ones(3000, 2, 1), torch.zeros(3000, 4, 2))
    module, _ = training(Listed(1.0), spread=spread, condition_noise=0.3)
    module.training_step(batch, 0)
    (standard,) = module.network.decoder.conditions
    assert standard.std().item() == pytest.approx(0.3, rel=0.05)
    assert (standard[:, 0] != standard[:, 1]).all()


def test_the_network_is_finalized_once_a_step(training):
    first, second = Listed(), Listed()
    module, trainer = training(first, second)
    for step in (1, 1, 2, 3):
        trainer.global_step = step
        module.finalize()
    assert (first.finalized, second.finalized) == (2, 1)


def test_the_average_of_the_weights_is_the_exponential_one(training):
    module, _ = training(Listed(), ema_decay=0.75)
    weight, expected = module.network.decoder.weight, None
    for value in (1.0, 5.0, -3.0):
        nn.init.constant_(weight, value)
        module.averaged.update_parameters(module.trainable_modules)
        expected = value if expected is None else 0.75 * expected + 0.25 * value
    kept = module.eval_modules["network"]
    assert kept.decoder.weight.item() == pytest.approx(expected)
    assert not any(p.requires_grad for p in kept.parameters())


def test_vectors_have_no_weight_decay_and_the_encoder_has_its_own_rate():
    trained = nn.ModuleDict({"network": nn.Linear(2, 3), "encoder": nn.Linear(3, 4)})
    trained["encoder"].bias.requires_grad_(False)
    options = GenTrainingSection(weight_decay=0.1, encoder_rate=0.5)
    groups = new_optimizer(trained, options).param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]
    assert [group["factor"] for group in groups] == [1.0, 1.0, 0.5, 0.5]
    assert [len(group["params"]) for group in groups] == [1, 1, 1, 0]
