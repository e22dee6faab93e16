import re
import subprocess
import sys

import pytest

from loragen import __version__
from loragen.cli import config as config_commands
from loragen.cli.render import answer_json, columns


@pytest.fixture
def raising(monkeypatch):
    """`config init` raises what it is given."""

    def arrange(error):
        def fail(_):
            raise error

        monkeypatch.setattr(config_commands.render, "answer", fail)

    return arrange


def test_the_version(loragen):
    assert loragen("--version").stdout == f"loragen {__version__}\n"


def test_a_bug_is_one_line_that_says_how_to_see_more(loragen, raising):
    raising(ZeroDivisionError("a\nlong  story"))
    result = loragen("config", "init", "lora")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ZeroDivisionError: a long story")
    assert result.stderr.count("\n") == 1


def test_a_bug_under_debug_is_a_traceback(loragen, raising):
    raising(ZeroDivisionError("a story"))
    result = loragen("config", "init", "lora", "--debug")
    assert isinstance(result.exception, ZeroDivisionError)


def test_an_interrupt_is_exit_code_130(loragen, raising):
    raising(KeyboardInterrupt())
    result = loragen("config", "init", "lora")
    assert result.exit_code == 130
    assert result.stderr == "error: interrupted\n"


def test_a_reader_that_ends_early_is_no_error():
    """The reader of the pipe has ended before the command writes, as `head` may."""
    command = [sys.executable, "-m", "loragen", "config", "init", "lora"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait()


def test_the_help_imports_no_configuration():
    """pydantic and the schemas take longer than all the rest of `--help`."""
    code = "import sys, loragen.cli.main; print({'pydantic', 'yaml', 'torch'} & {*sys.modules})"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_no_command_shows_the_help(loragen):
    result = loragen()
    assert "Collect adapters (lora train)" in result.output


def test_columns_are_aligned_and_numbers_stand_right():
    text = columns(("name", "value"), [("a", 1.23456), ("long name", None), ("b", 12345)])
    assert text.splitlines() == [
        "name       value",
        "a          1.235",
        "long name      -",
        "b          12345",
    ]


def test_json_has_no_nan(capsys):
    answer_json({"x": [float("nan"), float("inf"), 1.5, {"y": float("-inf")}]})
    assert capsys.readouterr().out.split() == (
        ["{", '"x":', "[", "null,", "null,", "1.5,", "{", '"y":', "null", "}", "]", "}"]
    )


WRITERS = (
    "demo",
    "data prepare",
    "lora export",
    "gen infer",
    "gen eval",
    "ckpt convert",
    "config migrate",
)


@pytest.mark.parametrize("command", WRITERS)
@pytest.mark.parametrize("spelling", ["--output", "-o", "--out", "--output-dir", "--output_dir"])
def test_where_a_result_goes_has_one_name_and_its_old_ones(loragen, command, spelling):
    shown = spelling if spelling == "-o" else "--output"
    assert f"Option '{shown}' requires an argument" in loragen(*command.split(), spelling).stderr


@pytest.mark.parametrize(
    ("command", "option", "meant"),
    [
        ("lora train", "--lora_r", "--set lora.rank=VALUE"),
        ("lora train", "-r", "--set lora.rank=VALUE"),
        ("lora train", "--per_device_train_batch_size", "--batch-size"),
        ("lora train", "--bf16", "--set trainer.precision=bf16-mixed"),
        ("lora train", "--lr", "--set schedule.learning_rate_stage1=VALUE"),
        ("lora train", "--output_dir", "--runs-dir"),
        ("gen train", "--num-train-epochs", "--set training.max_epochs=VALUE"),
        ("gen train", "--lr", "--set training.learning_rate=VALUE"),
    ],
)
def test_an_option_of_other_trainers_is_understood(loragen, command, option, meant):
    result = loragen(*command.split(), option, "8")
    assert result.exit_code == 2
    assert f"Did you mean {meant}?" in " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.stderr).split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("lora", "train", "--batch-sise", "8"), "(Possible options: --batch-size)"),
        (("lora", "train", "--nonsense"), "No such option: --nonsense │"),
        (("lora", "export", "--lora-r", "8"), "No such option: --lora-r"),
    ],
)
def test_other_unknown_options_are_said_as_before(loragen, arguments, said):
    result = loragen(*arguments)
    assert result.exit_code == 2
    assert said in " ".join(result.stderr.split())
    assert "Did you mean" not in result.stderr
