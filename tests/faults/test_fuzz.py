"""Random bytes and damaged valid files into every command that reads a file.

Whatever is in a file, a command ends with 0, 1 or 2, says in one line what is wrong, leaves nothing
behind and its inputs as they were, and takes seconds. A few inputs are tried in the ordinary tests;
`make fuzz` tries thousands, and keeps one of each kind that fails in `fuzz-failures`.
"""

import io
import json
import os
import re
import shutil
import signal
import sys
import warnings
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from typer.main import get_command

import loragen
from loragen.cli.main import app
from loragen.core.config import GenTrainConfig, LoraTrainConfig, dump
from loragen.testing.adapters import peft_adapter
from tests.conftest import COLORS, TINY_LORA, configured, generator_settings, rows_of, write_lines
from tests.faults.damage import damaged
from tests.legacy.runs import write_legacy_run

INPUTS = int(os.environ.get("FUZZ", "0"))
"""How many to try in all, as `make fuzz` does; 0: a few."""
SECONDS = 30
"""Of processor time, the most for one command; with a busy disk and cold imports."""
MEMORY = 4 * 2**30
"""The most bytes of address space beyond what is in use: what asks for more is to fail, not to end
the machine."""
FAILURES = Path("fuzz-failures").absolute()


COMMAND = get_command(app)
"""Made once, which takes as long as some commands."""
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029]")
ALLOWED = ("out", "runs", "cache", ".loragen-cache")
"""What commands that succeed may write."""
OLD = "training: {batch_size: 16, max_steps: 125, stage1_steps: 75, learning_rate_stage1: 2.0e-4}\n"
OLD_GENERATOR = """\
model: {text_encoder_name: all-MiniLM-L6-v2, hidden_dim: 384, num_hyperconv_blocks: 2}
training: {max_epochs: 100, learning_rate: 1e-4, mse_weight: 1.0, optimizer_type: AdamW}
"""


@dataclass(frozen=True)
class Case:
    """A file that is damaged, and a command line that reads it."""

    file: str
    command: str

    def __str__(self):
        return f"{self.file}: loragen {self.command}"


