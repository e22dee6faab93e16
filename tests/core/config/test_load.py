import re

import pytest

from loragen.core.config import GenTrainConfig, LoraTrainConfig, Override, dump, load
from loragen.core.config.show import commented_defaults
from loragen.core.errors import ConfigError, UsageError


def problems_of(call, *arguments, **options):
    """Every line of the error that the call raises."""
    with pytest.raises(UsageError) as error:
        call(*arguments, **options)
    return list(error.value.problems)


def test_the_defaults_need_no_file():
    config = load(LoraTrainConfig, environment={})
    assert (config.training.batch_size, config.training.max_steps) == (32, 125)
    assert config.schedule.name == "two-stage"
    assert config.schedule.options["stage1_steps"] == 75
    assert set(config.loggers) == {"tensorboard", "swanlab"}


def test_each_layer_wins_over_the_one_before(configure):
    text = "training: {batch_size: 1, max_steps: 1, val_every: 1, weight_decay: 0.1}"
    environment = {
        "LORAGEN_TRAINING__BATCH_SIZE": "2",
        "LORAGEN_TRAINING__MAX_STEPS": "2",
        "LORAGEN_TRAINING__VAL_EVERY": "2",
    }
    settings = ["training.batch_size=3", "training.max_steps=3"]
    flags = [Override(("training", "batch_size"), 4, "--batch-size")]
    config = configure(text, environment=environment, settings=settings, flags=flags)
    training = config.training
    assert training.batch_size == 4  # flag
    assert training.max_steps == 3  # --set
    assert training.val_every == 2  # environment
    assert training.weight_decay == 0.1  # file
    assert training.patience is None  # built-in


def test_a_directory_may_be_in_the_home_of_the_user(configure, tmp_path, monkeypatch):
    """A shell expands `~` on a command line, and nobody does so in a YAML file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    config = configure("{runs_dir: ~/runs, data: {root: ~nobody-here/x}}")
    assert config.runs_dir == str(tmp_path / "runs")
    assert config.data.root == "~nobody-here/x"
    assert configure("data: {root: ./rows/}").data.root == "./rows/"


def test_every_problem_at_once_each_with_its_place(configure):
    text = """\
training:
  batch_size: 3x
  max_stps: 4
lora: {rnk: 3}
schedule:
  learning_rate_stage1: -1
  floor: 3
