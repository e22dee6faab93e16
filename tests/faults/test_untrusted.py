"""Code and files from a stranger: nothing of theirs runs, hangs or fills the memory unasked."""

import ast
import io
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import loragen
from loragen.cli.main import app
from loragen.core.base import load as load_module
from loragen.core.base.load import empty_base, load_base, load_tokenizer
from loragen.core.config import LoraTrainConfig, load
from loragen.core.config.yaml_file import read_yaml
from loragen.core.data.dataset import Dataset
from loragen.core.errors import ConfigError, LoragenError, UsageError
from loragen.core.lora import train as train_module
from loragen.core.lora.train import count_values, new_adapter, train_adapter
from loragen.core.progress import Silent
from loragen.testing import write_base


def write_code(directory: Path, proof: Path) -> Path:
    """Gives a base a modeling file of its own, which writes the file `proof` when it runs."""
    module = f"""
from pathlib import Path
from transformers import Qwen2Config, Qwen2ForCausalLM

Path({str(proof)!r}).write_text("the code has run")


class StrangerConfig(Qwen2Config):
    model_type = "stranger"


class Stranger(Qwen2ForCausalLM):
    config_class = StrangerConfig
"""
    (directory / "modeling_stranger.py").write_text(module, encoding="utf-8")
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {
        "model_type": "stranger",
        "architectures": ["Stranger"],
        "auto_map": {
            "AutoConfig": "modeling_stranger.StrangerConfig",
            "AutoModelForCausalLM": "modeling_stranger.Stranger",
        },
    }
    file.write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture
def stranger(tmp_path):
    return write_code(write_base(tmp_path / "stranger"), tmp_path / "proof")


class Asked(io.StringIO):
    """A standard input that nobody may read."""

    def read(self, *_):
        raise AssertionError("stdin was asked")

    readline = read


@pytest.fixture
def nobody_answers(monkeypatch):
    monkeypatch.setattr(sys, "stdin", Asked())


@pytest.mark.parametrize("loads", [load_base, empty_base])
def test_the_code_of_a_base_does_not_run_unless_it_is_trusted(
    loads, stranger, tmp_path, nobody_answers
):
    with pytest.raises(UsageError, match="--trust-remote-code"):
        loads(str(stranger))
    assert not (tmp_path / "proof").exists()
    loads(str(stranger), trust_remote_code=True)
    assert (tmp_path / "proof").exists()


def test_the_code_of_a_tokenizer_does_not_run_either(tmp_path, nobody_answers):
    base = write_base(
        tmp_path / "base",
        tokenizer={
            "tokenizer_class": "Mine",
            "auto_map": {"AutoTokenizer": [None, "tokenization_mine.Mine"]},
        },
        config={"model_type": "mine", "auto_map": {"AutoConfig": "tokenization_mine.Config"}},
    )
    code = f"open({str(tmp_path / 'proof')!r}, 'w')\n"
    (base / "tokenization_mine.py").write_text(code, encoding="utf-8")
    with pytest.raises(UsageError, match="--trust-remote-code"):
        load_tokenizer(str(base))
    assert not (tmp_path / "proof").exists()


def test_every_call_says_whether_code_is_trusted():
    loads = {"from_pretrained", "from_config", "SentenceTransformer"}
    for file in Path(loragen.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            function = getattr(node, "func", None)
            name = getattr(function, "attr", None) or getattr(function, "id", None)
            if name in loads:
                # None is `**options`, which the functions above fill.
                said = {keyword.arg for keyword in node.keywords}
                assert said & {"trust_remote_code", None}, f"{file}:{node.lineno}"


def test_every_command_that_loads_the_base_has_the_flag(stranger, tmp_path, dataset, collection):
    def run(*arguments):
        return CliRunner().invoke(app, [*map(str, arguments)], input="y\ny\ny\n")

    rows, adapter = dataset(), tmp_path / "runs"
    base = ("--base-model", stranger)
    train = ("lora", "train", "--dataset", rows, "--runs-dir", adapter, *base)
    tiny = ("max_steps=2", "batch_size=2")
    train += (*(f"--set=training.{one}" for one in tiny), "--set=loggers={}")
    merge = ("lora", "export", collection.runs["colors"], "--merge", *base)
    commands = [
        train,
        (*train, "--dry-run"),
        ("lora", "eval", "--no-adapter", "--dataset", rows, *base),
        (*merge, "--output", tmp_path / "merged"),
    ]
    for command in commands:
        refused = run(*command)
        assert refused.exit_code == 2, command
        assert "--trust-remote-code" in refused.stderr
        assert refused.stdout == ""
    assert not (tmp_path / "proof").exists()
    for command in commands:
        if command[:2] != ("lora", "export"):  # the adapter is of another base
            allowed = run(*command, "--trust-remote-code")
            assert allowed.exit_code == 0, allowed.stderr
    (run_directory,) = adapter.iterdir()
    manifest = json.loads((run_directory / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["trust_remote_code"] is True
    evaluated = ("lora", "eval", "--dataset", rows, "--adapter", run_directory)
    assert run(*evaluated).exit_code == 2  # what a run says is no leave to run code
    assert run(*evaluated, "--trust-remote-code").exit_code == 0


NESTED = "a0: &a0 [x, x, x]\n" + "".join(
    f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}, *a{n - 1}]\n" for n in range(1, 16)
)
MERGED = "a0: &a0 {x: 1, y: 2}\n" + "".join(
    f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 20)
)


