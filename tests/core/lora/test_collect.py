"""Finished runs are skipped, a failure stops no other dataset, and nothing is trained twice."""

import json
import os
import sys
import weakref
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from loragen.cli.main import app
from loragen.core.base.load import load_training_base
from loragen.core.config import LoraTrainConfig, load
from loragen.core.data.dataset import Dataset
from loragen.core.errors import DataError, Interrupted, UsageError
from loragen.core.lora.collect import collect, needs_workers
from loragen.core.lora.tasks import Task, earlier_runs, find_tasks
from loragen.core.lora.train import (
    LoraPoint,
    checkpoint_sizes,
    count_values,
    load_resumed_base,
    train_adapter,
)
from loragen.core.progress import Silent
from loragen.core.run.directory import LoraManifest, checkpoint_files, read_manifest, write_manifest

QUICK = {"training.max_steps": 2, "checkpoints.first_step": 2, "final_model": "none"}


class Recorded(Silent):
    """Records the events of a collection; may interrupt it at a step."""

    def __init__(self, stop=None):
        self.steps, self.outcomes, self.stop_at = [], [], stop

    def command_started(self, names):
        self.names = list(names)

    def step(self, step):
        self.steps.append((step.name, step.step))
        if (step.name, step.step) == self.stop_at:
            raise Interrupted("interrupted, as the test wants")

    def outcome(self, name, status, line):
        self.outcomes.append(name)

    def command_ended(self):
        self.stopped = True


@pytest.fixture
def named(dataset):
    """`named("one", "two")`: a task each, on a file of its own."""

    def make(*names):
        found = []
        for name in names:
            rows = [{"prompt": f"{name} {i}", "response": "red"} for i in range(8)]
            file = dataset(rows, f"{name}.jsonl")
            found.append(Task(Dataset(file, name), str(file)))
        return found

    return make


def bad(task):
    task.dataset.file.write_text('{"prompt": "p"}\n', encoding="utf-8")


class TestTasks:
    def test_every_dataset_below_the_root(self, lora_config, collection):
        config = lora_config({"data.root": str(collection.data)})
        found = find_tasks(config, [], every=True)
        assert [task.name for task in found] == ["animals", "colors"]
        files = [collection.file(name) for name in collection.names]
        assert [task.dataset.file for task in found] == files

    def test_the_configuration_names_a_collection(self, lora_config, collection):
        file = str(collection.file("animals"))
        config = lora_config({"data.root": str(collection.data), "collection": ["colors", file]})
        assert [task.argument for task in find_tasks(config, [], every=False)] == ["colors", file]
        assert [task.name for task in find_tasks(config, ["animals"], every=False)] == ["animals"]

    def test_one_named_twice_is_refused_however_it_is_spelt(self, lora_config, collection):
        config = lora_config({"data.root": str(collection.data)})
        file = str(collection.file("colors"))
        with pytest.raises(UsageError, match="twice"):
            find_tasks(config, ["colors", "animals", file], every=False)

    def test_all_unknown_names_are_reported_at_once(self, lora_config, collection):
        config = lora_config({"data.root": str(collection.data)})
        with pytest.raises(UsageError) as error:
            find_tasks(config, ["color", "animals", "x.jsonl"], every=False)
        assert len(error.value.problems) == 2

    @pytest.mark.parametrize("root, part", [("none", "none"), (".", "--all")])
    def test_all_without_datasets_or_beside_named_ones(self, lora_config, root, part):
        config = lora_config({"data.root": root})
        with pytest.raises(UsageError, match=part):
            find_tasks(config, ["x"] if root == "." else [], every=True)