loggers: {swanlab: {mode: onlin}, tensorbord: {}}
bogus: 1
"""
    found = problems_of(configure, text, settings=["seed=-1"])
    for start in (
        "c.yaml:2:3: training.batch_size: ",
        "c.yaml:3:3: training.max_stps: unknown key. Did you mean 'max_steps'?",
        "c.yaml:4:8: lora.rnk: unknown key. Did you mean 'rank'?",
        "c.yaml:6:3: schedule.learning_rate_stage1: ",
        "c.yaml:7:3: schedule.floor: unknown key",
        "c.yaml:8:21: loggers.swanlab.mode: ",
        "c.yaml:8:35: loggers.tensorbord: unknown logger",
        "c.yaml:9:1: bogus: unknown key",
        "--set: seed: ",
    ):
        assert any(problem.startswith(start) for problem in found), start
    assert len(found) == 9
    assert not any("\n" in problem for problem in found)


@pytest.mark.parametrize(
    "layers, origin",
    [
        ({"environment": {"LORAGEN_SEED": "x"}}, "LORAGEN_SEED: seed: "),
        ({"settings": ["seed=x"]}, "--set: seed: "),
        ({"flags": [Override(("seed",), "x", "--seed")]}, "--seed: seed: "),
    ],
)
def test_an_error_names_the_layer_that_gave_the_value(configure, layers, origin):
    (problem,) = problems_of(configure, "seed: 3", **layers)
    assert problem.startswith(origin)


def test_a_key_given_twice_is_refused(configure):
    (problem,) = problems_of(configure, "training:\n  batch_size: 3\n  batch_size: 4\n")
    assert problem.startswith("c.yaml:3:3: training.batch_size is given twice")
    assert "c.yaml:2:3" in problem


@pytest.mark.parametrize(
    "text, start",
    [
        ("- a", "c.yaml:1: "),
        ("a: b: c", "c.yaml:1:5: not YAML"),
        ("a: !!python/object:os.system {}", "c.yaml:1:4: not YAML"),
        ("data: [1\nseed: 2", "c.yaml:2:5: not YAML"),
        ("a: &a [*a]", "c.yaml: nested deeper than 50"),
        ("schedule:", "c.yaml:1:1: schedule: "),
        ("schedule: {name: 3}", "c.yaml:1:12: schedule: unknown schedule '3'"),
        ("loggers: [swanlab]", "c.yaml:1:1: loggers: "),
        ("loggers: {swanlab: 5}", "c.yaml:1:11: loggers.swanlab: "),
    ],
)
def test_a_file_that_is_no_configuration_is_one_problem(configure, text, start):
    (problem,) = problems_of(configure, text)
    assert problem.startswith(start)


def test_a_missing_file_is_a_usage_error(tmp_path):
    (problem,) = problems_of(load, LoraTrainConfig, tmp_path / "none.yaml")
    assert "none.yaml: no such" in problem


@pytest.mark.parametrize(
    "setting, part",
    [
        ("training.batch_size", "expected key=value"),
        ("=5", "expected key=value"),
        ("seed=[1", "not YAML"),
        ("sources.3.run=x", "sources.3.run: index 3 is out of range"),
    ],
)
def test_a_setting_that_does_not_parse_is_quoted(configure, setting, part):
    text = "sources: [{run: a}]"
    (problem,) = problems_of(configure, text, model=GenTrainConfig, settings=[setting])
    assert part in problem
    assert "--set" in problem


def test_a_setting_reaches_into_lists_and_is_read_as_yaml(configure):
    settings = ["sources.1.run=c", "data.checkpoint_dir=[x, y]", "schedule.learning_rate=1e-3"]
    text = "sources: [{run: a}, {run: b}]"
    config = configure(text, model=GenTrainConfig, settings=settings)
    assert [source.run for source in config.sources] == ["a", "c"]
    assert config.data.checkpoint_dir == ["x", "y"]
    assert config.schedule.options["learning_rate"] == 1e-3


@pytest.mark.parametrize("command, model", [("gen", LoraTrainConfig), ("lora", GenTrainConfig)])
def test_the_whole_file_of_the_other_command_is_one_problem(tmp_path, command, model):
    file = tmp_path / "other.yaml"
    file.write_text(commented_defaults(command), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        load(model, file, environment={})
    assert str(error.value).startswith(f"{file}: ")
    assert f"`loragen {command} train`" in str(error.value)


def test_variables_of_another_command_are_left_alone(configure):
    assert configure(environment={"LORAGEN_ENCODER__NAME": "sbert", "LORAGEN_DEBUG": "1"})


def test_a_variable_of_no_command_says_which_was_meant(configure, caplog):
    assert configure(environment={"LORAGEN_LORA_R": "4", "LORAGEN_TRANING__BATCH_SIZE": "2"})
    assert "LORAGEN_LORA_R is ignored" in caplog.text
    assert "Did you mean LORAGEN_LORA__RANK?" in caplog.text
    assert "Did you mean LORAGEN_TRAINING__BATCH_SIZE?" in caplog.text


def test_a_variable_of_the_tests_is_no_setting(configure, caplog):
    assert configure(environment={"LORAGEN_TEST_CACHE": "models"})
    assert not caplog.text


def test_a_setting_below_an_unknown_section_is_named_as_one(configure):
    (problem,) = problems_of(configure, settings=["lora_config.r=4"])
    assert problem.startswith("--set: lora_config: unknown key. Did you mean 'lora'?")


def test_plugin_options_are_typed_and_completed_by_the_plugin(configure):
    config = configure("schedule: {learning_rate_stage1: 1e-3}")  # a text, to YAML
    assert config.schedule.options == {
        "stage1_steps": 75,
        "learning_rate_stage1": 1e-3,
        "learning_rate_stage2": 1e-5,
        "warmup_ratio": 0.0,
    }


@pytest.mark.parametrize(
    "layers",
    [
        {"settings": ["schedule.floor=0.5", "schedule.name=cosine"]},
        {"environment": {"LORAGEN_SCHEDULE__FLOOR": "0.5", "LORAGEN_SCHEDULE__NAME": "cosine"}},
    ],
)
def test_choosing_another_plugin_drops_the_options_of_the_first(configure, layers):
    """The new one's own options hold wherever they stand beside its name."""
    config = configure("schedule: {name: two-stage, stage1_steps: 5}", **layers)
    assert config.schedule.name == "cosine"
    assert config.schedule.options["floor"] == 0.5
    assert "stage1_steps" not in config.schedule.options


def test_a_variable_reaches_into_lists(configure):
    text, environment = "sources: [{run: a}, {run: b}]", {"LORAGEN_SOURCES__1__RUN": "c"}
    config = configure(text, model=GenTrainConfig, environment=environment)
    assert [source.run for source in config.sources] == ["a", "c"]


def test_one_option_of_a_default_logger_keeps_the_other_loggers(configure):
    config = configure(settings=["loggers.swanlab.mode=disabled"])
    assert config.loggers["swanlab"]["mode"] == "disabled"
    assert "tensorboard" in config.loggers
    assert configure().loggers["swanlab"]["mode"] is None  # the defaults are as they were


