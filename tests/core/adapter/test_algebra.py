import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loragen.core.adapter.algebra import (
    canonical,
    distance,
    effective_rank,
    in_form,
    inner,
    inner_products,
    modules,
    norm,
    singular_values,
    stable_rank,
)


@st.composite
def factor_pairs(draw, one_rank=False):
    """Two modules of one shape; the ranks may differ, as may the sizes of their values."""
    ranks = [draw(st.integers(1, 5))] * 2 if one_rank else [draw(st.integers(1, 5)) for _ in "ab"]
    wide, tall = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def one(rank):
        scale = 10.0 ** draw(st.integers(-4, 4))
        return (
            torch.randn(rank, wide, generator=generator) * scale,
            torch.randn(tall, rank, generator=generator),
        )

    return one(ranks[0]), one(ranks[1])


def dense(factors):
    a, b = factors
    return b.double() @ a.double()


def size(factors):
    """What the rounding of a product is relative to."""
    a, b = factors
    return float(a.double().norm() * b.double().norm())


@given(factor_pairs())
def test_the_inner_product_is_that_of_the_dense_matrices(pair):
    one, other = pair
    wanted = float((dense(one) * dense(other)).sum())
    assert inner(one, other) == pytest.approx(wanted, abs=1e-12 * size(one) * size(other))
    assert inner(one, other) == pytest.approx(
        inner(other, one), abs=1e-12 * size(one) * size(other)
    )


@given(factor_pairs())
def test_the_norm_is_that_of_the_dense_matrix(pair):
    one, _ = pair
    wanted = float(dense(one).norm())
    assert norm(one) == pytest.approx(wanted, rel=1e-6, abs=1e-7 * size(one))


@given(factor_pairs(one_rank=True))
def test_the_distance_is_that_of_the_dense_matrices(pair):
    one, other = pair
    wanted = float((dense(one) - dense(other)).norm())
    rounding = 1e-7 * (size(one) + size(other))
    assert distance(one, other) == pytest.approx(wanted, rel=1e-6, abs=rounding)
    assert distance(one, other) == pytest.approx(distance(other, one), rel=1e-6, abs=rounding)


def test_the_distance_of_a_module_to_itself_is_zero():
    factors = (torch.randn(4, 30), torch.randn(20, 4))
    assert distance(factors, factors) == 0.0


