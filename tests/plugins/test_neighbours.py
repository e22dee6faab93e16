import pytest
import torch
from torch.nn.functional import cosine_similarity

from loragen.core.plugins import create, find
from loragen.plugins.decoders import neighbours
from loragen.testing import check_decoder, grid
from tests.plugins.test_decoders import assert_each_part_matters
from tests.plugins.test_mixture import Adapters

DATASETS, DIM = 6, 8


def fitted(values=None, **options):
    """A decoder that knows six datasets, each by prompts in a direction of its own."""
    shape = grid()
    module = create("decoder", "neighbours", options, DIM, shape)
    if values is None:
        values = torch.randn(DATASETS, shape.tokens, shape.token_dim)
    adapters = Adapters(values)
    module.use_adapters(adapters)
    module.start_from(adapters)
    module.fit((one, torch.ones(1, 1, 1, dtype=torch.bool)) for one in prompts())
    return module.eval()


def prompts():
    """``[datasets, 1, 1, 1, dim]``"""
    return torch.eye(DIM)[:DATASETS, None, None, None]


def made(module, *directions):
    """The adapter for prompts that are the sum of the directions of datasets, or none of them."""
    condition = sum((prompts()[one] for one in directions), torch.zeros(1, 1, 1, DIM))
    if not directions:
        condition = torch.eye(DIM)[-1:, None, None]
    return module(condition, torch.ones(1, 1, 1, dtype=torch.bool))[0].detach()


@pytest.mark.parametrize("options", [{"temperature": 0.5}, {"temperature": 1, "pull": 1.0}])
def test_contract(options):
    check_decoder(find("decoder", "neighbours"), **options)


def test_the_adapter_of_the_most_similar_dataset_is_taken_whole_at_full_pull():
    module = fitted(pull=1)
    assert made(module, 2).allclose(module.combine.adapters.values[2], atol=1e-6)
    assert set(module.combine.adapters.asked) == {2}


def test_prompts_unlike_all_get_the_multi_task_adapter():
    module = fitted()
    with torch.no_grad():
        module.change.normal_(std=0.01)
    multi_task = module.mean + neighbours.RATE_FACTOR * module.change
    assert made(module).allclose(multi_task, atol=1e-5)


def test_two_equally_similar_datasets_have_equal_shares():
    module = fitted(pull=1)
    condition, mask = prompts()[1] + prompts()[4], torch.ones(1, 1, 1, dtype=torch.bool)
    shares = module.coefficients(condition, mask)[0]
    assert float(shares[1]) == pytest.approx(float(shares[4]), abs=1e-5)
    assert shares[1] > 0.15
    assert shares[[0, 2, 3, 5]].count_nonzero() == 0


@pytest.mark.parametrize("pull", [0, 0.5, 1])
def test_the_weight_of_a_neighbour_is_pull_times_the_square_of_its_similarity(pull):
    module = fitted(pull=pull)
    with torch.no_grad():
        module.change.normal_(std=0.01)
    neighbour = module.combine.adapters.values[0]
    multi_task = module.mean + neighbours.RATE_FACTOR * module.change
    same = pull * neighbour + (1 - pull) * multi_task  # the similarity is 1
    assert made(module, 0).allclose(same, atol=1e-4)
    condition, mask = prompts()[0] + torch.eye(DIM)[-1], torch.ones(1, 1, 1, dtype=torch.bool)
    known = prompts().flatten(1)  # (datasets, dim)
    centre = known.mean(0)
    similarity = cosine_similarity(known - centre, condition.flatten(1) - centre).max()
    part = float(module.coefficients(condition, mask).sum())
    assert 0.3 < similarity < 0.9
    assert part == pytest.approx(pull * float(similarity) ** 2, abs=1e-5)


def test_datasets_that_are_less_similar_than_unrelated_ones_have_no_weight():
    module = fitted(pull=1)
    condition, mask = -sum(prompts()), torch.ones(1, 1, 1, dtype=torch.bool)
    assert 0 <= float(module.coefficients(condition, mask).sum()) < 1e-5


def test_it_starts_at_the_mean_and_keeps_what_all_adapters_share():
    values = torch.randn(DATASETS, grid().tokens, grid().token_dim)
    values[:, ::2] = values[0, ::2]  # a frozen A
    module = fitted(values)
    assert made(module).allclose(values.mean(0), atol=1e-5)
    module.trained_adapter().square().mean().backward()
    moved = module.change.grad.any(-1)
    assert not moved[::2].any() and moved[1::2].all()


def test_many_equally_similar_datasets_have_shares_that_are_numbers():
    count, shape = 2000, grid()
    module = create("decoder", "neighbours", {"pull": 1}, 2, shape).eval()
    module.use_adapters(Adapters(torch.ones(count, shape.tokens, shape.token_dim)))
    sides = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).repeat(count // 2, 1)[:, None, None, None]
    one = torch.ones(1, 1, 1, dtype=torch.bool)
    module.fit((side, one) for side in sides)
    shares = module.coefficients(sides[0], one)[0]
    assert float(shares.sum()) == pytest.approx(1, abs=1e-4)
    assert shares[1::2].count_nonzero() == 0


def test_what_is_trained_is_the_multi_task_adapter_alone():
    module = fitted().train()
    with torch.no_grad():
        module.change.normal_(std=0.01)
    module.combine.adapters.asked.clear()
    trained = module.trained_adapter()
    assert not module.combine.adapters.asked
    assert trained.allclose(made(module), atol=1e-5)
    trained.square().mean().backward()
    assert module.change.grad.any()
    assert [name for name, _ in module.named_parameters()] == ["change"]


def test_each_trained_part_matters():
    module = fitted(temperature=1)

    def generated():
        return module(prompts()[:, 0] + 0.5, torch.ones(DATASETS, 1, 1, dtype=torch.bool))

    assert_each_part_matters(module, generated)