PREVIEW = "data preview {} --base-model base"
DRY_LORA = "lora train --dry-run --config lora.yaml --dataset"
DRY_GEN = "gen train --dry-run --config gen.yaml"
INFER = "gen infer --model experiment --output"
OF_RUN = (
    "ckpt analyze run",
    "ckpt test run",
    "ckpt lines run --step 8",
    "lora export run --output out",
)
ROWS = (
    PREVIEW,
    f"{DRY_LORA} {{}}",
    "data prepare --source {} --output out --samples-per-prompt 2",
    f"{INFER} out --prompt-file {{}} --limit 3",
)
EVALUATE = "lora eval --dataset rows.jsonl --limit 2 --base-model base"
EVAL_GENERATOR = "gen eval --model experiment --dataset nowhere.jsonl"
EXPORT_OLD = "lora export old/checkpoints/step_008.pt --output out"
OF_ADAPTER = ("ckpt analyze {}", "ckpt test {}", "lora export {} --output out")
PREPARE = (
    "data prepare --source colors.jsonl --source animals.jsonl --output prepared "
    "--samples-per-prompt 2"
)
LAST = "experiment/checkpoints/last.ckpt"
GROUPS = {
    "rows": [
        Case(file, command.format(file))
        for file in ("rows.jsonl", "rows.json", "rows.csv", "choices.jsonl", "messages.jsonl")
        for command in ROWS
    ]
    + [Case("prompts.txt", f"{INFER} out --prompt-file prompts.txt --per line")]
    + [Case("colors.jsonl", "data uses colors.jsonl:2 --run run")],
    "settings": [
        *(Case("lora.yaml", f"{c} lora.yaml") for c in ("config validate", "config migrate")),
        Case("lora.yaml", "config show lora --config lora.yaml"),
        Case("lora.yaml", f"{DRY_LORA} rows.jsonl"),
        Case("gen.yaml", "config validate gen.yaml"),
        Case("gen.yaml", DRY_GEN),
        *(Case("old.yaml", f"config {c} old.yaml") for c in ("validate", "migrate")),
        Case("old-generator.yaml", "config migrate old-generator.yaml"),
        Case("world.yaml", "demo --world world.yaml --output full"),
    ],
    "adapters": [
        Case(f"{folder}/{file}", command.format(folder))
        for folder in ("adapter", "generated")
        for file in ("adapter_config.json", "adapter_model.safetensors")
        for command in (*OF_ADAPTER, f"{EVALUATE} --adapter {{}}")
    ]
    + [
        *(Case("one.safetensors", command.format("one.safetensors")) for command in OF_ADAPTER),
        Case("one.safetensors", f"{EVALUATE} --adapter one.safetensors"),
        Case("adapter/adapter_model.safetensors", "lora export adapter --output out --merge"),
        Case("adapter/README.md", "lora export adapter --output out"),
    ],
    "checkpoints": [
        Case("run/checkpoints/checkpoint-step-008.ckpt", command.format(point))
        for point in ("run", "run/checkpoints/checkpoint-step-008.ckpt")
        for command in (*OF_ADAPTER, f"{EVALUATE} --adapter {{}}", "ckpt lines {} --step 8")
    ]
    + [
        Case("run/checkpoints/checkpoint-step-008.ckpt", DRY_GEN),
        Case("stopped/checkpoints/checkpoint-step-006.ckpt", "lora train --resume stopped"),
        Case("old/checkpoints/step_008.pt", "ckpt convert old --output out --base-model base"),
        Case("old/checkpoints/step_008.pt", f"{EXPORT_OLD} --alpha 4 --base-model base"),
    ],
    "runs": [
        *(Case("run/manifest.json", command) for command in OF_RUN),
        Case("run/manifest.json", DRY_GEN),
        Case("run/manifest.json", "data uses colors.jsonl:2 --run run"),
        *(Case("run/metrics.jsonl", command) for command in OF_RUN[:1]),
        *(
            Case(f"stopped/{file}", f"lora train --resume stopped{dry}")
            for file in ("manifest.json", "config.yaml")
            for dry in (" --dry-run",)
        ),
        Case("stopped/metrics.jsonl", "lora train --resume stopped"),
        Case("experiment/manifest.json", "gen train --resume experiment --dry-run"),
        Case("experiment/config.yaml", "gen train --resume experiment --dry-run"),
        Case("old/training_config.yaml", "ckpt convert old --output out"),
        Case("old/logs/checkpoint_mapping_colors.json", "ckpt convert old --output out"),
        Case("prepared/prepared.json", f"{DRY_GEN} --prompts prepared"),
        Case("prepared/train_prompts.jsonl", f"{DRY_GEN} --prompts prepared"),
        Case("prepared/prepared.json", f"{PREPARE} --force"),
        Case("generated/README.md", f"{INFER} generated --prompt a --force"),
        Case("evaluated/results.json", f"{EVAL_GENERATOR} --output evaluated --force"),
    ],
    "generators": [
        *(
            Case(f"experiment/{file}", f"{INFER} out --prompt a --prompt b")
            for file in (
                "results/final_model/generator_model.pt",
                "results/final_model/generator_model.pt",
                "manifest.json",
            )
        ),
        Case(
            "experiment/checkpoints/last.ckpt",
            f"{INFER.replace('experiment', LAST)} out --prompt a",
        ),
        Case("experiment/checkpoints/last.ckpt", "gen train --resume experiment --dry-run"),
        *(
            Case(f"encoder/{file}", f"{INFER} out --prompt a")
            for file in ("config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json")
        ),
    ],
    "bases": [
        Case(f"base/{file}", command)
        for file in (
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "generation_config.json",
        )
        for command in (
            PREVIEW.format("rows.jsonl"),
            f"{DRY_LORA} rows.jsonl",
            f"{EVALUATE} --no-adapter",
        )
    ]
    + [
        Case("base/model.safetensors", f"{EVALUATE} --no-adapter"),
        Case("base/chat_template.jinja", PREVIEW.format("messages.jsonl")),
        Case("model.gguf", "data preview rows.jsonl --base-model model.gguf"),
    ],
}


# ---------------------------------------------------------------------------- valid files