@pytest.mark.parametrize("text", [NESTED, MERGED, f"seed: 1\n{NESTED}"])
def test_anchors_that_hold_each_other_are_refused_at_once(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    started = time.perf_counter()
    with pytest.raises(ConfigError, match=r"c\.yaml: more than 10,000 values") as refused:
        read_yaml(file)
    assert time.perf_counter() - started < 5
    assert len(refused.value.problems) == 1


def test_anchors_on_the_command_line_are_refused_too():
    flow = "[&a [x, x, x]"
    for number in range(1, 16):
        before = "a" if number == 1 else f"a{number - 1}"
        flow += f", &a{number} [*{before}, *{before}, *{before}]"
    with pytest.raises(UsageError, match="not YAML"):
        load(LoraTrainConfig, settings=[f"lora.target_modules={flow}]"], environment={})


def test_anchors_in_moderation_are_read(tmp_path):
    file = tmp_path / "c.yaml"
    text = "one: &one {steps: 3, rate: 0.1}\ntwo: {<<: *one, steps: 4}\nthree: [*one, *one]\n"
    file.write_text(text, encoding="utf-8")
    tree, origins = read_yaml(file)
    assert tree["two"] == {"steps": 4, "rate": 0.1}
    assert tree["three"] == [tree["one"]] * 2
    assert origins["three", 1, "rate"].startswith(f"{file}:1:")


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a, *a, *a]",
        "a: &a {b: [*a, *a], c: *a}",
        "a: &a {x: 1, " + ", ".join(["<<: *a"] * 40) + "}",
        "a: &a {x: 1, <<: [" + ", ".join(["*a"] * 40) + "]}",
    ],
)
def test_an_anchor_that_contains_itself_is_refused_at_once(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="nested deeper than 50"):
        read_yaml(file)


def test_a_rank_that_no_matrix_has_is_refused_before_it_is_allocated(lora_config, base):
    config = lora_config({"lora.rank": 100_000})
    with pytest.raises(UsageError, match=r"lora\.rank 100000: .* above 32; .* GB"):
        new_adapter(base, config)
    with pytest.raises(UsageError, match=r"lora\.rank 100000"):
        count_values(config)  # the dry run
    assert count_values(lora_config({"lora.rank": 32}))[0] > 0


def test_an_adapter_that_does_not_fit_into_memory_is_refused(
    lora_config, base, dataset, monkeypatch
):
    for place in (load_module, train_module):
        monkeypatch.setattr(place, "free_memory", lambda _: 100_000)
    config = lora_config({"lora.rank": 16})
    with pytest.raises(UsageError, match=r"lora\.rank 16: .* values.*0\.\d GB are free"):
        train_adapter(config, Dataset(dataset()), base, Silent())
    assert not next(iter(base.model.named_parameters()))[1].requires_grad


def test_the_memory_of_a_container_counts(tmp_path, monkeypatch):
    files = tmp_path / "max", tmp_path / "current"
    for file, number in zip(files, (3000, 1000), strict=True):
        file.write_text(f"{number}\n")
    monkeypatch.setattr(load_module, "CGROUP_FILES", (files,))
    assert load_module.free_memory() == 2000
    files[0].write_text("max\n")
    assert load_module.free_memory() > 2000


@pytest.mark.parametrize("key", ["batch_size", "max_steps"])
def test_numbers_that_would_be_lists_beyond_memory_are_refused(key):
    with pytest.raises(ConfigError, match=rf"training\.{key}: .*less than or equal to"):
        load(LoraTrainConfig, settings=[f"training.{key}=1000000000"], environment={})


class Runs:
    """What pickle would make into a file called `proof`."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return Path.touch, (self.proof,)


def test_weights_that_may_run_code_are_refused_without_advice_to_load_them(tmp_path):
    base = write_base(tmp_path / "base")
    (base / "model.safetensors").unlink()
    torch.save({"weight": Runs(tmp_path / "proof")}, base / "pytorch_model.bin")
    with pytest.raises(LoragenError) as error:
        load_base(str(base))
    assert str(error.value).endswith("loading them may run code")
    assert not (tmp_path / "proof").exists()