class TestEarlierRuns:
    @pytest.fixture
    def config(self, collection):
        return load(LoraTrainConfig, collection.runs["colors"] / "config.yaml", environment={})

    @pytest.fixture
    def colors(self, collection):
        return Task(Dataset(collection.file("colors"), "colors"), "colors")

    def test_a_finished_run_is_found(self, config, colors, collection):
        assert earlier_runs(config, colors).finished.directory == collection.runs["colors"]
        assert earlier_runs(config, colors).unfinished is None

    @pytest.mark.parametrize(
        "settings, same",
        [
            ({"lora.rank": 3}, False),
            ({"seed": 43}, False),
            ({"base_model": "demo"}, False),
            ({"base_dtype": "bfloat16"}, False),
            ({"base_dtype": "float32"}, True),  # which is what auto took
            ({"trainer.precision": "bf16-mixed"}, False),
            ({"trainer.devices": 2}, True),
            ({"loggers": {"tensorboard": {}}}, True),
            ({"launcher.name": "ray", "launcher.num_cpus": 2}, True),
            ({"collection": ["a"]}, True),
        ],
    )
    def test_only_settings_that_decide_the_result_matter(
        self, lora_config, config, colors, collection, settings, same
    ):
        home = {"runs_dir": str(collection.runs["colors"].parent)}
        found = earlier_runs(lora_config({**home, **settings}), colors).finished
        assert (found is not None) == same

    def test_a_dtype_that_was_configured_is_not_auto(self, lora_config, named):
        (task,) = named("one")
        asked = lora_config({**QUICK, "base_dtype": "bfloat16"})
        (outcome,) = collect(asked, [task], Recorded())
        assert outcome.run.manifest.base_dtype == "bfloat16"
        assert earlier_runs(asked, task).finished
        assert earlier_runs(lora_config(QUICK), task).finished is None

    def test_a_changed_file_is_another_dataset(self, config, collection, tmp_path):
        file = tmp_path / "colors.jsonl"
        file.write_bytes(collection.file("colors").read_bytes())
        assert earlier_runs(config, Task(Dataset(file, "colors"), "x")).finished
        file.write_bytes(file.read_bytes() + b"\n")
        assert earlier_runs(config, Task(Dataset(file, "colors"), "x")).finished is None

    def test_a_base_directory_may_be_named_in_several_ways(self, config, colors, monkeypatch):
        base = Path(config.base_model)
        monkeypatch.chdir(base.parent)
        config.base_model = f"./{base.name}"
        assert earlier_runs(config, colors).finished

    def test_a_run_with_a_damaged_manifest_is_ignored(self, lora_config, named):
        (task,) = named("one")
        config = lora_config(QUICK)
        (first,) = collect(config, [task], Recorded())
        (first.run.directory / "manifest.json").write_text("{", encoding="utf-8")
        assert earlier_runs(config, task).finished is None


