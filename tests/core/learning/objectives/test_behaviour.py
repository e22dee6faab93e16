from collections import Counter
from functools import partial
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loragen.core.adapter.checks import file_keys
from loragen.core.adapter.files import Adapter, attach_adapter, peft_config, plain_config
from loragen.core.adapter.layout import Layout
from loragen.core.config.schema import LoraSection
from loragen.core.data.chat import pad_id
from loragen.core.data.dataset import Row
from loragen.core.data.tokenize import Example, tokenize_row
from loragen.core.errors import LoragenError
from loragen.core.generator.network import Normalization
from loragen.core.learning.arrays import SourceArrays
from loragen.core.learning.data import Split
from loragen.core.learning.objectives.behaviour import (
    AdaptedBase,
    BehaviourBatches,
    Injection,
    draw_rows,
)
from loragen.core.learning.texts import LabelledRows
from loragen.core.lora.evaluate import evaluate_model
from loragen.core.lora.packing import Cost, answer_losses, collate


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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

    from loragen.core.adapter.files import peft_config

    model = get_peft_model(base.model, peft_config(lora))
    tensors = file_keys({n: p.detach() for n, p in model.named_parameters() if "lora_" in n}, "x")
    model.unload()
    return Layout.of(tensors, 16)


@pytest.fixture
def fitted(layout):
    shape = (layout.tokens, layout.token_dim)
    return Normalization(0.1 * drawn(5, *shape), drawn(6, layout.tokens, 1).abs() + 0.5)


@pytest.fixture
def behaviour(base, layout, fitted, config):
    return AdaptedBase(base.model, layout, fitted, config)


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


class TestAdaptedBase:
    def test_it_is_the_loss_of_the_base_with_each_adapter_on_its_own_rows(
        self, base, layout, fitted, config, behaviour
    ):
        """The mean over adapters of the mean over their answer tokens."""
        predicted = adapters(layout, 3)
        parts = [examples(base, rows(10 * i, 4)) for i in range(3)]
        padding = pad_id(base.tokenizer)
        together = collate([one for part in parts for one in part], padding)
        loss = behaviour(predicted, together)
        alone = []
        for tokens, part in zip(predicted, parts, strict=True):
            model = adapted(base, layout, fitted, config, tokens)
            alone.append(answer_losses(model, collate(part, padding)).mean().item())
            model.unload()
        assert max(alone) - min(alone) > 0.01
        assert loss.item() == pytest.approx(sum(alone) / 3, rel=1e-4)

    def test_accuracy_is_the_exact_match_of_what_it_would_write(
        self, base, layout, fitted, config, behaviour
    ):
        """Of an adapter that has learned five rows; three more have other answers."""
        eight = [*rows(0, 5), *(Row(line=i, prompt=f"q{i}", response="dog") for i in (5, 6, 7))]
        batch = collate(examples(base, eight), pad_id(base.tokenizer))
        known = collate(examples(base, eight[:5]), pad_id(base.tokenizer))
        predicted = adapters(layout, 1).requires_grad_()
        optimizer = torch.optim.Adam([predicted], lr=0.05)
        for _ in range(60):
            optimizer.zero_grad()
            behaviour(predicted, known).backward()
            optimizer.step()
        loss, accuracy = behaviour.accuracy(predicted, batch)
        model = adapted(base, layout, fitted, config, predicted[0])
        wanted = evaluate_model(model, base.tokenizer, eight, choices=False).exact_match
        model.unload()
        assert accuracy.item() == pytest.approx(wanted)
        assert 0 < wanted < 1
        assert loss.equal(behaviour(predicted, batch))

    @settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(several=st.integers(1, 3), each=st.integers(1, 4), seed=st.integers(0, 99))
    @pytest.mark.parametrize("pair", [0.0, 0.1, 1e9])
    def test_packed_rows_have_the_loss_and_the_gradients_of_padded_ones(
        self, layout, behaviour, pair, several, each, seed
    ):
        """Of every adapter, with checkpoints too: in one sequence, in some, and in one per row."""
        found, random = [], Random(seed)
        for _ in range(several * each):
            prompt, answer = (random.choices(range(3, 40), k=random.randint(1, 6)) for _ in "pa")
            found.append(Example([5, 6, 7, *prompt, *answer], len(answer)))
        alone = collate(found, PAD)
        together = collate(found, PAD, Cost(1.0, pair), groups=several)
        predicted = (0.2 * adapters(layout, several)).requires_grad_()

        def results(batch):
            loss, accuracy = behaviour.accuracy(predicted, batch)
            (gradient,) = torch.autograd.grad(behaviour(predicted, batch), predicted)
            return loss.item(), accuracy.item(), gradient.flatten(1)

        loss, accuracy, gradient = results(alone)
        size = gradient.norm(dim=1)
        assert (size > 1e-3).all()
        for behaviour.checkpointed in (False, True):
            other_loss, other_accuracy, other = results(together)
            assert other_loss == pytest.approx(loss, rel=1e-5)
            assert other_accuracy == pytest.approx(accuracy)
            assert ((other - gradient).norm(dim=1) < 1e-4 * size).all()

    def test_gradients_reach_every_adapter_and_not_the_base(self, base, layout, behaviour):
        predicted = adapters(layout, 2).requires_grad_()
        batch = collate(examples(base, rows(0, 4)), pad_id(base.tokenizer))
        behaviour(predicted, batch).backward()
        mask = layout.mask()
        assert (predicted.grad[:, mask] != 0).float().mean() > 0.9
        assert predicted.grad[:, ~mask].eq(0).all()
        assert all(weight.grad is None for weight in base.model.parameters())

    def test_an_adapter_is_judged_on_its_own_rows_alone(self, base, layout, behaviour):
        """Beside another adapter with other rows, its gradient is half of what it is alone."""
        predicted, padding = adapters(layout, 2).requires_grad_(), pad_id(base.tokenizer)
        both = behaviour(predicted, collate(examples(base, rows(0, 6)), padding))
        alone = behaviour(predicted[:1], collate(examples(base, rows(0, 3)), padding))
        (together,) = torch.autograd.grad(both, predicted)
        (own,) = torch.autograd.grad(alone, predicted)
        assert own[0].abs().max() > 0
        assert torch.allclose(2 * together[0], own[0], atol=1e-6)


