import json
import math

import pytest

from loragen.core.errors import UsageError
from loragen.core.outputs import is_sealed
from loragen.core.page import (
    MOST_POINTS,
    Code,
    Details,
    Facts,
    Link,
    Note,
    Page,
    PageSection,
    Plot,
    Plots,
    Table,
    Text,
    cell_text,
    figure,
    line,
    need_library,
    thinned,
)
from tests.browser import opened
from tests.pages import structure


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("plotly")
    lines = [line(i, f"run </script><b> {i}", [1, 2, 3], [3.0, 2.0, 1.0 + i]) for i in range(2)]
    plot = Plot("loss </script>", figure(lines, "step"), "a caption", log=True)
    hidden = Plot("hidden", figure(lines[:1], "step"))
    return Page(
        "A <title>",
        "What it is about.",
        [
            PageSection("First", [Text("a"), Note("careful", ["one"], 3), Plots([plot])], "first"),
            PageSection("Second", [Facts({"a fact": 1.23456}), Code("run --x '<y>'")], "second"),
            PageSection(
                "Third",
                [
                    Table(["name", "value"], [[Link("to the first", "first"), math.nan]]),
                    Table(["", ""], [["key", "a text"]]),
                    Details("more", [Plots([hidden])]),
                ],
                "third",
            ),
        ],
    )


def test_every_block_is_on_the_page_as_text(page):
    found = structure(page.html())
    assert found.plots == 2
    assert found.headings == ["A <title>", "First", "Second", "Third"]
    assert found.anchors == ["first", "second", "third", "first"]
    for text in ("and 3 more", "1.235", "run --x '<y>'", "to the first", "–", "a text", "hidden"):
        assert text in found.text
    assert page.html() == page.html()  # byte for byte


def test_a_page_without_plots_has_no_script():
    assert "<script" not in Page("t", "l", [PageSection("s", [Text("a")])]).html()


def test_a_written_page_tells_when_it_was_edited(page, tmp_path):
    file = tmp_path / "new" / "page.html"
    page.write(file)
    assert is_sealed(file)
    file.write_text(file.read_text("utf-8").replace("careful", "careless"), "utf-8")
    assert not is_sealed(file)


def test_without_the_library_the_package_is_named(monkeypatch):
    monkeypatch.setattr("loragen.core.page.find_spec", lambda _: None)
    with pytest.raises(UsageError, match="--html needs plotly; pip install "):
        need_library("--html")


def test_missing_numbers_are_a_dash():
    assert [cell_text(v) for v in (None, math.nan, 0.123456, 3, "a")] == [
        *("–", "–", "0.1235", "3", "a")
    ]


def test_a_long_line_keeps_its_ends_and_outliers():
    values = [math.sin(i / 1000) for i in range(50_000)]
    values[12_345], values[34_567] = 9.0, -9.0
    at = thinned(values)
    assert len(at) <= MOST_POINTS
    assert at == sorted(set(at))
    assert {0, 49_999, 12_345, 34_567} <= set(at)
    assert thinned(values[:100]) == list(range(100))
    pytest.importorskip("plotly")
    assert len(json.loads(figure([line(0, "a", range(50_000), values)]))["data"][0]["x"]) == len(at)


def test_in_a_browser_it_draws_in_its_mode_and_on_demand(page, tmp_path):
    page.write(tmp_path / "page.html")
    with opened(tmp_path / "page.html", scheme="dark") as shown:

        def becomes(selector, attribute, value):
            style = f"getComputedStyle(document.querySelector('{selector}')).{attribute}"
            shown.wait_for_function(f"{style} === '{value}'")

        assert shown.locator(".plot .main-svg").first.is_visible()
        becomes(".plot .ytick text", "fill", "rgb(154, 164, 175)")
        shown.emulate_media(color_scheme="light")
        becomes(".plot .ytick text", "fill", "rgb(89, 99, 110)")
        assert "run </script><b> 1" in shown.locator(".plot").first.inner_text()
        hidden = shown.locator("details .plot")
        assert hidden.locator("svg").count() == 0
        shown.locator("summary").click()
        hidden.locator(".main-svg").first.wait_for()
        shown.get_by_role("button", name="log").click()
        shown.wait_for_function("document.querySelector('.plot').layout.yaxis.type === 'log'")
        shown.emulate_media(media="print", color_scheme="dark")
        becomes("body", "backgroundColor", "rgb(255, 255, 255)")
        shown.emulate_media(media="screen")
        shown.set_viewport_size({"width": 390, "height": 800})
        shown.wait_for_function("document.documentElement.scrollWidth === 390")
        shown.set_viewport_size({"width": 1440, "height": 800})