class TestCollect:
    def test_a_bad_file_and_a_failing_run_stop_no_other_dataset(
        self, lora_config, named, monkeypatch
    ):
        found = named("one", "two", "three", "four")
        bad(found[1])

        def fails_on_three(config, dataset, *rest):
            if dataset.name == "three":
                raise RuntimeError("out of\nmemory")
            return train_adapter(config, dataset, *rest)

        monkeypatch.setattr("loragen.core.lora.train.train_adapter", fails_on_three)
        recorded = Recorded()
        outcomes = collect(lora_config(QUICK), found, recorded)
        assert [one.status for one in outcomes] == ["trained", "failed", "failed", "trained"]
        assert [one.task for one in outcomes] == found
        assert outcomes[1].reason.startswith(f"{found[1].dataset}:1: 'response' is missing")
        assert outcomes[2].reason == "RuntimeError: out of memory"
        assert recorded.outcomes == ["two", "one", "three", "four"]  # files first
        assert recorded.stopped

    def test_the_base_is_loaded_once_and_only_to_train(self, lora_config, named, monkeypatch):
        loads = []
        monkeypatch.setattr(
            "loragen.core.base.load.load_training_base",
            lambda config: loads.append(1) or load_training_base(config),
        )
        config, found = lora_config(QUICK), named("one", "two")
        first = collect(config, found, Recorded())
        assert loads == [1]
        recorded = Recorded()
        again = collect(config, found, recorded)
        assert loads == [1]
        assert recorded.steps == []
        assert [one.status for one in again] == ["skipped", "skipped"]
        assert [one.run.directory for one in again] == [one.run.directory for one in first]
        assert "--force trains it again" in again[0].reason

    def test_a_rerun_trains_what_is_missing_and_force_everything(self, lora_config, named):
        config, found = lora_config(QUICK), named("one", "two")
        collect(config, found[:1], Recorded())
        assert [o.status for o in collect(config, found, Recorded())] == ["skipped", "trained"]
        forced = collect(config, found, Recorded(), force=True)
        assert [o.status for o in forced] == ["trained", "trained"]

    def test_a_dataset_trains_alike_alone_and_among_others(self, lora_config, named):
        config, found = lora_config(QUICK), named("one", "two")
        among = collect(config, found, Recorded())[1].run
        (alone,) = collect(config, found[1:], Recorded(), force=True)
        files = [checkpoint_files(run.directory)[-1] for run in (among, alone.run)]
        first, second = (torch.load(f, weights_only=True)["state_dict"] for f in files)
        assert all(first[key].equal(second[key]) for key in first)

    def test_an_interruption_stops_the_rest(self, lora_config, named):
        found = named("one", "two", "three")
        outcomes = collect(lora_config(QUICK), found, Recorded(stop=("two", 1)))
        assert [one.status for one in outcomes] == ["trained", "interrupted", "interrupted"]
        assert [one.error is not None for one in outcomes] == [False, True, True]

    def test_the_error_of_a_single_dataset_is_raised(self, lora_config, named):
        (task,) = named("one")
        with pytest.raises(Interrupted):
            collect(lora_config(QUICK), [task], Recorded(stop=("one", 1)))
        bad(task)
        again = Task(Dataset(task.dataset.source), task.argument)
        with pytest.raises(DataError):
            collect(lora_config(QUICK), [again], Recorded())

    def test_a_run_of_a_collection_is_configured_as_if_alone(self, lora_config, named):
        found = named("one", "two")
        wanted = [task.argument for task in found]
        config = lora_config({**QUICK, "collection": wanted})
        for outcome in collect(config, found, Recorded()):
            own = load(LoraTrainConfig, outcome.run.directory / "config.yaml", environment={})
            assert own.data.dataset == outcome.task.argument
            assert own.collection == []

    def test_an_unfinished_run_is_named_once(self, lora_config, named, caplog):
        config, (task,) = lora_config(QUICK), named("one")
        (begun,) = collect(config, [task], Recorded())
        manifest = begun.run.manifest.model_copy(update={"status": "running"})
        write_manifest(begun.run.directory, manifest)
        with caplog.at_level("INFO", "loragen"):
            (outcome,) = collect(config, [task], Recorded())
        assert outcome.status == "trained"
        notes = [line for line in caplog.messages if "--resume" in line]
        assert len(notes) == 1
        assert str(begun.run.directory) in notes[0]


@pytest.mark.skipif(sys.platform == "win32", reason="gloo is not tested there")
def test_several_devices_train_each_dataset_in_a_worker(
    lora_config, named, tmp_path, monkeypatch, capfd
):
    """Lightning's launcher leaves its variables in the environment of that process, not in ours."""
    monkeypatch.chdir(tmp_path)
    settings = {**QUICK, "trainer.devices": 2, "training.packing": False}
    (tmp_path / "c.json").write_text(lora_config(settings).model_dump_json(), encoding="utf-8")
    datasets = [part for task in named("one", "two") for part in ("--dataset", str(task.dataset))]
    before = dict(os.environ)
    command = ["lora", "train", "--config", "c.json", "--json", *datasets]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.stderr + capfd.readouterr().err
    assert dict(os.environ) == before
    assert capfd.readouterr().out == ""  # the processes say nothing there
    documents = json.loads(result.stdout)
    assert [one["dataset"]["name"] for one in documents] == ["one", "two"]
    assert len(list((tmp_path / "runs").iterdir())) == 2
    assert "[2/2] two: done in" in result.stderr


@pytest.mark.parametrize(
    "devices, accelerator, nodes, wanted",
    [
        ("auto", "auto", 1, True),
        ("auto", "cpu", 1, False),
        ("auto", "cpu", 2, True),
        (1, "gpu", 1, False),
        (2, "cpu", 1, True),
    ],
)
def test_workers_train_where_lightning_starts_processes(
    lora_config, monkeypatch, devices, accelerator, nodes, wanted
):
    """On a machine with two GPUs: `auto` is one device of the CPU nevertheless."""
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    settings = {"devices": devices, "accelerator": accelerator, "num_nodes": nodes}
    config = lora_config({f"trainer.{key}": value for key, value in settings.items()})
    assert needs_workers(config) == wanted


