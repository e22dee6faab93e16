"""The part of generated adapters outside of the span of the collected ones."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.adapter.files import Adapter
from loragen.core.evaluation.novelty import _Parts, novelty, outside, outside_of_others, products
from loragen.core.generator.model import Generator


def dense(adapter):
    """ΔW of every module, as the definition says."""
    scale = adapter.config["lora_alpha"] / adapter.config["r"]
    return torch.cat(
        [
            (scale * adapter.tensors[key.replace("lora_A", "lora_B")].double() @ tensor.double())
            .flatten()
            for key, tensor in sorted(adapter.tensors.items())
            if "lora_A" in key
        ]
    )  # fmt: skip


def blend(adapters, weights):
    tensors = {
        key: sum(w * one.tensors[key].double() for w, one in zip(weights, adapters, strict=True))
        for key in adapters[0].tensors
    }
    return Adapter(adapters[0].config, tensors)


@given(st.integers(1, 5), st.integers(0, 10**6))
def test_what_is_outside_is_the_residual_of_least_squares(count, seed):
    random = torch.Generator().manual_seed(seed)
    spanning = torch.randn(count, 8, generator=random, dtype=torch.float64)
    asked = torch.randn(3, 8, generator=random, dtype=torch.float64)
    fitted = torch.linalg.lstsq(spanning.T, asked.T).solution.T @ spanning
    expected = (asked - fitted).norm(dim=1) / asked.norm(dim=1)
    squares = asked.square().sum(1)
    found = outside(spanning @ spanning.T, spanning @ asked.T, squares)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@given(st.integers(2, 6), st.integers(0, 10**6))
def test_each_of_several_is_compared_with_the_others(count, seed):
    random = torch.Generator().manual_seed(seed)
    several = torch.randn(count, 8, generator=random, dtype=torch.float64)
    found = outside_of_others(several @ several.T)
    for index in range(count):
        others = several[[i for i in range(count) if i != index]]
        fitted = torch.linalg.lstsq(others.T, several[index]).solution @ others
        expected = (several[index] - fitted).norm() / several[index].norm()
        assert found[index].item() == pytest.approx(expected.item(), abs=1e-4)


def test_adapters_that_repeat_each_other_are_no_obstacle():
    one = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    gram = one @ one.T
    found = outside(gram, one @ torch.eye(2, dtype=torch.float64), torch.ones(2).double())
    assert found.tolist() == pytest.approx([0, 1], abs=1e-5)
    assert outside_of_others(gram).tolist() == pytest.approx([0, 0], abs=1e-5)


def test_products_are_those_of_the_dense_matrices(setup):
    shared = setup()
    adapters = [shared.collected(0), shared.collected(1), shared.mean_adapter()]
    parts = [_Parts(adapter) for adapter in adapters]
    rows = torch.stack([dense(adapter) for adapter in adapters])
    torch.testing.assert_close(products("delta_w", parts, parts), rows @ rows.T)
    flat = torch.stack(
        [
            torch.cat([a.tensors[k].double().flatten() for k in adapters[0].tensors])
            for a in adapters
        ]
    )
    torch.testing.assert_close(products("factors", parts, parts), flat @ flat.T)


def test_a_collected_adapter_is_not_new_and_a_blend_only_by_its_products(
    setup, targets, monkeypatch
):
    shared = setup()
    ours = [shared.collected(0), shared.collected(1)]
    answers = iter([ours[1], blend(ours, [0.3, 0.7])])
    monkeypatch.setattr(Generator, "generate", lambda *_: next(answers))
    report = novelty(shared, targets)
    copied, blended = (report.of_targets[target.key] for target in targets)
    assert copied == pytest.approx({"delta_w": 0, "factors": 0}, abs=1e-5)
    assert blended["factors"] == pytest.approx(0, abs=1e-5)
    assert 1e-3 < blended["delta_w"] < 1


def test_the_document_has_a_mean_for_each_group(setup, targets):
    report = novelty(setup(), targets)
    datasets = [
        {"group": target.group, "novelty": dict(report.of_targets[target.key])}
        for target in targets
    ]
    document = report.as_dict(datasets)
    assert set(document["groups"]["all"]) == {"delta_w", "factors"}
    assert set(document["collected"]) == {"delta_w", "factors"}
    assert 0 < document["collected"]["delta_w"] <= 1
