"""What is right and was said wrong: names in tables and pictures, cards, notices, hints."""

import shutil
import warnings

import pytest
import torch
import typer
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from pydantic import BaseModel
from transformers import AutoModelForCausalLM

from loragen.cli.main import app
from loragen.cli.render import columns
from loragen.core.adapter.export import export_card, how_to_load
from loragen.core.adapter.files import Adapter
from loragen.core.base.load import load_base
from loragen.core.base.names import hub_id
from loragen.core.config import GenTrainConfig, LoraTrainConfig, load
from loragen.core.errors import (
    ConfigError,
    LoragenError,
    UsageError,
    counted,
    display_width,
    pip_install,
    shortened,
)
from loragen.core.evaluation.contestants import choose
from loragen.core.evaluation.report import _families, draw_accuracies
from loragen.core.generator.generated import GeneratedAdapter, Origin
from loragen.core.generator.requests import nonempty_prompts
from loragen.core.run.directory import run_directory_of
from loragen.core.run.loop import check_loss
from loragen.plugins.encoders.sbert import SentenceBert
from loragen.testing import check_schedule

FAR = Origin("g", 3, "demo", "sbert", "mixture", 4, "0" * 64)
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
    assert line.startswith("results.png: no installed font has ")
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
    card = export_card(Adapter(config, {}), tmp_path / "an adapter: of mine", merged)
    data = ModelCard(card).data.to_dict()
    assert data["library_name"] == ("transformers" if merged else "peft")
    assert data["tags"][-2:] == ["lora", "loragen"]
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


# ---------------------------------------------------------------------------- notices and hints


def test_texts_that_the_encoder_cuts_are_counted_with_what_was_read(sbert_dir, caplog):
    encoder = SentenceBert(SentenceBert.Config(model=str(sbert_dir)))
    most = encoder.model.max_seq_length
    encoder(["a " * most * 4, "b", "c " * most * 4])
    (line,) = caplog.messages
    assert line.startswith(f"2 of 3 texts have more than the {most} tokens that the encoder ")
    assert "of these the first 25 % were read" in line
    encoder(["a " * most * 4])
    assert len(caplog.messages) == 1
    SentenceBert(SentenceBert.Config(model=str(sbert_dir)))(["a " * most * 4])
    assert caplog.messages[1].startswith("1 of 1 text has more than the ")