@pytest.fixture
def peft_base(base):
    """(PeftModel, its configuration, a layout of its adapter) of the tiny base."""
    from peft import get_peft_model

    model = get_peft_model(base.model, peft_config(LoraSection(rank=2, alpha=6))).eval()
    tensors = file_keys({n: p for n, p in model.named_parameters() if p.requires_grad}, "x")
    return model, plain_config(model.peft_config["default"]), Layout.of(tensors, 16)


def adapter_tokens(layout, several):
    generator = torch.Generator().manual_seed(0)
    tokens = 0.3 * torch.randn(several, layout.tokens, layout.token_dim, generator=generator)
    return tokens.requires_grad_()


def test_it_is_functional_call_with_each_adapter_in_turn(peft_base):
    """Logits and gradients, of three adapters with two rows each."""
    model, config, layout = peft_base
    ids = torch.randint(0, 200, (6, 5), generator=torch.Generator().manual_seed(1))
    tokens = adapter_tokens(layout, 3)
    plain = model.unload()
    injection = Injection(plain, layout, config)
    with injection.injected(layout.unpack_several(tokens)):
        together = plain(input_ids=ids).logits
    together.square().mean().backward()
    gradient, tokens.grad = tokens.grad, None
    assert injection.scaling == dict.fromkeys(injection.modules, 3.0)

    from peft import get_peft_model

    peft = get_peft_model(plain, peft_config(LoraSection(rank=2, alpha=6))).eval()
    alone = []
    for index, one in enumerate(tokens):
        live = {
            key.replace(".weight", ".default.weight"): value[0]
            for key, value in layout.unpack_several(one[None]).items()
        }
        rows = ids[2 * index : 2 * index + 2]
        alone.append(torch.func.functional_call(peft, live, (rows,)).logits)
    alone = torch.cat(alone)
    alone.square().mean().backward()
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[:2], together[2:4], atol=1e-2)
    assert torch.allclose(gradient, tokens.grad, atol=1e-6)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_no_bit(base, layout, fitted, config, dtype):
    """Each layer is computed again with the adapters of its own forward pass: two passes come
    before the first backward pass."""
    batch = collate([Example([5, 6, 7, 8, 9, 10], 2), Example([5, 6, 11, 12], 1)] * 2, 0)
    found = []
    for checkpointed in (False, True):
        adapted = AdaptedBase(base.model.to(dtype), layout, fitted, config, checkpointed)
        several = [
            (0.5 * drawn(seed, 2, layout.tokens, layout.token_dim)).requires_grad_()
            for seed in (7, 8)
        ]
        losses = [adapted(tokens, batch) for tokens in several]
        for loss in reversed(losses):
            loss.backward()
        with torch.no_grad():
            losses += adapted.accuracy(several[0], batch)
        found.append([*losses, *(tokens.grad for tokens in several)])
        for module in base.model.modules():
            assert not module._forward_hooks
            assert "forward" not in vars(module)
    assert all(one.equal(other) for one, other in zip(*found, strict=True))
    assert not found[0][-1].equal(found[0][-2])


