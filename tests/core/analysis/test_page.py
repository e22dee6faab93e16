import pytest
import torch

from loragen.core.analysis.page import analysis_page
from loragen.core.analysis.series import analyze_checkpoints
from tests.browser import opened
from tests.pages import structure

pytest.importorskip("plotly")


def page(analysis):
    return analysis_page(analysis).html()


def plots(text):
    return structure(text).plots


@pytest.fixture(scope="module")
def side_by_side(two):
    """The page of two series, drawn once."""
    return page(analyze_checkpoints(two))


def test_the_page_stands_on_its_own(side_by_side, tmp_path):
    assert plots(side_by_side) == 3 + 2 * 6  # side by side, and six for each
    (tmp_path / "page.html").write_text(side_by_side, encoding="utf-8")
    with opened(tmp_path / "page.html", 390) as shown:
        assert shown.locator(".plot .main-svg:first-of-type").count() == 15


def test_names_are_text_and_never_markup(side_by_side):
    assert "<b>" not in side_by_side  # in data, `<` is escaped, too
    assert "first &lt;b&gt;&amp;$x_1$</h2>" in side_by_side


def test_a_single_file_has_its_heat_map_only(folder, drifting):
    analysis = analyze_checkpoints([folder(drifting(1))])
    text = page(analysis)
    assert text == page(analysis)  # byte for byte
    assert plots(text) == 2
    assert "Side by side" not in text


def test_damage_stands_at_the_top(folder, drifting):
    good, second, third = drifting(3)
    for key in good:
        if "layers.1" in key and "lora_B" in key:
            third[key] = third[key] * 1e-6
    first = next(iter(second))
    second[first] = torch.full_like(second[first], float("nan"))
    text = page(analyze_checkpoints([folder([good, good, second, third])]))
    warnings = text[: text.index("<h2")]
    for found in (
        f"checkpoint-step-003.ckpt: {first}",
        "layer 1",
        "duplicates",
        "unknown scaling",
    ):
        assert found in warnings
    assert plots(text) == 6


def test_equal_checkpoints_and_other_names_are_drawn(folder, drifting):
    (tensors,) = drifting(1)
    assert "All checkpoints are equal" in page(analyze_checkpoints([folder([tensors, tensors])]))
    odd = {key.replace("layers.", "块$"): tensor for key, tensor in tensors.items()}
    assert "块$0.q_proj" in page(analyze_checkpoints([folder([odd], "odd")]))
