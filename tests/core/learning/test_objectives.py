import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.adapter.files import Adapter, attach_adapter, peft_config, plain_config
from loragen.core.adapter.layout import Layout
from loragen.core.config.schema import GenTrainingSection, LoraSection
from loragen.core.data.rows import Row
from loragen.core.data.tokenize import Example, pad_id, tokenize_row
from loragen.core.generator.network import Normalization, importance
from loragen.core.learning.objectives.behaviour import Behaviour, Reconstruction
from loragen.core.lora.evaluate import evaluate_model
from loragen.core.lora.packing import answer_losses, padded

LAYOUT = Layout.of(
    {
        "m.layers.0.q.lora_A.weight": torch.zeros(2, 5),
        "m.layers.0.q.lora_B.weight": torch.zeros(3, 2),
    },
    token_dim=4,
)
SHAPE = (LAYOUT.tokens, LAYOUT.token_dim)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def normalization(seed=0):
    mean = drawn(seed, *SHAPE) * LAYOUT.mask()
    return Normalization(mean, drawn(seed + 1, LAYOUT.tokens, 1).abs() + 0.1)


def reconstruction(weights=None, **options):
    weights = torch.ones(LAYOUT.tokens, 1) if weights is None else weights
    return Reconstruction(normalization(), LAYOUT.mask(), GenTrainingSection(**options), weights)


