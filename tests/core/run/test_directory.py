import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loragen.core.errors import DataError, PluginError, UsageError
from loragen.core.run import directory as runs
from loragen.core.run.directory import (
    GENERATOR_FILE,
    DatasetRecord,
    GeneratorManifest,
    LoraManifest,
    Run,
    checkpoint_files,
    checkpoint_name,
    checkpoint_step,
    create_run_directory,
    experiment_name,
    generator_file,
    plugin_records,
    read_manifest,
    run_directory_of,
    write_manifest,
)
from tests.conftest import lora_manifest


def test_a_run_is_named_after_what_and_when(tmp_path):
    directory = create_run_directory(tmp_path / "runs", "arc_lora")
    assert directory.is_dir()
    assert re.fullmatch(r"arc_lora_\d{8}_\d{6}", directory.name)


def test_runs_of_one_second_do_not_share_a_directory(tmp_path, monkeypatch):
    class Frozen(runs.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 11, 21, 4, 5, 6)

    monkeypatch.setattr(runs, "datetime", Frozen)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: create_run_directory(tmp_path, "arc_lora"), range(16)))
    first = "arc_lora_20261121_040506"
    assert {d.name for d in made} == {first, *(f"{first}_{n}" for n in range(2, 17))}


def test_the_run_of_a_path_inside_it(tmp_path, monkeypatch):
    run = tmp_path / "runs" / "arc_lora_1"
    file = run / "checkpoints" / checkpoint_name(76)
    file.parent.mkdir(parents=True)
    file.touch()
    write_manifest(
        run, GeneratorManifest(plugins=[], base_model="demo", sources=[], val_sources=[])
    )
    for path in (run, run / "checkpoints", file):
        assert run_directory_of(path) == run
    monkeypatch.chdir(run)
    assert run_directory_of(file.relative_to(run)).resolve() == run.resolve()
    with pytest.raises(UsageError, match="name one"):
        run_directory_of(run.parent)
    with pytest.raises(UsageError, match="none"):
        run_directory_of(tmp_path / "none")