@pytest.mark.parametrize("step", [1e-3, 1e-5, 1e-7, 1e-10])
def test_a_small_step_far_from_zero_keeps_its_digits(step):
    """The difference of two squares would have lost it: |BA|² is 1e8 and the step's 1e-20."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 30, generator=generator, dtype=torch.float64) * 10 for _ in "ab")
    b = b.T.contiguous()
    moved = torch.randn(4, 30, generator=generator, dtype=torch.float64) * step
    wanted = float((b @ moved).norm())
    assert distance((a + moved, b), (a, b)) == pytest.approx(wanted, rel=1e-4)


@given(factor_pairs(), factor_pairs())
def test_all_inner_products_at_once(pair, other_pair):
    """The shapes of two pairs differ: each pair is compared with itself."""
    for one, other in (pair, other_pair):
        found = inner_products([one, other, one], [other, one])
        assert found.shape == (3, 2)
        for row, first in enumerate((one, other, one)):
            for column, second in enumerate((other, one)):
                wanted = pytest.approx(inner(first, second), abs=1e-12 * size(first) * size(second))
                assert float(found[row, column]) == wanted


@given(factor_pairs())
def test_the_spectrum_is_that_of_the_dense_matrix(pair):
    one, _ = pair
    values, wanted = singular_values(one), torch.linalg.svdvals(dense(one))
    assert torch.allclose(values, wanted[: len(values)], rtol=1e-9, atol=1e-12 * size(one))
    assert float(wanted[len(values) :].sum()) == pytest.approx(0, abs=1e-12 * size(one))
    assert float(values.norm()) == pytest.approx(norm(one), rel=1e-6, abs=1e-7 * size(one))
    assert 1 <= stable_rank(values) <= len(values) + 1e-9
    assert 1 - 1e-9 <= effective_rank(values) <= len(values) + 1e-9


@given(factor_pairs(), st.integers(0, 1000))
def test_ranks_do_not_depend_on_how_delta_w_is_factorised(pair, seed):
    """B -> BQ, A -> Q⁻¹A leaves BA as it is."""
    a, b = (factor.double() for factor in pair[0])
    noise = torch.randn(len(a), len(a), generator=torch.Generator().manual_seed(seed))
    q = torch.eye(len(a), dtype=torch.float64) * 3 + noise.double() / len(a)
    values = singular_values((a, b))
    turned = singular_values((torch.linalg.solve(q, a), b @ q))
    assert torch.allclose(turned, values, rtol=1e-7, atol=1e-10 * float(values[0]))
    assert stable_rank(turned) == pytest.approx(stable_rank(values), rel=1e-6)
    assert effective_rank(turned) == pytest.approx(effective_rank(values), rel=1e-6)


def test_the_ranks_of_equal_and_of_single_singular_values():
    assert stable_rank(torch.ones(4)) == effective_rank(torch.ones(4)) == pytest.approx(4)
    one = torch.tensor([3.0, 0.0, 0.0])
    assert stable_rank(one) == effective_rank(one) == pytest.approx(1)
    assert stable_rank(torch.zeros(3)) == effective_rank(torch.zeros(3)) == 0


def test_a_factor_that_is_not_finite_has_no_spectrum():
    values = singular_values((torch.tensor([[float("inf"), 1.0]]), torch.ones(3, 1)))
    assert values.shape == (1,)
    assert values.isnan().all()
    assert stable_rank(values) != stable_rank(values)  # NaN
    assert effective_rank(values) != effective_rank(values)


def test_half_precision_is_computed_in_float64():
    factors = (torch.full((1, 500), 200.0).half(), torch.full((500, 1), 200.0).half())
    assert norm(factors) == pytest.approx(200.0 * 200.0 * 500, rel=1e-6)


def test_modules_are_yielded_layer_by_layer_and_embeddings_too():
    def key(layer, matrix):
        return f"base_model.model.layers.{layer}.q_proj.{matrix}.weight"

    tensors = {key(n, m): torch.zeros(2, 2) for n in (10, 9) for m in ("lora_A", "lora_B")}
    for matrix in "AB":
        tensors[f"base_model.model.embed.lora_embedding_{matrix}"] = torch.zeros(2, 2)
    names = [name for name, _ in modules(tensors)]
    assert names == ["embed", "layers.9.q_proj", "layers.10.q_proj"]


A, B = "base_model.model.m.lora_A.weight", "base_model.model.m.lora_B.weight"


def random_factors(rank, into, out, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 7), st.integers(0, 99))
def test_canonical_factors_have_the_same_product(rank, into, out, seed):
    a, b = random_factors(rank, into, out, seed)
    new_a, new_b = canonical(a, b)
    assert new_a.shape == a.shape
    assert new_b.shape == b.shape
    assert torch.allclose(new_b @ new_a, b @ a, atol=1e-4)


@settings(max_examples=40)
@given(st.integers(1, 3), st.integers(0, 99))
def test_equal_products_have_equal_canonical_factors(rank, seed):
    a, b = random_factors(rank, 6, 5, seed)
    turn = torch.linalg.qr(torch.randn(rank, rank))[0] * 2  # any invertible matrix will do
    one, other = canonical(a, b), canonical(torch.linalg.inv(turn) @ a, b @ turn)
    assert all(torch.allclose(x, y, atol=1e-3) for x, y in zip(one, other, strict=True))


def test_raw_changes_nothing_and_svd_only_pairs_of_factors():
    a, b = random_factors(2, 4, 3, 0)
    tensors = {A: a, B: b, "lora_magnitude_vector": torch.ones(3)}
    assert all(value is tensors[key] for key, value in in_form(tensors, "raw").items())
    found = in_form(tensors, "svd")
    assert found.keys() == tensors.keys()
    assert found["lora_magnitude_vector"] is tensors["lora_magnitude_vector"]
    assert not found[A].equal(a)
    assert torch.allclose(found[B] @ found[A], b @ a, atol=1e-5)
