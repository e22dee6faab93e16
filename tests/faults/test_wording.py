"""What is right and was said wrong: names in tables and pictures, cards, notices, hints."""

import warnings

import pytest
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from loragen.cli.render import columns
from loragen.core.adapter.export import _card, how_to_load
from loragen.core.adapter.files import Adapter
from loragen.core.base.names import hub_id
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


# ---------------------------------------------------------------------------- model cards


BASES = [
    "./my: base",
    "/home/me/secret place/base",
    "demo",
    r"C:\\models\\base",
    "a/b/c",
    "x: y",
    "a b/c",
]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "base", [*BASES, "gpt2", "Qwen/Qwen2.5-0.5B-Instruct", "~/base", "a//b", "x.gguf"]
)
def test_a_card_is_one_that_the_hub_accepts_and_leaks_no_path(tmp_path, monkeypatch, base, merged):
    monkeypatch.chdir(tmp_path)
    if base == "./my: base":
        (tmp_path / "my: base").mkdir()
    config = {"r": 4, "lora_alpha": 8.0, "base_model_name_or_path": base}
    card = _card(Adapter(config, {}), tmp_path / "an adapter: of mine", merged)
    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == ("transformers" if merged else "peft")
    assert data["tags"] == ["lora", "loragen"]
    if base in ("gpt2", "Qwen/Qwen2.5-0.5B-Instruct"):
        assert data["base_model"] == base
        validate_repo_id(data["base_model"])
    else:
        assert "base_model" not in data
        assert base not in card or not {*base} & {*"/\\"}
    assert "secret place" not in card


def test_a_hub_id_that_is_a_directory_here_is_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "base").mkdir(parents=True)
    assert hub_id("owner/base") is None
    assert hub_id("owner/other") == "owner/other"


def test_a_card_loads_the_adapter_of_a_local_base(base_dir, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base_dir)
    made = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    made.save_pretrained(tmp_path / "adapter")
    code = how_to_load(str(base_dir)).split("```python")[1].split("```")[0]
    assert str(base_dir) not in code
    found = {}
    exec(code.replace("DIRECTORY OF THIS FILE", str(tmp_path / "adapter")), found)
    assert found["model"].peft_config["default"].r == 2
