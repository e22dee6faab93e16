import json

import pytest

from loragen.cli import render

BAD = {"prompt": "p"}
GOOD = {"prompt": "Question?", "response": "red"}


@pytest.fixture
def preview(loragen, base_dir):
    """`preview(source, ...)` with the tiny base's tokenizer."""

    def run(source, *arguments):
        return loragen("data", "preview", source, "--base-model", base_dir, *arguments)

    return run


def test_the_mask_and_the_numbers_are_shown(preview, dataset):
    result = preview(dataset(), "--limit", "2")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "format         prompt/response\n" in result.stdout
    assert "rows           12\n" in result.stdout
    assert "cut            none (max_length 1024)" in result.stdout
    assert "<|user|>Question 0 about red?<|assistant|>⟦red<|end|>⟧" in result.stdout
    assert result.stdout.count("⟦") == 3  # the legend and two rows


def test_what_is_cut_is_marked(preview, dataset):
    result = preview(dataset([GOOD | {"prompt": "x" * 30}]), "--max-length", "20")
    assert "cut            1 rows, " in result.stdout
    assert f"⟪<|user|>{'x' * 16}" in result.stdout.replace("⟫", "")
    assert "x⟫x" in result.stdout


def test_json_is_one_document(preview, dataset):
    document = json.loads(preview(dataset(), "--json", "--limit", "1").stdout)
    assert document["formats"] == {"prompt/response": 12}
    assert document["bad_rows"] == []
    assert document["row_tokens"].keys() == {"p5", "p50", "p95", "max"}
    assert document["samples"] == [
        {
            "line": 1,
            "cut": "",
            "prompt": "<|user|>Question 0 about red?<|assistant|>",
            "answer": "red<|end|>",
        }
    ]


def test_several_formats_are_counted(preview, dataset):
    other = {"instruction": "a", "output": "b"}
    result = preview(dataset([GOOD, other, GOOD]))
    assert "prompt/response (2), instruction/output[/input] (1)" in result.stdout


def test_the_shipped_base_will_do(loragen, dataset):
    result = loragen("data", "preview", dataset([GOOD]), "--base-model", "demo")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_bad_rows_are_shown_and_fail_unless_they_are_to_be_skipped(preview, dataset, json_flag):
    file = dataset([GOOD, BAD, GOOD, 3])
    result = preview(file, *json_flag)
    assert result.exit_code == 1
    assert result.stderr == f"error: {file}: 2 bad rows (--skip-bad-rows leaves out what is bad)\n"
    if json_flag:
        bad = json.loads(result.stdout)["bad_rows"]
        assert bad == [
            {"line": 2, "reason": "'response' is missing (keys here: prompt)"},
            {"line": 4, "reason": "expected an object, found int 3"},
        ]
    else:
        assert "  line 4: expected an object, found int 3\n" in result.stdout
    result = preview(file, "--skip-bad-rows", *json_flag)
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_file_without_good_rows_is_one_line(fails, dataset):
    error = fails(1, "data", "preview", dataset([BAD]))
    assert "colors.jsonl:1: 'response' is missing" in error


@pytest.mark.parametrize(
    "source, message",
    [
        ("none.csv", "none.csv: no such file"),
        ("hub:none", "expected hub:owner/name"),
        ("nothing", "data_to_lora/cs is not a directory; see --data-root"),
    ],
)
def test_a_source_that_is_not_there_is_a_usage_error(fails, source, message):
    assert message in fails(2, "data", "preview", source)


def test_a_bare_hub_id_says_why_the_hub_is_asked(loragen):
    pytest.importorskip("datasets")
    result = loragen("data", "preview", "no-one/none")
    assert result.exit_code == 2
    note, error = result.stderr.splitlines()
    assert note.startswith("no-one/none: no file, and no name below data_to_lora/cs")
    assert error.startswith("error: hub dataset no-one/none: ")


def test_a_base_that_is_not_there_is_a_usage_error(fails, dataset):
    error = fails(2, "data", "preview", dataset(), "--base-model", "./none")
    assert "base model ./none: no such directory" in error


def test_it_only_reads(preview, dataset, tmp_path):
    file = dataset()
    before = sorted(tmp_path.rglob("*"))
    preview(file)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_terminal_shows_colours_and_obeys_no_escapes_of_the_data(monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert render.highlighted("a\x1b[0m", "good") == "\x1b[32m\x1b[1ma\\x1b[0m\x1b[0m"
    assert render.highlighted("a", "dropped") == "\x1b[2m\x1b[9ma\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert render.highlighted("a", "good") == "⟦a⟧"
    assert render.visible("猫\u3000\n\t\r") == "猫\u3000\n\t\\x0d"


def test_the_help_shows_the_whole_form_of_a_hub_dataset(loragen, monkeypatch):
    """What is in brackets is not taken for markup."""
    monkeypatch.setenv("COLUMNS", "200")
    help_text = loragen("data", "preview", "--help").output
    assert "hub:owner/name[:config][@split]" in help_text
