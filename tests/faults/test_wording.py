"""What is right and was said wrong: names in tables and pictures, cards, notices, hints."""

import warnings

import pytest

from loragen.cli.render import columns
from loragen.core.errors import display_width, shortened
from loragen.core.evaluation.report import _families, draw_accuracies

LONG = "a-name-that-is-much-too-long-" * 9 + "42"


def results(*names):
    """A document of `gen eval` with these datasets."""
    one = {"accuracy": {"base": 0.2, "generated": 0.7}}
    one["interval"] = {name: [value - 0.1, value + 0.1] for name, value in one["accuracy"].items()}
    averages = {key: {"all": value} for key, value in one.items()}
    datasets = [{"name": name, **one} for name in names]
    return {
        "columns": ["base", "generated"],
        "datasets": datasets,
        "options": {"shots": 4},
        **averages,
    }


# ---------------------------------------------------------------------------- names


@pytest.mark.parametrize("name", ["short", LONG, "颜色" * 40, "mixed 颜色 " * 20, "é" * 90])
@pytest.mark.parametrize("longest", [8, 20, 48])
def test_a_long_name_keeps_its_start_and_its_end(name, longest):
    found = shortened(name, longest)
    assert display_width(found) <= longest
    if "…" in found:
        start, end = found.split("…")
        assert name.startswith(start)
        assert name.strip().endswith(end)
    else:
        assert found == name


def test_columns_stay_columns_whatever_the_names():
    table = columns(("dataset", "rows"), [("颜色", 1), (LONG, 20), ("a\nb\x1b[0m", 3)]).splitlines()
    assert len(table) == 4
    assert len({display_width(line) for line in table}) == 1
    assert max(map(display_width, table)) < 60
    assert table[2].endswith("42    20")
    assert "\x1b" not in "".join(table)


# ---------------------------------------------------------------------------- pictures


@pytest.fixture
def font(tmp_path):
    """A font with the two characters 颜色, installed for the test."""
    pytest.importorskip("matplotlib")
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib import font_manager

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    pen.lineTo((0, 500))
    pen.lineTo((500, 0))
    pen.closePath()
    glyph = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    names = [".notdef", "yan", "se"]
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord("颜"): "yan", ord("色"): "se"})
    builder.setupGlyf(dict.fromkeys(names, glyph))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": "Only Colours", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "colours.ttf")
    before = list(font_manager.fontManager.ttflist)
    font_manager.fontManager.addfont(tmp_path / "colours.ttf")
    yield "Only Colours"
    font_manager.fontManager.ttflist[:] = before


def test_chinese_labels_are_drawn_with_a_font_that_has_them(tmp_path, font, caplog):
    families = _families("accuracy 颜色", tmp_path / "p.png")
    assert families[0] != font
    assert len(families) == 2  # some machines have another font with these
    assert caplog.messages == []
    assert _families("accuracy", tmp_path / "p.png") == families[:1]


def test_a_label_that_no_font_has_is_one_warning(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = tmp_path / "results.png"
        draw_accuracies(results("\U0001f9ff" + "𖣿", "b"), "title of 𖣿", picture)
    assert picture.stat().st_size > 5_000
    (line,) = caplog.messages
    assert line.startswith(f"{picture}: no installed font has ")
    assert "𖣿" in line


def test_a_dollar_and_a_long_name_are_drawn(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    draw_accuracies(results("costs $x_{$", LONG), "a $\\frac$ title " + LONG, tmp_path / "p.png")
    assert caplog.messages == []
