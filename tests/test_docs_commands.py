"""What the pages show can be done: every command is run, on stand-ins for models and data of the
names that it has, or its block says what it needs; and every error that they explain exists."""

import ast
import re
import shlex
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from loragen.cli.main import app
from tests.conftest import ANIMALS, COLORS, configured, rows_of, write_lines
from tests.core.base.gguf_files import write_gguf

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/README.md")),
    *(page for page in sorted(ROOT.glob("docs/*.md")) if page.name != "plugin-api.md"),
    ROOT / "docs" / "configuration" / "index.md",
    *sorted(ROOT.glob("examples/*/*.md")),
]
BLOCK = re.compile(r"^```(bash|powershell)(?: title=\"([^\"]*)\")?\n(.*?)^```$", re.M | re.S)
SHELL = ("cd", "export", "make")
"""What stands beside commands of loragen. `make test` is what runs this."""


@dataclass(frozen=True)
class Block:
    page: Path
    number: int
    """Of its page."""
    needs: str
    lines: tuple[str, ...]

    def __str__(self):
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.number}"


def blocks_of(page):
    for number, (_, needs, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1):
        lines = re.sub(r"\\\n\s*", "", text).splitlines()
        yield Block(page, number, needs, tuple(line for line in lines if line.strip()))


BLOCKS = [block for page in PAGES if ".zh-CN" not in page.name for block in blocks_of(page)]


def words_of(line):
    return shlex.split(line.removeprefix("exec "), comments=True)


# ---------------------------------------------------------------------------- what is shown


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_has_commands_that_exist_or_says_what_it_needs(block):
    assert not block.needs or block.needs.startswith("needs ")
    for line in block.lines:
        words = words_of(line)
        if not words:  # a comment
            continue
        if "loragen" in words:
            parse(words[words.index("loragen") + 1 :])
        elif words[0].endswith("python") and words[1:] and words[1].endswith(".py"):
            options_of_script(words)
        else:
            assert block.needs or words[0] in SHELL, line


def test_a_command_is_in_a_block_that_says_bash():
    for page in PAGES:
        for info, text in re.findall(
            r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S
        ):
            if not info.startswith(("bash", "powershell")):
                assert not re.search(r"^(\$ )?(loragen|pip) ", text, re.MULTILINE), (
                    f"{page}: {text}"
                )


def parse(words):
    """Raises what the command line raises for a command or an option that does not exist."""
    command, path = get_command(app), []
    while hasattr(command, "commands"):
        assert words and words[0] in command.commands, words
        path.append(words[0])
        command, words = command.commands[words[0]], words[1:]
    if ">" in words:
        words = words[: words.index(">")]
    command.make_context(" ".join(path), words)


def options_of_script(words):
    script = ROOT / words[1]
    if "convert_lora_to_gguf" in script.name:  # llama.cpp's
        return
    text = script.read_text(encoding="utf-8")
    for word in words:
        if word.startswith("--"):
            assert f'"{word}"' in text, word


def test_the_chinese_pages_show_the_same_commands():
    for page in ROOT.rglob("*.zh-CN.md"):
        english = page.with_name(page.name.replace(".zh-CN", ""))
        shown = [
            [[words_of(line) for line in block.lines] for block in blocks_of(one)]
            for one in (page, english)
        ]
        assert shown[0] == shown[1], page


def test_a_command_in_the_text_exists():
    for page in PAGES:
        for text in re.findall(r"`loragen ([a-z][^`]*)`", page.read_text(encoding="utf-8")):
            command, words = get_command(app), shlex.split(text)
            while words and hasattr(command, "commands"):
                assert words[0] in command.commands, f"{page.name}: {text}"
                command, words = command.commands[words[0]], words[1:]
            command.make_context("loragen", words, resilient_parsing=True)


# ---------------------------------------------------------------------------- what runs

DATASETS = (
    "arc-challenge", "arc-easy", "boolq", "hellaswag", "openbookqa", "piqa", "winogrande"
)  # fmt: skip
LORA = {
    "TRAINING__MAX_STEPS": "3",
    "TRAINER__ACCELERATOR": "cpu",
    "LOGGERS": "{}",
}
GENERATOR = {
    "BEHAVIOUR__BATCH_SIZE": "2",
    "BEHAVIOUR__MAX_STEPS": "2",
    "DATA__PROMPTS_PER_CONDITION": "3",
    "ENCODER__BATCH_SIZE": "4",
    "LAYOUT__TOKEN_DIM": "16",
    "LOGGERS": "{}",
    "TRAINER__ACCELERATOR": "cpu",
    "TRAINING__MAX_EPOCHS": "1",
    "TRAINING__VAL_ROWS": "2",
}


