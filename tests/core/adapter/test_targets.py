import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.adapter.algebra import canonical, in_form

A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"


def factors(rank, into, out, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_the_product_stays(rank, into, out, seed):
    a, b = factors(rank, into, out, seed)
    new_a, new_b = canonical(a, b)
    assert new_a.shape == a.shape
    assert new_b.shape == b.shape
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-4)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(0, 99))
def test_equal_products_give_equal_factors(rank, seed):
    a, b = factors(rank, 6, 5, seed)
    turn = torch.linalg.qr(torch.randn(rank, rank))[0] * 2  # any invertible matrix will do
    one, other = canonical(a, b), canonical(torch.linalg.inv(turn) @ a, b @ turn)
    assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(one, other, strict=True))


def test_raw_is_as_it_was_and_svd_keeps_what_is_no_pair():
    a, b = factors(2, 4, 3, 0)
    tensors = {A: a, B: b, "lora_magnitude_vector": torch.ones(3)}
    assert all(value is tensors[key] for key, value in in_form(tensors, "raw").items())
    found = in_form(tensors, "svd")
    assert found.keys() == tensors.keys()
    assert found["lora_magnitude_vector"] is tensors["lora_magnitude_vector"]
    assert not found[A].equal(a)
    assert torch.allclose(found[B] @ found[A], b @ a, atol=1e-5)
