"""What TAB offers, as the shells ask for it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loragen.cli.main import app
from loragen.core.config import load
from loragen.core.config.schema import MODELS
from tests.processes import HEAVY


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A directory with two datasets, a run and an experiment."""
    monkeypatch.chdir(tmp_path)
    for name, split in (("arc", "train"), ("boolq", "train"), ("boolq", "test")):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / name / f"{split}.jsonl").touch()
    for place, kind in (("runs/arc_lora_1", "lora"), ("experiments/gen_1", "generator")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "manifest.json").write_text(json.dumps({"kind": kind}))
    (tmp_path / "team" / "qa").mkdir(parents=True)
    (tmp_path / "team" / "qa" / "entry.json").touch()
    (tmp_path / "runs" / "torn").mkdir()
    (tmp_path / "runs" / "torn" / "manifest.json").write_text("{")
    (tmp_path / "c.yaml").write_text("data: {root: data}\n", encoding="utf-8")
    return tmp_path


def completed(line):
    """What fish would offer for a line that ends here."""
    asked = {
        "_LORAGEN_COMPLETE": "complete_fish",
        "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "_TYPER_COMPLETE_ARGS": f"loragen {line}",
    }
    result = CliRunner().invoke(app, [], env=asked, prog_name="loragen")
    assert result.exit_code == 0, result.output
    return [one.partition("\t")[0] for one in result.stdout.splitlines() if one]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lora train --data-root data --dataset ", ["arc", "boolq"]),
        ("lora train --data-root data --dataset bo", ["boolq"]),
        ("lora train --config c.yaml --dataset a", ["arc"]),
        ("lora eval --data-root data --dataset ", ["boolq"]),  # its test split
        ("lora train --dataset ", []),  # no default root here: the shell completes files
        ("data preview --data-root data a", ["arc"]),
        ("lora train --resume ", ["runs/arc_lora_1"]),
        ("gen train --resume ", ["experiments/gen_1"]),
        ("gen infer --model ", ["experiments/gen_1"]),
        ("runs show ", ["runs/arc_lora_1", "experiments/gen_1"]),
        ("runs compare runs/arc_lora_1 exp", ["experiments/gen_1"]),
        ("lora eval --adapter runs/a", ["runs/arc_lora_1"]),
        ("lora export r", ["runs/arc_lora_1"]),
        ("ckpt analyze ", ["runs/arc_lora_1"]),
        ("library add team r", ["runs/arc_lora_1"]),
        ("library get team ", ["qa"]),
        ("library copy team other q", ["qa"]),
        ("lora train --runs-dir elsewhere --resume ", []),
        ("plugins show sch", ["schedule"]),
        ("plugins show decoder mi", ["mixture"]),
        ("plugins new x --kind ob", ["objective"]),
        ("lora train --set training.ba", ["training.batch_size=", "training.batch_size=32"]),
        ("lora train --set training.max", ["training.max_steps=", "training.max_steps=125"]),
        ("lora train --set training.packing=t", ["training.packing=true"]),
        ("gen train --set training.optimizer=a",
         ["training.optimizer=adamw", "training.optimizer=adam"]),
        ("gen train --set decoder.name=a", ["decoder.name=auto"]),
        ("gen train --set training.objective=tr", ["training.objective=transfer"]),
        ("config show gen --set encoder.name=sb", ["encoder.name=sbert"]),
        ("gen train --set loggers.tens", ["loggers.tensorboard=", "loggers.tensorboard={}"]),
        ("lora train --set nonsense", []),
    ],
)  # fmt: skip
def test_what_is_offered(work, line, offered):
    assert completed(line) == offered


@pytest.mark.parametrize("command", ["lora", "gen"])
def test_every_offered_setting_is_one(work, command):
    """All keys at once, each with its first value: the defaults, where nothing else is known."""
    offered = [one for one in completed(f"{command} train --set ") if one.endswith("=")]
    assert len(offered) > 30
    assert "schedule.name=" in offered
    given = []
    for key in offered:
        values = completed(f"{command} train --set {key}")
        if key != "schedule.name=":  # the options offered are those of the default
            given += values[:1]
    load(MODELS[command], settings=given, environment={})


def test_it_imports_nothing_heavy(work):
    code = (
        "import sys\nsys.argv[0] = 'loragen'\nfrom loragen.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    for line in (
        "gen train --set ",
        "lora train --data-root data --dataset ",
        "gen infer --model ",
    ):
        asked = {
            "_LORAGEN_COMPLETE": "complete_zsh",
            "_TYPER_COMPLETE_ARGS": f"loragen {line}",
        }
        result = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **asked},
            capture_output=True,
            text=True,
            check=True,
        )
        assert result.stdout.startswith("_arguments"), line
        assert result.stderr == "[]\n", line


def test_bash_itself(work):
    """It splits words at every `=` and replaces the last piece alone."""
    bash, script = shutil.which("bash"), Path(sys.executable).with_name("loragen")
    if not bash or not script.exists():
        pytest.skip("bash or the script is not here")
    lines = [
        ["lora", "train", "--set", "schedule.name", "=", "tw"],
        ["lora", "train", "--set", "seed", "=", "3", "--set", "training.packing", "="],
        ["lora", "train", "--data-root", "=", "data", "--dataset", "=", "b"],
        ["lora", "train", "--resume", "ru"],
    ]
    calls = [
        f"COMP_WORDS=(loragen {' '.join(line)}); COMP_CWORD={len(line)}; "
        'COMPREPLY=(); _loragen_completion loragen; echo "${COMPREPLY[*]}"'
        for line in lines
    ]
    source = 'eval "$(_LORAGEN_COMPLETE=source_bash loragen)"\n' + "\n".join(calls)
    path = f"{script.parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [bash, "--norc", "-c", source],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.splitlines() == ["two-stage", "true false", "boolq", "runs/arc_lora_1"]