def _write_work(place, collection, sbert_dir):
    """Fills a directory with every kind of file, all valid, which refer to one another."""
    from loragen.core.learning.train import train
    from loragen.core.outputs import with_record
    from loragen.core.progress import Silent

    rows = rows_of(COLORS)
    write_lines(place / "rows.jsonl", [{**row, "system": "Be short."} for row in rows])
    (place / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    lines = [f"{row['prompt']},{row['response']}\n" for row in rows]
    (place / "rows.csv").write_text("prompt,response\n" + "".join(lines), encoding="utf-8")
    write_lines(place / "choices.jsonl", rows_of(COLORS, choices=[*COLORS]))
    turns = [("user", "prompt"), ("assistant", "response")]
    talks = [[{"role": role, "content": row[key]} for role, key in turns] * 2 for row in rows]
    write_lines(place / "messages.jsonl", [{"messages": messages} for messages in talks])
    for name in collection.names:
        shutil.copy(collection.file(name), place / f"{name}.jsonl")
    (place / "prompts.txt").write_text("What?\nWhere is it?\n", encoding="utf-8")

    shutil.copytree(collection.base, place / "base")
    (place / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(64))
    shutil.copytree(sbert_dir, place / "encoder")
    for name, run in collection.runs.items():
        shutil.copytree(run, place / ("run" if name == "colors" else "other"))
    stopped = shutil.copytree(place / "run", place / "stopped")
    for step in (7, 8):
        (stopped / "checkpoints" / f"checkpoint-step-00{step}.ckpt").unlink()
    manifest = json.loads((stopped / "manifest.json").read_text(encoding="utf-8"))
    manifest |= {"status": "interrupted", "steps": [5, 6]}
    (stopped / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    peft_adapter(place / "adapter", place / "base", use_rslora=True)
    (place / "old").mkdir()
    legacy = write_legacy_run(collection, place)
    shutil.rmtree(place / "old")
    legacy.rename(place / "old")
    shutil.rmtree(place / "experiments")

    sources = [{"run": str(place / name)} for name in ("run", "other")]
    learned = generator_settings(collection, place / "encoder", place) | {
        "sources": sources,
        "training.max_epochs": 1,
        "data.val_ratio": 0.0,
    }
    trained = train(configured(GenTrainConfig, learned), Silent()).directory
    trained.rename(place / "experiment")
    for command in (
        f"{INFER} generated --prompt a",
        f"{INFER} one.safetensors --prompt a",
        PREPARE,
    ):
        result = _invoke(command)
        assert result.exit_code == 0, result.stderr
    (place / "evaluated").mkdir()
    (place / "evaluated" / "results.json").write_text("{}", encoding="utf-8")
    text = with_record("# Results", place / "evaluated")
    (place / "evaluated" / "results.md").write_text(text, encoding="utf-8")
    (place / "full").mkdir()
    (place / "full" / "notes.txt").write_text("mine", encoding="utf-8")

    ours = {**TINY_LORA, "base_model": "base", "runs_dir": "runs"}
    for name, config in (
        ("lora", configured(LoraTrainConfig, ours)),
        ("gen", configured(GenTrainConfig, learned)),
    ):
        (place / f"{name}.yaml").write_text(dump(config), encoding="utf-8")
    shutil.copy(Path(loragen.__file__).parent / "demo" / "world.yaml", place)
    (place / "old.yaml").write_text(OLD, encoding="utf-8")
    (place / "old-generator.yaml").write_text(OLD_GENERATOR, encoding="utf-8")


def _seen(place):
    """{path: what tells whether the file has been written to}"""
    found = {}
    for folder, _, names in os.walk(place):
        found[folder] = None
        for name in names:
            path = f"{folder}/{name}"
            stat = os.lstat(path)
            found[path] = (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    return found


class Work:
    """The directory with the files; whatever a command has done to it is undone."""

    def __init__(self, home):
        self.place, self._valid = home / "work", home / "valid"
        shutil.copytree(self.place, self._valid)

    def content(self, file):
        return (self._valid / file).read_bytes()

    @contextmanager
    def damaged(self, file, content):
        """With other content in one file. Yields a function that returns the paths that have been
        made, changed or removed since."""
        path = self.place / file
        path.write_bytes(content)
        before = _seen(self.place)

        def changed():
            after = _seen(self.place)
            return sorted(
                str(Path(one).relative_to(self.place))
                for one in before.keys() | after.keys()
                if before.get(one, 0) != after.get(one, 0)
            )

        try:
            yield changed
        finally:
            if changed():
                for one in self.place.iterdir():  # the directory itself is the current one
                    shutil.rmtree(one) if one.is_dir() else one.unlink()
                shutil.copytree(self._valid, self.place, dirs_exist_ok=True)
            else:
                path.write_bytes(self.content(file))


@pytest.fixture(scope="module")
def work(collection, sbert_dir, tmp_path_factory):
    home = tmp_path_factory.mktemp("fuzz")
    (home / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home / "work")
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        _write_work(home / "work", collection, sbert_dir)
        yield Work(home)


# ---------------------------------------------------------------------------- the invariant


class TooLongError(BaseException):
    """A command has taken too much processor time."""


@contextmanager
def _bounded():
    """Ends what takes too long or too much memory."""
    if sys.platform == "win32":
        yield
        return

    def stop(*_):
        raise TooLongError

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with _limited_memory():
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def _limited_memory():
    """Not where CUDA reserves addresses by the hundred gigabytes, and where there is no limit."""
    import torch

    if sys.platform != "linux" or torch.cuda.is_available():
        yield
        return
    import resource

    limits = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    stderr: str


def _invoke(command):
    """Runs a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        warnings.catch_warnings(),  # as outside of the tests, where a warning is no error
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        warnings.simplefilter("ignore")
        try:
            code = COMMAND.main(command.split(), prog_name="loragen") or 0
        except SystemExit as end:
            code = end.code
    return Result(code, out.getvalue(), err.getvalue())


def check(work, case, content):
    """Raises AssertionError if the command does not keep what the module promises."""
    with work.damaged(case.file, content) as changed:
        with _bounded():
            try:
                result = _invoke(case.command)
            except TooLongError:
                raise AssertionError(f"takes more than {SECONDS} s") from None
            except BaseException as error:  # a panic of a library in Rust is no Exception
                raise AssertionError(f"raises {type(error).__name__}: {error}") from error
        text = result.stderr
        assert result.exit_code in (0, 1, 2), f"exit code {result.exit_code}: {text}"
        assert "Traceback" not in text, text
        assert "--debug shows where" not in text, text
        assert not (found := CONTROLS.search(text)), f"{found[0]!r} in {text!r}"
        errors = re.findall(r"^error: .*\n", text, re.MULTILINE)
        answered = result.exit_code == 1 and result.stdout  # as of a tensor that is not finite
        failed = bool(errors) or bool(answered)
        assert failed == bool(result.exit_code), f"exit code {result.exit_code}: {text}"
        assert text.endswith("".join(errors)), f"an error is not one line: {text}"
        allowed = ALLOWED if result.exit_code == 0 else ()
        if "--resume" in case.command and "--dry-run" not in case.command:
            allowed = (*allowed, "stopped")  # the run that it goes on with
        if case.command.endswith("--force") and result.exit_code == 0:
            allowed = (*allowed, "prepared", "generated")
        left = [one for one in changed() if not one.startswith(allowed) or ".unfinished" in one]
        assert not left, f"exit code {result.exit_code}, and left: {left}; {text}"


# ---------------------------------------------------------------------------- the tests


@pytest.mark.parametrize("group", GROUPS)
def test_whatever_is_in_a_file(work, group):
    failures = {}

    @settings(
        max_examples=INPUTS // len(GROUPS) or 8,
        derandomize=not INPUTS,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate],  # making a failing input smaller takes minutes
    )
    @given(st.data())
    def try_one(data):
        case = data.draw(st.sampled_from(GROUPS[group]))
        content = data.draw(damaged(case.file, work.content(case.file)))
        try:
            check(work, case, content)
        except AssertionError as error:
            if not INPUTS:
                raise
            failures.setdefault(_kind(case, error), (case, content, str(error)))

    try_one()
    for number, (case, content, text) in enumerate(failures.values()):
        FAILURES.mkdir(exist_ok=True)
        (FAILURES / f"{group}-{number}-{Path(case.file).name}").write_bytes(content)
        (FAILURES / f"{group}-{number}.txt").write_text(f"{case}\n{text}\n", encoding="utf-8")
    assert not failures, f"{len(failures)} kinds, in {FAILURES}:\n" + "\n".join(
        f"{case}: {text[:300]}" for case, _, text in failures.values()
    )


def _kind(case, error):
    """What the failures of one fault have in common."""
    return re.sub(r"'.*?'|\d+|[^\w ]", "", str(error).partition("\n")[0])[:80]


def test_valid_files_are_read(work):
    """Otherwise the inputs above would fail for another reason than their damage."""
    odd = []
    for case in dict.fromkeys(case for group in GROUPS.values() for case in group):
        with work.damaged(case.file, work.content(case.file)):
            result = _invoke(case.command)
        refused = case.command.startswith(("demo", "gen eval"))  # these would take too long
        if ".gguf" not in case.file and result.exit_code != (2 if refused else 0):
            odd.append(f"{case}: {result.stderr}")
    assert not odd, "\n".join(odd)
