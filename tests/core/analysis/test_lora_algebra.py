import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loragen.core.analysis.lora_algebra import distance, inner, modules, norm


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


def test_a_module_is_at_no_distance_from_itself():
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


def test_half_precision_is_widened():
    factors = (torch.full((1, 500), 200.0).half(), torch.full((500, 1), 200.0).half())
    assert norm(factors) == pytest.approx(200.0 * 200.0 * 500, rel=1e-6)


def test_modules_are_the_linear_ones_with_both_factors_layer_by_layer():
    def key(layer, matrix):
        return f"base_model.model.layers.{layer}.q_proj.{matrix}.weight"

    tensors = {key(n, m): torch.zeros(2, 2) for n in (10, 9) for m in ("lora_A", "lora_B")}
    tensors |= {
        key(11, "lora_A"): torch.zeros(2, 2),  # its lora_B is missing
        "base_model.model.layers.0.q_proj.lora_magnitude_vector": torch.zeros(2),
        "base_model.model.embed.lora_embedding_A": torch.zeros(2, 2),
    }
    assert [name for name, _ in modules(tensors)] == ["layers.9.q_proj", "layers.10.q_proj"]
