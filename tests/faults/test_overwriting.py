"""Nothing is deleted or overwritten that loragen has not written, with `--force` or without."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from loragen.core.adapter.files import read_adapter
from loragen.core.errors import UsageError
from loragen.core.files import sha256
from loragen.core.outputs import (
    check_writable,
    is_sealed,
    recorded,
    refuse_existing,
    refuse_input,
    with_record,
    written_directory,
)
from loragen.demo.world import WORLD_FILE, prepare_demo
from tests.conftest import rows_of, write_lines

PROMPT = ("--prompt", "Question 1 about red?")


def content(directory):
    """{path: hash} of everything below a directory, or of the one file."""
    files = [directory] if directory.is_file() else sorted(directory.rglob("*"))
    return {file: sha256(file) for file in files if file.is_file()}


@pytest.fixture
def keeps(loragen):
    """`keeps(path, ...)` runs a command that has to be refused, and leaves `path` as it is."""

    def run(path, *arguments):
        before = content(path)
        result = loragen(*arguments)
        assert result.exit_code == 2, result.output
        (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
        assert content(path) == before
        return error.removeprefix("error: ")

    return run


def own_and_foreign(directory):
    """Puts files of somebody else into an output of ours."""
    (directory / ".git" / "refs").mkdir(parents=True)
    (directory / ".git" / "refs" / "main").write_text("abc", encoding="utf-8")
    (directory / "sub").mkdir()
    for name in ("notes.txt", "sub/thesis.tex", "eval.json"):
        (directory / name).write_text("years of work", encoding="utf-8")
    return (
        content(directory / ".git") | content(directory / "sub") | content(directory / "eval.json")
    )


# ---------------------------------------------------------------------------- adapters, models


@pytest.mark.parametrize("merge", [(), ("--merge",)], ids=["adapter", "merged"])
def test_force_replaces_the_files_of_an_export_and_keeps_the_rest(loragen, run, tmp_path, merge):
    out = tmp_path / "d"
    export = ("lora", "export", run, "--output", out, "--force", *merge)
    assert loragen(*export).exit_code == 0
    first = content(out)
    own_and_foreign(out)
    before = content(out)
    step = run / "checkpoints" / "checkpoint-step-005.ckpt"
    result = loragen("lora", "export", step, "--output", out, "--force", *merge)
    assert result.exit_code == 0, result.output
    after = content(out)
    assert after.keys() == before.keys()
    weights = {file for file in first if file.suffix == ".safetensors"}
    assert all(after[file] != first[file] for file in weights)
    assert all(after[file] == before[file] for file in before.keys() - first.keys())
    assert loragen(*export).exit_code == 0  # and once more, the record is that of the new files
    assert all(content(out)[file] == first[file] for file in weights)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_configuration_without_weights_is_no_adapter(loragen, run, tmp_path):
    out = tmp_path / "d"
    own_and_foreign(tmp_path / "d")
    (out / "adapter_config.json").write_text("{}", encoding="utf-8")
    before = content(out)
    assert loragen("lora", "export", run, "--output", out, "--force").exit_code == 0
    assert read_adapter(out).tensors
    changed = {file for file in before if content(out).get(file) != before[file]}
    assert changed == {out / "adapter_config.json"}


def test_an_adapter_of_somebody_else_is_kept(keeps, run, experiment, tmp_path):
    """As PEFT saves it; also where it has replaced the weights in an export of ours."""
    out = tmp_path / "theirs"
    shutil.copytree(run / "adapter", out)
    weights = out / "adapter_model.safetensors"
    save_file({key: 2 * value for key, value in load_file(weights).items()}, weights)
    export = ("lora", "export", run, "--output", out, "--force")
    assert f"{weights} has changed since loragen wrote it" in keeps(out, *export)
    (out / "README.md").write_text("# My adapter\n", encoding="utf-8")
    for command in (("lora", "export", run), ("gen", "infer", "--model", experiment, *PROMPT)):
        for merge in ((), ("--merge",)):
            error = keeps(out, *command, "--output", out, "--force", *merge)
            assert error.startswith(f"{out} is no output of this command: --force replaces only")


@pytest.mark.parametrize("merge", [(), ("--merge",)], ids=["adapter", "merged"])
def test_a_file_that_was_changed_since_is_kept(loragen, keeps, run, tmp_path, merge):
    out = tmp_path / "d"
    export = ("lora", "export", run, "--output", out, "--force", *merge)
    assert loragen(*export).exit_code == 0
    card = out / "README.md"
    text = card.read_text(encoding="utf-8")
    card.write_text(f"{text}\nMy results.\n", encoding="utf-8")
    assert keeps(out, *export).startswith(f"{card} has changed since loragen wrote it")
    card.write_text(text, encoding="utf-8")
    assert loragen(*export).exit_code == 0


def test_a_foreign_file_of_the_name_of_a_new_one_is_kept(loragen, keeps, run, tmp_path):
    out = tmp_path / "d"
    assert loragen("lora", "export", run, "--output", out, "--merge").exit_code == 0
    record = json.loads((out / "loragen_export.json").read_text(encoding="utf-8"))
    del record["files"]["README.md"]  # as if the card were the user's
    (out / "loragen_export.json").write_text(json.dumps(record), encoding="utf-8")
    error = keeps(out, "lora", "export", run, "--output", out, "--merge", "--force")
    assert error.startswith(f"{out / 'README.md'} was not written by loragen")


def test_a_record_cannot_name_files_elsewhere(keeps, run, tmp_path):
    """It comes with a directory that may be a stranger's."""
    victim = tmp_path / "victim.txt"
    victim.write_text("years of work", encoding="utf-8")
    digest = hashlib.sha256(b"years of work").hexdigest()
    out = tmp_path / "d"
    out.mkdir()
    for name in ("../victim.txt", str(victim)):
        record = {"files": {name: digest}}
        (out / "loragen_export.json").write_text(json.dumps(record), encoding="utf-8")
        keeps(tmp_path, "lora", "export", run, "--output", out, "--merge", "--force")
    assert recorded({"files": {"sub/../../x": digest}}, "r") is None
    assert recorded({"files": {"sub/x": digest}}, "r") == {"sub/x": digest, "r": None}


