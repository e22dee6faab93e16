import re
from html.parser import HTMLParser

import pytest
import torch

from loragen.core.analysis.page import format_number, page
from loragen.core.analysis.series import analyze_checkpoints

EMPTY_ELEMENTS = {"meta", "link", "br", "img"}


class Nesting(HTMLParser):
    """Fails where tags do not close what they opened."""

    def __init__(self):
        super().__init__()
        self.open, self.plots = [], 0

    def handle_starttag(self, tag, attributes):
        self.plots += tag == "svg"
        if tag not in EMPTY_ELEMENTS:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in {"p", "li"}:  # HTML closes these by itself
            while self.open and self.open[-1] in {"p", "li"}:
                self.open.pop()
            assert self.open.pop() == tag
        elif self.open and self.open[-1] == tag:
            self.open.pop()


def plots(text):
    parser = Nesting()
    parser.feed(text)
    assert parser.open == []
    return parser.plots


@pytest.fixture(scope="module")
def side_by_side(two):
    """The page of two series, drawn once."""
    return page(analyze_checkpoints(two))


def test_the_page_stands_on_its_own(side_by_side):
    text = side_by_side
    assert plots(text) == 2 + 2 * 3  # side by side, and three for each
    assert "//" not in re.sub(r"data:image/png;base64,[^\"]*", "", text)  # no address of any kind
    assert "<script" not in text
    assert "prefers-color-scheme: dark" in text
    assert "fill: currentColor" in text or "fill: currentcolor" in text.lower()


def test_names_are_text_and_never_markup(side_by_side):
    assert "<b>" not in side_by_side
    assert "first &lt;b&gt;&amp;$x_1$" in side_by_side


def test_a_single_file_has_its_heat_map_only(folder, drifting):
    analysis = analyze_checkpoints([folder(drifting(1))])
    text = page(analysis)
    assert text == page(analysis)  # byte for byte
    assert plots(text) == 1
    assert "Side by side" not in text


def test_damage_stands_at_the_top(folder, drifting):
    good, second, third = drifting(3)
    for key in good:
        if "layers.1" in key and "lora_B" in key:
            third[key] = third[key] * 1e-6
    first = next(iter(second))
    second[first] = torch.full_like(second[first], float("nan"))
    text = page(analyze_checkpoints([folder([good, good, second, third])]))
    warnings = text[: text.index("<section")]
    for found in (
        f"checkpoint-step-003.ckpt: {first}",
        "layer 1",
        "duplicates",
        "unknown scaling",
    ):
        assert found in warnings
    assert plots(text) == 3


def test_equal_checkpoints_and_other_names_are_drawn(folder, drifting):
    (tensors,) = drifting(1)
    assert "all checkpoints are equal" in page(analyze_checkpoints([folder([tensors, tensors])]))
    odd = {key.replace("layers.", "块$"): tensor for key, tensor in tensors.items()}
    assert "块$0.q_proj" in page(analyze_checkpoints([folder([odd], "odd")]))


def test_missing_numbers_are_a_dash():
    assert [format_number(value) for value in (None, float("nan"), 0.123456)] == [
        "–",
        "–",
        "0.1235",
    ]