def test_nothing_stays_behind(peft_base):
    model, config, layout = peft_base
    plain, ids = model.unload(), torch.tensor([[1, 2, 3]])
    before = plain(input_ids=ids).logits
    injection = Injection(plain, layout, config)
    with (
        pytest.raises(LoragenError, match="2 adapters do not share equally"),
        injection.injected(layout.unpack_several(adapter_tokens(layout, 2))),
    ):
        plain(input_ids=torch.ones(3, 5, dtype=torch.long))  # 15 tokens do not part in two
    assert plain(input_ids=ids).logits.equal(before)


def test_a_base_without_the_modules_is_refused(base):
    layout = Layout.of({"base_model.model.model.gate.lora_A.weight": torch.ones(2, 32)}, 16)
    with pytest.raises(LoragenError, match=r"the base has no module model\.gate"):
        Injection(base.model, layout, {"r": 2, "lora_alpha": 4})


def test_a_module_that_does_not_see_the_whole_batch_is_refused(peft_base):
    """As the routed experts of a mixture, and the output layer, which sees the answers alone."""
    model, config, layout = peft_base
    injection = Injection(model.unload(), layout, config)
    path = next(iter(injection.modules))
    with (
        injection.injected(layout.unpack_several(adapter_tokens(layout, 2))),
        pytest.raises(LoragenError, match="2 adapters do not share equally"),
    ):
        injection.modules[path](torch.ones(1, 4, injection.modules[path].in_features))