# ---------------------------------------------------------------------------- single files


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_weights_file_is_replaced_if_it_is_a_generated_adapter(
    loragen, keeps, experiment, collection, tmp_path, suffix
):
    out = tmp_path / f"adapter{suffix}"
    infer = ("gen", "infer", "--model", experiment, *PROMPT, "--force", "--output")
    assert loragen(*infer, out).exit_code == 0
    assert loragen(*infer, out).exit_code == 0
    base = shutil.copytree(collection.base, tmp_path / "base")
    generator = experiment / "results" / "final_model" / "generator_model.pt"
    others = [base / "model.safetensors"] if suffix == ".safetensors" else [tmp_path / "g.pt"]
    shutil.copy(generator, tmp_path / "g.pt")
    (tmp_path / f"text{suffix}").write_text("years of work", encoding="utf-8")
    (tmp_path / f"empty{suffix}").touch()
    for other in [*others, tmp_path / f"text{suffix}", tmp_path / f"empty{suffix}"]:
        assert keeps(other, *infer, other).startswith(f"{other} was not written by this command")


def test_an_output_that_is_an_input_is_refused(keeps, loragen, experiment, run, tmp_path):
    copy = shutil.copytree(experiment, tmp_path / "experiment")
    generator = copy / "results" / "final_model" / "generator_model.pt"
    infer = ("gen", "infer", "--model", copy, *PROMPT, "--force", "--output")
    assert keeps(copy, *infer, generator) == (
        f"{generator} is an input of this command; choose another path"
    )
    link = tmp_path / "link.pt"
    link.hardlink_to(generator)
    assert "is an input" in keeps(copy, *infer, link)
    assert f"{copy} holds {generator}, an input" in keeps(copy, *infer, copy)

    adapter = tmp_path / "adapter"
    assert loragen("lora", "export", run, "--output", adapter).exit_code == 0
    again = ("--output", adapter, "--alpha", "1", "--force")
    assert "is an input" in keeps(adapter, "lora", "export", adapter, *again)
    weights = adapter / "adapter_model.safetensors"
    assert "holds" in keeps(adapter, "lora", "export", weights, *again)
    html = ("ckpt", "analyze", weights, "--force", "--html", weights)
    assert "is an input" in keeps(adapter, *html)

    old = tmp_path / "old.yaml"
    old.write_text("training:\n  batch_size: 4\n", encoding="utf-8")
    migrate = ("config", "migrate", old, "--command", "lora", "--force", "--output", old)
    assert "is an input" in keeps(old, *migrate)

    prompts = write_lines(tmp_path / "train_prompts.jsonl", rows_of(("red", "blue")))
    prepare = ("data", "prepare", "--source", prompts, "--output", tmp_path, "--force")
    assert "is an input" in keeps(tmp_path, *prepare)