def test_a_base_with_nan_is_what_is_blamed(base_dir, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    copy = shutil.copytree(base_dir, tmp_path / "base")
    model.save_pretrained(copy)
    with pytest.raises(LoragenError) as error:
        load_base(str(copy))
    assert "model.layers.1.mlp.up_proj.weight has NaN or infinity" in str(error.value)
    assert "learning rate" not in str(error.value)


def test_a_loss_that_was_never_finite_is_no_matter_of_the_learning_rate(tmp_path):
    with pytest.raises(LoragenError, match="before the first update, so that no learning rate"):
        check_loss("train/loss", float("nan"), 1, tmp_path)
    with pytest.raises(LoragenError, match="has diverged"):
        check_loss("train/loss", float("nan"), 2, tmp_path)


@pytest.mark.parametrize(
    ("model", "text", "meant"),
    [
        (LoraTrainConfig, "learning_rate: 1", "schedule.learning_rate_stage1"),
        (LoraTrainConfig, "lora_r: 4", "lora.rank"),
        (LoraTrainConfig, "rank: 4", "lora.rank"),
        (LoraTrainConfig, "training: {lr: 1}", "schedule.learning_rate_stage1"),
        (LoraTrainConfig, "training: {max_step: 1}", "max_steps"),
        (LoraTrainConfig, "per_device_train_batch_size: 4", "training.batch_size"),
        (LoraTrainConfig, "r: 4", "lora.rank"),
        (LoraTrainConfig, "lora: {r: 4}", "lora.rank"),
        (LoraTrainConfig, "lora: {lora_alpha: 4}", "lora.alpha"),
        (LoraTrainConfig, "num_train_epochs: 1", "training.max_steps"),
        (
            LoraTrainConfig,
            "training: {gradient_accumulation_steps: 2}",
            "trainer.accumulate_grad_batches",
        ),
        (LoraTrainConfig, "max_seq_length: 9", "data.max_length"),
        (LoraTrainConfig, "bf16: true", "trainer.precision: bf16-mixed"),
        (LoraTrainConfig, "load_in_4bit: true", "base_quantization: 4bit"),
        (LoraTrainConfig, "peft_config: {r: 4}", "lora"),
        (LoraTrainConfig, "output_dir: x", "runs_dir"),
        (LoraTrainConfig, "per_device_train_batchsize: 4", "training.batch_size"),
        (LoraTrainConfig, "batch-size: 4", "training.batch_size"),
        (GenTrainConfig, "output_dir: x", "experiments_dir"),
        (GenTrainConfig, "max_seq_length: 9", "behaviour.max_length"),
        (GenTrainConfig, "optim: adam", "training.optimizer"),
        (GenTrainConfig, "lr_scheduler_type: cosine", "schedule.name"),
        (GenTrainConfig, "warmup_ratio: 0.1", "schedule.warmup_ratio"),
        (GenTrainConfig, "learning_rate: 1", "training.learning_rate"),
        (GenTrainConfig, "num_train_epochs: 1", "training.max_epochs"),
    ],
)
def test_an_unknown_key_is_looked_for_everywhere(tmp_path, model, text, meant):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load(model, tmp_path / "c.yaml", environment={})
    assert f"unknown key. Did you mean '{meant}'?" in error.value.problems[0]


def test_columns_may_be_called_as_the_table_calls_them():
    wanted = ["nearest", "4-shot", "gibberish", "multi-task", "5 labels", "best_single"]
    found = [contestant.name for contestant in choose(wanted)]
    assert sorted(found) == sorted(
        ["few_shot", "nearest", "multi_task", "best_single", "gibberish_prompts", "labels_5"]
    )


def test_a_folder_of_runs_is_said_to_be_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    with pytest.raises(UsageError) as error:
        run_directory_of(tmp_path)
    assert str(error.value) == f"{tmp_path} is a folder of 2 runs; name one: {tmp_path / 'b'}"


def test_a_prompt_that_is_no_text_is_named():
    with pytest.raises(UsageError, match="prompt 2 of 2 is not a string, but NoneType"):
        nonempty_prompts(["a", None])


def test_python_is_told_of_its_own_argument(tmp_path):
    adapter = GeneratedAdapter({}, {"a.lora_A.weight": torch.ones(1, 2)}, FAR)
    file = adapter.save(tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match="pass overwrite=True") as error:
        adapter.save(file)
    assert "--force" not in str(error.value)


def test_a_schedule_of_plain_numbers_breaks_its_promise():
    class Plain:
        class Config(BaseModel, extra="forbid"):
            pass

        def __init__(self, config):
            pass

        def __call__(self, step, total_steps):
            return 0.1

    with pytest.raises(AssertionError, match=r"must give a Rate\(learning_rate, stage\), not 0.1"):
        check_schedule(Plain)


@pytest.mark.parametrize(
    ("number", "said"), [(0, "0 datasets"), (1, "1 dataset"), (1000, "1,000 datasets")]
)
def test_one_of_something_is_no_plural(number, said):
    assert counted(number, "dataset") == said


def test_what_to_install_are_the_packages_of_an_extra():
    assert pip_install("plots").startswith("pip install 'matplotlib")
    assert "loragen" not in pip_install("data")


def test_no_help_has_hard_line_breaks():
    for command in typer.main.get_command(app).commands.values():
        for one in getattr(command, "commands", {"": command}).values():
            paragraphs = (one.help or "").split("\n\n")
            assert not any("\n" in paragraph for paragraph in paragraphs), one.name


def test_the_shell_can_be_told_to_complete(monkeypatch, capsys):
    monkeypatch.setenv("_LORAGEN_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "loragen gen in")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit):
        typer.main.get_command(app)(prog_name="loragen")
    assert capsys.readouterr().out.split() == ["infer"]


def test_an_error_is_one_line_whatever_the_name(loragen):
    result = loragen("lora", "export", "a\nb\x1b[31m\rc", "--output", "o")
    assert result.exit_code == 2
    assert result.stderr == "error: a b\\x1b[31m c: no such adapter or checkpoint\n"