def test_the_output_layer_is_refused(base):
    layout = Layout.of({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, 16)
    with pytest.raises(LoragenError, match="lm_head: adapters on the output layer"):
        Injection(base.model, layout, {"r": 2, "lora_alpha": 4})


PAD = 0


def arrays(code, checkpoints=3, texts=8, tracked=None, rows=6):
    """Every value says where it is from: 100 · source + its index. The first token of a row is that
    of its source, the second its own."""
    tokens = 100.0 * code + np.arange(checkpoints)[:, None, None] + np.zeros((1, 4, 2))
    embeddings = 100.0 * code + np.arange(texts)[:, None, None] + np.zeros((1, 1, 5))
    mask = np.ones((texts, 1), dtype=bool)
    tokens, embeddings = tokens.astype(np.float32), embeddings.astype(np.float32)
    name = f"source {code}"
    examples = [Example([100 * code, i + 1, 7], 1) for i in range(rows)]
    labelled = LabelledRows(examples, [], examples)
    split = {"train_texts": range(texts), "tracked": tracked}
    return SourceArrays(name, tokens, embeddings, mask, **split, rows=labelled, prompts_sha256=name)


def padded(rows, adapters, cost=None):
    return collate(rows, PAD, cost, groups=adapters)


def batches(
    sources=None,
    kind=BehaviourBatches,
    batch_size=4,
    rows_per_adapter=3,
    prompts=2,
    seed=1,
    split=Split(),  # noqa: B008  # immutable
    collate=padded,
):
    sections = {
        "behaviour": SimpleNamespace(batch_size=batch_size, rows_per_adapter=rows_per_adapter),
        "data": SimpleNamespace(prompts_per_condition=prompts),
    }
    data = SimpleNamespace(
        config=SimpleNamespace(seed=seed, **sections),
        sources=sources or [arrays(1), arrays(2, checkpoints=9)],
        split=lambda *_: split,
        collate=collate,
    )
    return kind(data, split.process_index, split.num_processes)


def equal(one, other):
    """Pairs and rows."""
    tensors = zip([*one[:3], *one.rows[:4]], [*other[:3], *other.rows[:4]], strict=True)
    return all(a.equal(b) for a, b in tensors)


@settings(max_examples=25)
@given(st.integers(1, 9), st.integers(0, 99), st.integers(0, 50))
def test_a_batch_is_a_pure_function_of_seed_and_step(batch_size, seed, step):
    one, other = (batches(batch_size=batch_size, seed=seed) for _ in range(2))
    other[step + 1]
    assert equal(one[step], other[step])
    assert len(one[step].tokens) == batch_size


def test_steps_and_seeds_differ():
    assert not equal(batches()[0], batches()[1])
    assert not equal(batches()[0], batches(seed=2)[0])


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9)), min_size=1, max_size=4))
def test_an_adapter_comes_with_prompts_and_rows_of_its_own_dataset(sizes):
    """Equally many rows of each, also of a dataset that has fewer."""
    sources = [arrays(i + 1, checkpoints=c, rows=r) for i, (c, r) in enumerate(sizes)]
    drawn = batches(sources)
    for step in range(3):
        batch = drawn[step]
        owner = batch.tokens[:, 0, 0] // 100  # (batch,)
        assert (batch.condition[..., 0] // 100 == owner[:, None, None]).all()
        assert batch.rows.ids.shape == (4 * 3, 3)
        assert (batch.rows.ids[:, 0] // 100).tolist() == owner.repeat_interleave(3).tolist()


def test_no_row_comes_twice_to_an_adapter_where_there_are_enough():
    for step in range(10):
        for rows in batches()[step].rows.ids[:, 1].view(4, 3):
            assert len(set(rows.tolist())) == 3


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_rows_are_drawn_without_repetition_where_there_are_enough(there, wanted, seed):
    rows = arrays(1, rows=there).rows.training
    found = draw_rows(rows, wanted, Random(seed))
    assert len(found) == wanted
    assert all(row in rows for row in found)
    if there >= wanted:
        assert len({row.ids[1] for row in found}) == wanted


def test_every_dataset_comes_equally_often_whatever_the_number_of_its_checkpoints():
    sources = [arrays(1, checkpoints=1), arrays(2, checkpoints=20), arrays(3)]
    drawn = batches(sources, batch_size=2)
    seen = Counter(int(value) for step in range(6) for value in drawn[step].tokens[:, 0, 0] // 100)
    assert seen == {1: 4, 2: 4, 3: 4}


def test_every_checkpoint_of_a_dataset_comes():
    drawn = batches([arrays(1, checkpoints=5)])
    seen = {value for step in range(20) for value in drawn[step].tokens[:, 0, 0].tolist()}
    assert seen == {100.0, 101.0, 102.0, 103.0, 104.0}


def test_tracked_checkpoints_come_with_their_own_texts():
    tracked = [[0, 1], [2], [1, 3, 4]]
    drawn = batches([arrays(1, tracked=tracked)])
    for step in range(10):
        batch = drawn[step]
        for condition, mask, tokens in zip(batch.condition, batch.mask, batch.tokens, strict=True):
            texts = {int(value) - 100 for value in condition[mask][:, 0]}
            assert texts <= set(tracked[int(tokens[0, 0]) - 100])


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_processes_and_micro_batches_share_one_batch(processes, accumulation):
    whole, size = batches(batch_size=8)[3], 8 // accumulation
    rows = whole.rows.ids.view(8, 3, -1)
    for part in range(accumulation):
        for process in range(processes):
            split = Split(accumulation, process, processes)
            mine = batches(batch_size=size, split=split)[3 * accumulation + part]
            own = slice(size * part + process, size * (part + 1), processes)
            assert mine.tokens.equal(whole.tokens[own])
            assert mine.condition.equal(whole.condition[own])
            assert mine.rows.ids.equal(rows[own].flatten(0, 1))


@pytest.mark.parametrize("processes", [1, 2])
def test_each_adapter_has_packed_sequences_of_its_own_rows(processes):
    """Equally many for each, also where another process has other lengths."""
    sources = [arrays(code, rows=9) for code in (1, 2, 3, 4)]
    pack = partial(padded, cost=Cost(1.0, 0.0))
    for process in range(processes):
        split = Split(process_index=process, num_processes=processes)
        settings = {"batch_size": 4, "rows_per_adapter": 5, "split": split}
        packed = batches(sources, collate=pack, **settings)[2]
        unpacked = batches(sources, **settings)[2]
        assert packed.rows.packed
        assert len(packed.rows.ids) < len(unpacked.rows.ids) == 5 * len(packed.tokens)
        each = len(packed.rows.ids) // len(packed.tokens)
        for index, tokens in enumerate(packed.tokens):
            own = packed.rows.ids[index * each : (index + 1) * each]
            found = own[own >= 100]  # the first token of every row
            assert found.tolist() == [int(tokens[0, 0]) // 100 * 100] * 5