class World:
    """What the commands name, made when one names it, from parts made once."""

    def __init__(self, home, base, sbert):
        self.home, self.base, self.sbert = home, base, sbert
        self.data = home / "data_to_lora" / "cs"

    def rows(self, name=DATASETS[0], count=40):
        """Those of a dataset, whose answers no other one has all of."""
        words, first = (*COLORS, *ANIMALS), DATASETS.index(name)
        answers = [words[(first + i) % len(words)] for i in range(3)]
        return rows_of(answers, count=count, dataset=name)

    def dataset(self, name, root):
        for split, count in (("train", 40), ("test", 10)):
            write_lines(root / name / f"{name}_{split}_formatted.jsonl", self.rows(name, count))

    @cache  # noqa: B019  # it lives as long as the module's tests
    def run(self, name, steps=4):
        """A run of `lora train` of so many steps."""
        from loragen.core.base.load import load_base
        from loragen.core.config import LoraTrainConfig
        from loragen.core.data.dataset import Dataset
        from loragen.core.lora.train import train_adapter
        from loragen.core.progress import Silent

        self.dataset(name, self.data)
        settings = {
            "base_model": str(self.base),
            "data.max_length": 64,
            "lora.rank": 2,
            "loggers": {},
            "runs_dir": str(self.home / f"runs-{steps}"),
            "trainer.accelerator": "cpu",
            "training.batch_size": 4,
            "training.max_steps": steps,
            "checkpoints.first_step": min(steps - 1, 76),
        }
        file = self.data / name / f"{name}_train_formatted.jsonl"
        config = configured(LoraTrainConfig, settings)
        trained = train_adapter(config, Dataset(file, name), load_base(str(self.base)), Silent())
        return trained.directory

    @cache  # noqa: B019
    def experiment(self):
        from loragen.core.config import GenTrainConfig
        from loragen.core.learning.train import train
        from loragen.core.progress import Silent

        settings = {
            "sources": [{"run": str(self.run(name))} for name in DATASETS[:2]],
            "encoder.model": str(self.sbert),
            "decoder.blocks": 1,
            "decoder.hidden_dim": 16,
            "decoder.rank": 4,
            "layout.token_dim": 16,
            "data.prompts_per_condition": 3,
            "data.cache_dir": str(self.home / "cache"),
            "training.objective": "reconstruction",
            "training.max_epochs": 1,
            "experiments_dir": str(self.home / "experiments"),
            "loggers": {},
            "trainer.accelerator": "cpu",
        }
        return train(configured(GenTrainConfig, settings), Silent()).directory

    def make(self, name, work, block):
        """Puts what a word of a block's command names into the working directory."""
        place = work / name
        if place.exists() or name.startswith(("-", "/")) or "=" in name:
            return
        parts = Path(name).parts
        if name in DATASETS:
            for root in ("data_to_lora/cs", "data"):
                self.dataset(name, work / root)
        elif name in ("demo-out/data/color-word/test.jsonl", "FILE") or name.endswith(
            (".jsonl", ".csv", ".txt")
        ):
            self.file(name, place)
        elif parts[:2] == ("data_to_lora", "cs") and len(parts) > 2:
            self.dataset(parts[2], work / "data_to_lora" / "cs")
        elif parts[0] == "runs":
            named = [one for one in DATASETS if f"--source {one}" in "".join(block.lines)]
            sources = named or DATASETS[:3]
            names = [parts[1].replace("*", "20260101_120000")] if parts[1:] else sources
            steps = 125 if "checkpoint-step-1" in "".join(block.lines) else 4
            for run, source in zip(names, sources, strict=False):
                source = next((one for one in DATASETS if run.startswith(one)), source)
                if not (work / "runs" / run).exists():
                    shutil.copytree(self.run(source, steps), work / "runs" / run)
        elif name in ("my-adapter", "ADAPTER"):
            shutil.copytree(self.run(DATASETS[0]) / "adapter", place)
        elif name == "RUN" or (parts[:1] == ("experiments",) and parts[1:]):
            shutil.copytree(self.experiment(), place)
        elif name.rstrip("/") == "experiments":
            self.old_experiments(work)
        elif name == "generator_model.pt":
            shutil.copy(self.experiment() / "results" / "final_model" / name, place)
        elif name in ("DIRECTORY", "./my-base", "./Qwen2.5-0.5B-Instruct"):
            shutil.copytree(self.base, place)
        elif name == "training_config.yaml":
            place.write_text(f"model:\n  name: '{self.base}'\nlora: {{lora_alpha: 4}}\n")
        elif name.endswith(".gguf"):
            write_gguf(self.base, place)
        elif name == "x.pt":
            saved = torch.load(
                next(self.run(DATASETS[0]).glob("checkpoints/*4.ckpt")), weights_only=True
            )
            torch.save(saved["state_dict"], place)

    def file(self, name, place):
        if name.endswith(".csv"):
            place.write_text("prompt,response\n" + "a question?,red\n" * 12, encoding="utf-8")
        elif name.endswith(".txt"):
            place.write_text("What is red?\nWhat is blue?\n" * 40, encoding="utf-8")
        else:
            write_lines(place, self.rows())

    def old_experiments(self, work):
        from tests.legacy.runs import write_checkpoint

        for name in DATASETS[:3]:
            folder = work / "experiments" / "old" / name / "old_20250720_143052_lora"
            for part in ("models", "checkpoints", "logs"):
                (folder / part).mkdir(parents=True)
            self.dataset(name, work / "data_to_lora" / "cs")
            for file in sorted(self.run(name).glob("checkpoints/*.ckpt")):
                document = torch.load(file, weights_only=True)
                write_checkpoint("torch", folder / "checkpoints", document, self.base)