def test_a_page_or_a_configuration_that_was_edited_is_kept(loragen, keeps, run, tmp_path):
    old = tmp_path / "old.yaml"
    old.write_text("data:\n  batch_size: 4\nlora:\n  rank: 2\n", encoding="utf-8")
    for out, command in (
        (tmp_path / "page.html", ("ckpt", "analyze", run / "adapter", "--html")),
        (tmp_path / "new.yaml", ("config", "migrate", old, "--command", "lora", "--output")),
    ):
        pytest.importorskip("plotly")
        assert loragen(*command, out).exit_code == 0
        assert is_sealed(out)
        assert loragen(*command, out, "--force").exit_code == 0
        out.write_text(out.read_text(encoding="utf-8").replace("2", "3"), encoding="utf-8")
        assert "has changed since" in keeps(out, *command, out, "--force")
        out.write_text("mine\n", encoding="utf-8")
        assert "was not written" in keeps(out, *command, out, "--force")


# ---------------------------------------------------------------------------- other directories


def test_prepared_prompts_are_replaced_if_they_are_ours(loragen, keeps, tmp_path):
    rows = write_lines(tmp_path / "rows.jsonl", rows_of(("red", "blue"), 24))
    out = tmp_path / "p"
    own_and_foreign(out)
    foreign = content(out)
    prepare = ("data", "prepare", "--source", rows, "--output", out)
    assert loragen(*prepare).exit_code == 0  # beside other files
    assert loragen(*prepare, "--force", "--seed", 3).exit_code == 0
    assert foreign.items() <= content(out).items()
    lines = out / "train_prompts.jsonl"
    lines.write_text(f"{lines.read_text(encoding='utf-8')}\n", encoding="utf-8")
    assert f"{lines} has changed since" in keeps(out, *prepare, "--force")
    (out / "prepared.json").unlink()
    assert f"{out} is no output" in keeps(out, *prepare, "--force")


def test_results_are_replaced_if_they_are_ours(tmp_path):
    from loragen.core.evaluation import report

    out = tmp_path / "results"
    with written_directory(out, report.results_record) as new:
        (new / "results.json").write_text("{}", encoding="utf-8")
        (new / "results.md").write_text(with_record("a", new), encoding="utf-8")
    refuse_existing(out, True, report.results_record)
    (out / "results.md").write_text(f"b{with_record('a', out)}", encoding="utf-8")
    with pytest.raises(UsageError, match=r"results\.md has changed since"):
        refuse_existing(out, True, report.results_record)
    (out / "results.md").write_text("my notes", encoding="utf-8")
    with pytest.raises(UsageError, match="is no output of this command"):
        refuse_existing(out, True, report.results_record)


def test_a_results_file_of_somebody_else_is_kept(keeps, experiment, collection, tmp_path):
    (tmp_path / "results.json").write_text("{}", encoding="utf-8")
    evaluate = ("gen", "eval", "--model", experiment, "--dataset", collection.file("colors"))
    assert "is no output" in keeps(tmp_path, *evaluate, "--output", tmp_path, "--force")


# ---------------------------------------------------------------------------- the demo


@pytest.mark.parametrize("name", ["world.yaml", "results.json", "data/color-word/train.jsonl"])
def test_a_directory_with_a_file_like_the_demos_is_no_demo(keeps, tmp_path, name):
    out = tmp_path / "d"
    own_and_foreign(out)
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(WORLD_FILE, out / name)
    for more in ((), ("--force",)):
        assert str(out) in keeps(out, "demo", "--output", out, *more)