def test_a_file_that_names_loggers_names_all_of_them(configure):
    assert set(configure("loggers: {tensorboard: }").loggers) == {"tensorboard"}
    assert configure("loggers: {}").loggers == {}


@pytest.mark.parametrize(
    "text, part",
    [
        ("training: {patience: 5}", "training.patience"),
        (
            "training: {batch_size: 33}\ntrainer: {devices: 2}",
            "training.batch_size 33",
        ),
        ("launcher: {name: ray}\ntrainer: {devices: 2}", "launcher ray"),
    ],
)
def test_contradicting_settings_are_refused(configure, text, part):
    (problem,) = problems_of(configure, text)
    assert part in problem


@pytest.mark.parametrize(
    "text, part",
    [
        (
            "data: {batch_size: 9}\ntraining: {objective: reconstruction}",
            "data.batch_size 9",
        ),
        (
            "behaviour: {batch_size: 9}\ntraining: {objective: behaviour}",
            "behaviour.batch_size 9",
        ),
    ],
)
def test_a_batch_that_devices_cannot_share_is_refused(configure, text, part):
    (problem,) = problems_of(configure, f"{text}\ntrainer: {{devices: 2}}", model=GenTrainConfig)
    assert part in problem


def test_what_is_dumped_loads_to_the_same(configure):
    config = configure("schedule: {name: cosine}\nloggers: {swanlab: {tags: [a, b]}}")
    assert configure(dump(config)) == config


@pytest.mark.parametrize("text", ["layout.max_seq_len=5x", "trainer.devices=[1]"])
def test_a_value_that_fits_none_of_several_types_is_one_problem(text):
    with pytest.raises(ConfigError) as caught:
        load(GenTrainConfig, settings=[text], environment={})
    (problem,) = caught.value.problems
    assert problem.startswith(f"--set: {text.partition('=')[0]}: ")
    assert " or " in problem


def test_choosing_a_launcher_keeps_its_settings(configure):
    text = "launcher: {name: local, num_gpus: 0.5}"
    assert configure(text, settings=["launcher.name=ray"]).launcher.num_gpus == 0.5


@pytest.mark.parametrize(
    "layers",
    [
        {"settings": ["loggers.theirs.name=b"]},
        {"environment": {"LORAGEN_LOGGERS__THEIRS__NAME": "b"}},
    ],
)
def test_a_loggers_option_called_name_chooses_no_plugin(install, configure, layers):
    hooks = (
        "from loragen import hookimpl\n\n"
        "@hookimpl\ndef loragen_loggers():\n    return {'theirs': 'theirs:Theirs'}\n"
    )
    theirs = (
        "from pydantic import BaseModel\n\n"
        "class Theirs:\n    class Config(BaseModel, extra='forbid'):\n"
        "        name: str = ''\n        project: str = ''\n"
    )
    install("theirs-package", hooks, theirs=theirs)
    config = configure("loggers: {theirs: {name: a, project: p}}", **layers)
    assert config.loggers["theirs"] == {"name": "b", "project": "p"}


TOO_LONG = "1" * 5000


@pytest.mark.parametrize(
    "text, problem",
    [
        (
            "seed: 1\nexperiment_name: 2025-13-01",
            ":2:18: not YAML: .*month",
        ),
        ("lora: {rank: 0b_}", ":1:14: not YAML: "),
        (f"seed: {TOO_LONG}", ":1:7: not YAML: "),
        ("a: " + "[" * 3000, ": not YAML: nested too deeply"),
    ],
)
def test_a_scalar_that_cannot_be_constructed_is_one_problem(configure, text, problem):
    (found,) = problems_of(configure, text)
    assert re.match(rf"c\.yaml{problem}", found)


@pytest.mark.parametrize("value", ["2025-13-01", TOO_LONG, "[" * 3000])
def test_a_value_on_the_command_line_is_one_problem_too(value):
    for layer in ({"settings": [f"seed={value}"]}, {"environment": {"LORAGEN_SEED": value}}):
        (problem,) = problems_of(load, LoraTrainConfig, **{"environment": {}, **layer})
        assert "not YAML" in problem


@pytest.mark.parametrize("model", [LoraTrainConfig, GenTrainConfig])
def test_a_seed_has_32_bits(model):
    """More would overflow the generator of random numbers at the first step."""
    assert load(model, None, ["seed=4294967295"], environment={}).seed == 2**32 - 1
    with pytest.raises(UsageError, match="seed"):
        load(model, None, ["seed=8589934592"], environment={})