@pytest.fixture(scope="module")
def world(base_dir, sbert_dir, tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), base_dir, sbert_dir)


def missing_package(line):
    """What a command needs that may not be installed."""
    wanted = {"--launcher ray": "ray", "loggers.mlflow": "mlflow", "loggers.trackio": "trackio"}
    return next((package for text, package in wanted.items() if text in line), None)


RUN = [
    block
    for block in BLOCKS
    if not block.needs and any(line.startswith("loragen ") for line in block.lines)
]


@pytest.mark.parametrize("block", RUN, ids=str)
def test_the_commands_of_a_block_run_one_after_the_other(block, world, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The default base is a name of the hub, and here a directory.
    shutil.copytree(world.base, work / "Qwen" / "Qwen2.5-0.5B-Instruct")
    for line in block.lines:
        words = words_of(line)
        if words[:1] != ["loragen"]:
            continue
        if package := missing_package(line):
            pytest.importorskip(package, reason=f"{package} is not installed")
        run(world, work, block, line, monkeypatch)


def run(world, work, block, line, monkeypatch):
    words = words_of(line)
    outputs = [words[i + 1] for i, word in enumerate(words) if word in ("--output", "-o", ">")]
    if "--all" in words:
        for name in ("arc-easy", "boolq"):
            world.make(name, work, block)
    for word in words[1:]:
        if word not in outputs:
            for one in (word, word.rpartition("=")[2], word.rpartition(":")[0]):
                if one:
                    world.make(one, work, block)
    # As the shell does it.
    found = [sorted(Path().glob(word)) if "*" in word else [word] for word in words]
    words = [str(one) for several in found for one in several]
    into = words[words.index(">") + 1] if ">" in words else None
    arguments = words[1 : words.index(">")] if into else words[1:]
    settings = {"lora": LORA, "gen": GENERATOR}.get(arguments[0], {})
    if arguments[1:2] != ["train"] or "--resume" in arguments:
        settings = {}
    for name in outputs:  # the lines of a block may be alternatives
        shutil.rmtree(work / name, ignore_errors=True)
    with monkeypatch.context() as patched:
        for key, value in settings.items():
            patched.setenv(f"LORAGEN_{key}", value)
        if settings is GENERATOR and "encoder.name=" not in line:
            patched.setenv("LORAGEN_ENCODER__MODEL", str(world.sbert))
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, f"{line}\n{result.output}"
    if into:
        Path(into).write_text(result.stdout, encoding="utf-8")


# ---------------------------------------------------------------------------- what is explained


@cache
def literals():
    """Every text of the sources; what differs in an f-string is `…`."""
    found = []
    for file in (ROOT / "loragen").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "…") for part in node.values]
                found.append("".join(part if isinstance(part, str) else "…" for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def explained(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_error_that_is_explained_exists():
    messages = explained("errors.md")
    assert len(messages) > 30
    for message in messages:
        pattern = ".*".join(map(re.escape, message.split("…")))
        assert any(re.search(pattern, text) for text in literals()), message
    assert explained("errors.zh-CN.md") == messages