class TestReconstruction:
    @settings(max_examples=20)
    @given(st.integers(1, 4), st.floats(0, 3), st.floats(0, 3))
    def test_it_is_the_weighed_sum_of_both_errors_over_the_values(self, batch, mse, l1):
        written, target = drawn(3, batch, *SHAPE), drawn(4, batch, *SHAPE)
        loss, logged = reconstruction(mse_weight=mse, l1_weight=l1)(written, target)
        error = (written - normalization().normalize(target))[:, LAYOUT.mask()]
        assert error.shape == (batch, LAYOUT.values)
        assert logged["mse"] == pytest.approx(error.square().mean().item(), rel=1e-5)
        assert logged["l1"] == pytest.approx(error.abs().mean().item(), rel=1e-5)
        wanted = mse * error.square().mean() + l1 * error.abs().mean()
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_weights_count_token_by_token(self):
        weights = torch.linspace(0.5, 1.5, LAYOUT.tokens)[:, None]
        written, target = drawn(3, 2, *SHAPE), drawn(4, 2, *SHAPE)
        error = written - normalization().normalize(target)
        wanted = (weights * error.square())[:, LAYOUT.mask()].mean()
        loss = reconstruction(weights, l1_weight=0.0)(written, target)[0]
        assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)

    def test_padding_has_no_part(self):
        judge, padding = reconstruction(), ~LAYOUT.mask()
        assert padding.any()
        written, target = drawn(3, 2, *SHAPE), drawn(4, 2, *SHAPE)
        other, wrong = written.clone(), target.clone()
        other[:, padding], wrong[:, padding] = 1e6, -1e6
        written.requires_grad_()
        loss = judge(written, target)[0]
        assert loss.equal(judge(other, wrong)[0])
        loss.backward()
        assert written.grad[:, padding].eq(0).all()
        assert written.grad[:, ~padding].ne(0).all()
        for name, value in judge.in_own_units(other, wrong).items():
            assert value.equal(judge.in_own_units(written, target)[name]), name

    def test_noise_is_on_the_target_only_where_it_is_asked_for(self):
        judge = reconstruction(target_noise=0.5, l1_weight=0.0)
        target = drawn(4, 4000, *SHAPE)
        exact = normalization().normalize(target)
        assert judge(exact, target)[0] == 0
        assert judge(exact, target, noise=0.5)[0] == pytest.approx(0.25, rel=0.05)

    def test_errors_in_own_units_are_those_of_the_weights(self):
        judge, written, target = reconstruction(), drawn(3, 2, *SHAPE), drawn(4, 2, *SHAPE)
        found = judge.in_own_units(written, target)
        made = normalization().denormalize(written)
        error, wanted = (made - target)[:, LAYOUT.mask()], target[:, LAYOUT.mask()]
        assert found["mae"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
        assert found["rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-4)
        assert found["relative_error"] == pytest.approx((error.norm() / wanted.norm()).item(), 1e-4)


def scattered(within, between, checkpoints=6, datasets=5):
    """Collections in which token t scatters by `within[t]` around centres `between` apart."""
    random, mask = np.random.default_rng(0), LAYOUT.mask().numpy()
    centres = between * random.standard_normal((datasets, 1, *SHAPE))
    noise = np.array(within)[:, None] * random.standard_normal((datasets, checkpoints, *SHAPE))
    return list(((centres + noise) * mask).astype(np.float32))


class TestImportance:
    @settings(max_examples=20)
    @given(st.lists(st.floats(0, 10), min_size=LAYOUT.tokens, max_size=LAYOUT.tokens))
    def test_weights_have_a_mean_of_one_over_the_values(self, within):
        collections = scattered(within, 1.0)
        weights = importance(LAYOUT, Normalization.fit(LAYOUT, collections), collections)
        assert weights.shape == (LAYOUT.tokens, 1)
        assert weights.gt(0).all()
        whole = (weights * LAYOUT.mask()).sum() / LAYOUT.values
        assert whole.item() == pytest.approx(1.0, rel=1e-5)

    def test_where_the_checkpoints_of_a_dataset_scatter_an_error_counts_less(self):
        within = np.linspace(0.0, 3.0, LAYOUT.tokens)
        collections = scattered(within, 1.0, checkpoints=200, datasets=50)
        weights = importance(LAYOUT, Normalization.fit(LAYOUT, collections), collections)[:, 0]
        assert (weights.diff() < 0).all()
        assert torch.allclose(weights / weights[0], torch.tensor(1 / (1 + within**2)).float(), 0.4)

    def test_every_dataset_weighs_the_same(self):
        collections = scattered(np.ones(LAYOUT.tokens), 1.0)
        repeated = [np.repeat(collections[0], 3, axis=0), *collections[1:]]
        fitted = Normalization.fit(LAYOUT, collections)
        one, other = (importance(LAYOUT, fitted, found) for found in (collections, repeated))
        assert torch.allclose(one, other, atol=1e-6)

    @pytest.mark.parametrize("datasets", [1, 3])
    def test_adapters_that_are_all_alike_count_alike(self, datasets):
        collections = [np.ones((2, *SHAPE), np.float32) * LAYOUT.mask().numpy()] * datasets
        weights = importance(LAYOUT, Normalization.fit(LAYOUT, collections), collections)
        assert torch.allclose(weights, torch.ones(LAYOUT.tokens, 1))


@pytest.fixture
def lora():
    return LoraSection(rank=2, alpha=8)


@pytest.fixture
def config(base, lora):
    return plain_config(peft_config(lora, base.name))


@pytest.fixture
def layout(base, lora):
    """Of an adapter of the tiny base, which is left as it was."""
    from peft import get_peft_model

    from loragen.core.adapter.files import file_keys, peft_config

    model = get_peft_model(base.model, peft_config(lora))
    tensors = file_keys({n: p.detach() for n, p in model.named_parameters() if "lora_" in n})
    model.unload()
    return Layout.of(tensors, 16)


@pytest.fixture
def fitted(layout):
    shape = (layout.tokens, layout.token_dim)
    return Normalization(0.1 * drawn(5, *shape), drawn(6, layout.tokens, 1).abs() + 0.5)


@pytest.fixture
def behaviour(base, layout, fitted, config):
    return Behaviour(base, layout, fitted, config)


def rows(start, count):
    words = ("red", "green", "blue cat", "cow")
    return [
        Row(line=i, prompt=f"q{i}" * (1 + i % 3), response=words[i % 4])
        for i in range(start, start + count)
    ]


def examples(base, found) -> list[Example]:
    return [tokenize_row(base.tokenizer, row, 64).example for row in found]


def adapters(layout, several):
    return 0.5 * drawn(7, several, layout.tokens, layout.token_dim)


def adapted(base, layout, fitted, config, tokens):
    """The PeftModel that one adapter of normalised tokens makes."""
    tensors = layout.unpack(fitted.denormalize(tokens.detach()))
    return attach_adapter(base.model, Adapter(config, tensors), "test")


class TestBehaviour:
    def test_it_is_the_loss_of_the_base_with_each_adapter_on_its_own_rows(
        self, base, layout, fitted, config, behaviour
    ):
        """The mean over adapters of the mean over their answer tokens."""
        written = adapters(layout, 3)
        parts = [examples(base, rows(10 * i, 4)) for i in range(3)]
        padding = pad_id(base.tokenizer)
        together = padded([one for part in parts for one in part], padding)
        loss, logged = behaviour(written, together)
        alone = []
        for tokens, part in zip(written, parts, strict=True):
            model = adapted(base, layout, fitted, config, tokens)
            alone.append(answer_losses(model, padded(part, padding)).mean().item())
            model.unload()
        assert max(alone) - min(alone) > 0.01
        assert loss.item() == pytest.approx(sum(alone) / 3, rel=1e-4)
        assert logged["behaviour"].item() == loss.item()

    def test_accuracy_is_the_exact_match_of_what_it_would_write(
        self, base, layout, fitted, config, behaviour
    ):
        """Of an adapter that has learned five rows; three more have other answers."""
        asked = [*rows(0, 5), *(Row(line=i, prompt=f"q{i}", response="dog") for i in (5, 6, 7))]
        batch = padded(examples(base, asked), pad_id(base.tokenizer))
        known = padded(examples(base, asked[:5]), pad_id(base.tokenizer))
        written = adapters(layout, 1).requires_grad_()
        optimizer = torch.optim.Adam([written], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            behaviour(written, known)[0].backward()
            optimizer.step()
        loss, accuracy = behaviour.accuracy(written, batch)
        model = adapted(base, layout, fitted, config, written[0])
        wanted = evaluate_model(model, base.tokenizer, asked, choices=False).exact_match
        model.unload()
        assert accuracy.item() == pytest.approx(wanted)
        assert 0 < wanted < 1
        assert loss.equal(behaviour(written, batch)[0])

    def test_gradients_reach_every_adapter_and_not_the_base(self, base, layout, behaviour):
        written = adapters(layout, 2).requires_grad_()
        batch = padded(examples(base, rows(0, 4)), pad_id(base.tokenizer))
        behaviour(written, batch)[0].backward()
        mask = layout.mask()
        assert (written.grad[:, mask] != 0).float().mean() > 0.9
        assert written.grad[:, ~mask].eq(0).all()
        assert all(weight.grad is None for weight in base.model.parameters())

    def test_an_adapter_is_judged_on_its_own_rows_alone(self, base, layout, behaviour):
        written = adapters(layout, 2).requires_grad_()
        batch = padded(examples(base, rows(0, 6)), pad_id(base.tokenizer))
        logits, tokens, owner = behaviour._answers(written, batch)
        assert owner.unique().tolist() == [0, 1]
        torch.nn.functional.cross_entropy(logits[owner == 0], tokens[owner == 0]).backward()
        assert written.grad[0].abs().max() > 0
        assert written.grad[1].eq(0).all()