@pytest.mark.parametrize("inside", [True, False])
def test_checkpoints_come_in_the_order_of_steps(tmp_path, inside):
    """Also past 999, where the names no longer sort as text; `last.ckpt` has no step."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    steps = [76, 99, 100, 125, 1000, 20000]
    for step in reversed(steps):
        (folder / checkpoint_name(step)).touch()
    (folder / "notes.txt").touch()
    found = checkpoint_files(tmp_path if inside else folder)
    assert [file.name for file in found] == [checkpoint_name(step) for step in steps]
    assert found[0].name == "checkpoint-step-076.ckpt"


def test_a_superscript_in_a_name_is_no_digit():
    assert checkpoint_step(Path("checkpoint-step-12².ckpt")) == 12
    assert checkpoint_step(Path("final².ckpt")) == 0


def test_the_generator_of_an_experiment_or_the_file_itself(tmp_path):
    file = tmp_path / "results/final_model/generator_model.pt"
    with pytest.raises(UsageError, match="no generator there"):
        generator_file(tmp_path)
    with pytest.raises(UsageError, match="no generator there"):
        generator_file(file)
    file.parent.mkdir(parents=True)
    file.touch()
    assert generator_file(tmp_path) == generator_file(file) == file


@pytest.mark.parametrize(
    "status, told",
    [
        ("running", "is still in training, or was killed"),
        ("interrupted", "was interrupted"),
        ("failed", "has failed"),
    ],
)
def test_an_experiment_without_a_generator_says_why(tmp_path, status, told):
    manifest = GeneratorManifest(
        status=status, plugins=[], base_model="demo", sources=[], val_sources=[]
    )
    write_manifest(tmp_path, manifest)
    with pytest.raises(UsageError, match=f"{told}.*--resume"):
        generator_file(tmp_path)


def test_an_experiment_in_training_has_its_best_checkpoint(tmp_path):
    manifest = GeneratorManifest(plugins=[], base_model="demo", sources=[], val_sources=[])
    write_manifest(tmp_path, manifest)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "last.ckpt").touch()
    assert generator_file(tmp_path) == folder / "last.ckpt"
    (folder / "epoch=1-val_loss=0.5.ckpt").touch()
    assert generator_file(tmp_path) == folder / "epoch=1-val_loss=0.5.ckpt"


def test_a_generator_is_called_by_its_experiment_or_its_file(tmp_path):
    assert experiment_name(tmp_path / "exp" / GENERATOR_FILE) == "exp"
    assert experiment_name(tmp_path / "exp" / "checkpoints" / "last.ckpt") == "exp"
    assert experiment_name(tmp_path / "mine.pt") == "mine"


def test_a_name_that_is_too_long_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="cannot be made: "):
        create_run_directory(tmp_path, "x" * 300)


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/checkpoint-step-002.ckpt"])
def test_a_run_is_opened_from_any_path_in_it(tmp_path, inside):
    (tmp_path / "checkpoints").mkdir()
    for name in (checkpoint_name(10), checkpoint_name(2), "last.ckpt"):
        (tmp_path / "checkpoints" / name).touch()
    manifest = lora_manifest()
    write_manifest(tmp_path, manifest)
    (tmp_path / "config.yaml").write_text("seed: 7\n", encoding="utf-8")
    run = Run.open(tmp_path / inside, LoraManifest)
    assert (run.directory, run.manifest) == (tmp_path, manifest)
    assert [file.name for file in run.checkpoints] == [checkpoint_name(2), checkpoint_name(10)]
    for name in ("config.yaml", "manifest.json"):
        assert run.config.seed == 7
        (tmp_path / name).unlink()  # neither is read again


def test_a_run_of_another_kind_is_refused(tmp_path):
    manifest = GeneratorManifest(plugins=[], base_model="demo", sources=[], val_sources=[])
    write_manifest(tmp_path, manifest)
    assert Run.open(tmp_path, GeneratorManifest).checkpoints == []
    with pytest.raises(DataError, match="gen train"):
        Run.open(tmp_path, LoraManifest)
    with pytest.raises(UsageError, match="none"):
        Run.open(tmp_path / "none", LoraManifest)


@pytest.fixture
def manifest():
    return LoraManifest(
        base_model="demo",
        dataset=DatasetRecord(name="arc", path="/data/arc.jsonl", sha256="0" * 64, rows=3),
        adapter_config={"r": 8, "target_modules": ["q_proj"]},
        seed=42,
        max_steps=125,
        steps=[76, 77],
        plugins=plugin_records({"schedule": ["two-stage"], "logger": ["swanlab"]}),
        logger_run_ids={"swanlab": "abc"},
    )


def test_a_manifest_comes_back_equal(tmp_path, manifest):
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path, LoraManifest) == manifest
    write_manifest(tmp_path, manifest.model_copy(update={"status": "success", "seconds": 1.5}))
    assert read_manifest(tmp_path, LoraManifest).status == "success"


def test_a_manifest_says_which_code_took_part(manifest):
    found = {(record.kind, record.name, record.distribution) for record in manifest.plugins}
    assert found == {("schedule", "two-stage", "loragen"), ("logger", "swanlab", "loragen")}
    with pytest.raises(PluginError, match="unknown schedule 'none'"):
        plugin_records({"schedule": ["none"]})


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"format_version": 2}, "format 2 is newer than this loragen reads"),
        ({"kind": "generator"}, "is a run of gen train, not of lora train"),
        ({"dataset": None}, "not the manifest of a lora run"),
    ],
)
def test_what_is_not_our_manifest_is_refused(tmp_path, manifest, change, reason):
    document = {**manifest.model_dump(mode="json"), **change}
    (tmp_path / "manifest.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=reason) as error:
        read_manifest(tmp_path, LoraManifest)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_broken_manifest_is_one_line(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text, encoding="utf-8")
    with pytest.raises(
        DataError, match=r"manifest\.json(:1: not JSON|: not the manifest)"
    ) as error:
        read_manifest(tmp_path, GeneratorManifest)
    assert "\n" not in str(error.value)


def test_no_manifest_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="not a run directory"):
        read_manifest(tmp_path, LoraManifest)