def test_force_replaces_a_demo_and_keeps_what_else_is_in_its_folders(tmp_path):
    out = tmp_path / "demo"
    demo = prepare_demo(out, 0, None, force=False)
    old, theirs = out / "runs" / "color-word_lora_1", out / "runs" / "mine"
    for folder in (old, theirs):
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text(f"{folder}", encoding="utf-8")
        if folder == old:
            demo.record()
    (out / "thesis.tex").write_text("years of work", encoding="utf-8")
    prepare_demo(out, 1, None, force=True)
    assert not old.exists()
    assert (theirs / "manifest.json").read_text(encoding="utf-8") == str(theirs)
    assert (out / "thesis.tex").exists()
    prepare_demo(out, 1, None, force=True).record()  # theirs is not taken for its own
    prepare_demo(out, 1, None, force=True)
    assert (theirs / "manifest.json").exists()


def test_a_demo_with_an_edited_file_is_kept(keeps, tmp_path):
    out = tmp_path / "demo"
    prepare_demo(out, 0, None, force=False)
    world = out / "world.yaml"
    assert f"{out} holds {world}, an input" in keeps(
        out, "demo", "--output", out, "--world", world, "--force"
    )
    world.write_text(f"{world.read_text(encoding='utf-8')}\n", encoding="utf-8")
    assert f"{world} has changed since" in keeps(out, "demo", "--output", out, "--force")


# ---------------------------------------------------------------------------- the parts


def test_a_directory_is_replaced_as_a_whole_where_nothing_else_is_in_it(tmp_path):
    def record(directory):
        names = [file.name for file in directory.iterdir()]
        return dict.fromkeys(names) if "record" in names else None

    for text in ("one", "two"):
        with written_directory(tmp_path / "d", record) as new:
            for name in ("record", text):
                (new / name).write_text(text, encoding="utf-8")
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == ["record", "two"]
    with pytest.raises(RuntimeError), written_directory(tmp_path / "d", record) as new:
        (new / "record").write_text("three", encoding="utf-8")
        raise RuntimeError
    assert (tmp_path / "d" / "record").read_text(encoding="utf-8") == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["d"]


def test_an_input_is_known_by_its_place(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").touch()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "a")
    for output, given in ((link, tmp_path / "a"), (tmp_path, link / "x"), (link / "x", "a\0b")):
        if given == "a\0b":
            refuse_input(output, [given, "owner/name", "hub:owner/name"])
        else:
            with pytest.raises(UsageError, match="input"):
                refuse_input(output, [given])
    refuse_input(tmp_path / "a" / "new", [tmp_path / "a"])  # beside the files of an input


def test_a_place_that_cannot_be_written_is_found_before_anything_is_done(keeps, run, tmp_path):
    """Where no directory can be made: root may write to any that is only marked read-only."""
    place = Path("/proc/self/loragen")
    if not place.parent.is_dir():
        pytest.skip("no /proc")
    with pytest.raises(UsageError, match="cannot be written"):
        check_writable(place)
    error = keeps(tmp_path, "lora", "export", run, "--output", place / "x")
    assert error.startswith(f"{place / 'x'}: cannot be written")


def test_a_resumed_run_deletes_its_own_later_checkpoints_alone(run, tmp_path):
    from loragen.core.files import remove_unfinished
    from loragen.core.lora.train import LoraPoint

    copy = shutil.copytree(run, tmp_path / "run")
    folder = copy / "checkpoints"
    kept = shutil.copy(folder / "checkpoint-step-008.ckpt", folder / "best-step-008.ckpt")
    theirs = [copy / ".idea.d" / "x", folder / ".git.old" / "x"]
    for file in theirs:
        file.parent.mkdir()
        file.touch()
    LoraPoint.find(folder / "checkpoint-step-006.ckpt").delete_later_checkpoints()
    remove_unfinished(copy)
    names = {file.name for file in folder.glob("*.ckpt")}
    assert names == {"checkpoint-step-005.ckpt", "checkpoint-step-006.ckpt", Path(kept).name}
    assert all(file.exists() for file in theirs)