def test_the_values_of_an_adapter_are_known_without_weights(lora_config, collection):
    run = collection.runs["colors"]
    config = load(LoraTrainConfig, run / "config.yaml", environment={})
    values, trained, _ = count_values(config)
    assert trained == values
    files = checkpoint_files(run)
    document = torch.load(files[-1], weights_only=True)
    assert values == sum(tensor.numel() for tensor in document["state_dict"].values())
    sizes = checkpoint_sizes(config, values, trained)
    assert len(sizes) == len(files)
    assert sizes[-1] < files[-1].stat().st_size < sizes[-1] * 1.5 + 50_000


def test_a_resumed_run_keeps_its_settings_and_is_found_again(lora_config, named):
    """What `auto` took for the base is the manifest's to know, not the configuration's."""
    (task,) = named("one")
    config = lora_config({**QUICK, "trainer.precision": "bf16-true"})
    with pytest.raises(Interrupted):
        collect(config, [task], Recorded(stop=("one", 1)))
    begun = earlier_runs(config, task).unfinished
    point = LoraPoint.find(begun.directory)
    base = load_resumed_base(point, point.config)
    run = train_adapter(point.config, task.dataset, base, Silent(), point)
    assert read_manifest(run.directory, LoraManifest).base_dtype == "bfloat16"
    assert earlier_runs(config, task).finished.directory == run.directory


def test_the_memory_of_a_failed_dataset_is_freed(lora_config, named):
    """One that ran out of memory must not keep its batch while the others train."""
    held = []

    class Failing(Recorded):
        def step(self, step):
            if step.name == "one" and not held:
                batch = torch.zeros(3)
                held.append(weakref.ref(batch))
                raise RuntimeError("out of memory")

    progress = Failing()
    outcomes = collect(lora_config(QUICK), named("one", "two"), progress)
    assert [one.status for one in outcomes] == ["failed", "trained"]
    assert held[0]() is None


def test_the_content_of_a_dataset_that_is_not_trained_is_freed(lora_config, named):
    tasks = named("one", "two", "three")
    config = lora_config(QUICK)
    collect(config, tasks[:1], Silent())
    bad(tasks[1])
    outcomes = collect(config, tasks, Silent())
    assert [one.status for one in outcomes] == ["skipped", "failed", "trained"]
    assert not any("_content" in key for task in tasks for key in vars(task.dataset))


def test_the_content_of_many_datasets_is_not_kept_until_they_train(lora_config, named, monkeypatch):
    monkeypatch.setattr("loragen.core.lora.collect.KEPT", 1)
    tasks, held = named("one", "two", "three"), {}

    class Looking(Recorded):
        def training_started(self, name, total):
            held[name] = [one.name for one in tasks if "_contents" in vars(one.dataset)]

    outcomes = collect(lora_config(QUICK), tasks, Looking())
    assert [one.status for one in outcomes] == ["trained"] * 3
    assert held == {"one": ["one"], "two": ["two"], "three": ["three"]}


def test_skip_bad_rows_changes_nothing_for_a_file_without_bad_rows(lora_config, named):
    """It is what the error of another dataset has advised."""
    (task,) = named("one")
    collect(lora_config(QUICK), [task], Recorded())
    assert earlier_runs(lora_config({**QUICK, "data.skip_bad_rows": True}), task).finished


def test_other_validation_rows_are_another_run(lora_config, named, dataset):
    (task,) = named("one")
    held_out = dataset(name="held_out.jsonl")
    config = lora_config({**QUICK, "data.validation": str(held_out)})
    collect(config, [task], Recorded())
    assert earlier_runs(config, task).finished
    dataset([{"prompt": "another", "response": "blue"}], "held_out.jsonl")
    assert earlier_runs(config, task).finished is None


def test_an_error_of_the_file_system_stops_no_other_dataset(lora_config, named, monkeypatch):
    found = named("one", "two")

    def look(config, task):
        if task.name == "one":
            raise PermissionError("not yours")
        return earlier_runs(config, task)

    monkeypatch.setattr("loragen.core.lora.collect.earlier_runs", look)
    outcomes = collect(lora_config(QUICK), found, Recorded())
    assert [(one.status, one.reason) for one in outcomes] == [
        ("failed", "PermissionError: not yours"),
        ("trained", ""),
    ]
