"""`loragen sweep`: the settings of tiny trainings are searched, by processes of which one dies."""

import json
import os
import signal
import sys
import time
from importlib.util import find_spec
from math import inf
from pathlib import Path

import pytest

from loragen.core.config import GenTrainConfig, LoraTrainConfig, dump, load
from loragen.core.run.metrics import read_metrics
from tests.processes import Command

needs_optuna = pytest.mark.skipif(not find_spec("optuna"), reason="the extra sweep is missing")
RATE = "schedule.learning_rate_stage1=log:1e-4:1e-1"
RANK = "lora.rank=int:2:4"
VALIDATED = {"data.val_ratio": 0.25, "training.val_every": 2}


@pytest.fixture
def command(lora_config, dataset, tmp_path):
    """`command({...}, "--trials", 3)`: the arguments of a sweep of the tiny training."""

    def arguments(settings=None, *more):
        file = tmp_path / "config.yaml"
        file.write_text(dump(lora_config({**VALIDATED, **(settings or {})})), encoding="utf-8")
        given = ["--config", file, "--dataset", dataset(), "--study", tmp_path / "study"]
        return ["sweep", "lora", "train", *given, *more]

    return arguments


def answer(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def manifest_of(trial):
    return json.loads((Path(trial["run"]) / "manifest.json").read_text(encoding="utf-8"))


@needs_optuna
class TestLora:
    def test_trials_are_runs_and_the_best_is_a_configuration(self, loragen, command, tmp_path):
        arguments = command(None, "--param", RATE, "--param", RANK, "--trials", 3, "--no-prune")
        found = answer(loragen(*arguments, "--json"))
        trials, best = found["trials"], found["best"]
        assert [trial["state"] for trial in trials] == ["finished"] * 3
        for trial in trials:
            record = {"study": str(tmp_path / "study"), "number": trial["number"]}
            assert manifest_of(trial)["trial"] == {**record, "pruned_at": None}
            run = load(LoraTrainConfig, Path(trial["run"]) / "config.yaml", environment={})
            assert run.lora.rank == trial["params"]["lora.rank"]
            losses = read_metrics(Path(trial["run"]) / "metrics.jsonl")
            assert trial["value"] == [e["val/loss"] for e in losses if "val/loss" in e][-1]
        assert best == min(trials, key=lambda trial: trial["value"])
        config = load(LoraTrainConfig, Path(found["config"]), environment={})
        for key, value in best["params"].items():
            section, name = key.split(".")
            part = getattr(config, section)
            assert getattr(part, "options", {}).get(name, getattr(part, name, None)) == value

        # The same command has nothing left to do, and goes on with more trials.
        again = loragen(*arguments)
        assert again.stdout.strip() == found["config"]
        assert "finished" in again.stderr
        more = answer(loragen(*arguments[:-3], "--trials", 4, "--no-prune", "--json"))
        assert more["trials"][:3] == trials
        assert len(more["trials"]) == 4

        # A trial is not the run that `lora train` looks for.
        ran = loragen("lora", "train", "--config", found["config"], "--dry-run")
        assert ran.exit_code == 0, ran.output
        assert "already trained" not in ran.stderr

        # Another search does not go on with it.
        other = loragen(*arguments[:-3], "--trials", 3)
        assert other.exit_code == 2
        assert "pruning is True, the study has False" in other.stderr

    def test_pruned_trials_are_interrupted_runs(self, loragen, command):
        rates = "schedule.learning_rate_stage1=log:1e-9:1e-1"
        more = ("--param", rates, "--trials", 8, "--startup-trials", 2, "--json")
        trials = answer(loragen(*command(None, *more)))["trials"]
        pruned = [trial for trial in trials if trial["state"] == "pruned"]
        assert pruned
        for trial in pruned:
            manifest = manifest_of(trial)
            assert manifest["status"] == "interrupted"
            assert manifest["trial"]["pruned_at"] == trial["step"] < 8
            step = str(trial["step"])
            before = [t["validated"].get(step, inf) for t in trials[: trial["number"]]]
            assert trial["value"] > min(before)

    @pytest.mark.skipif(sys.platform == "win32", reason="it has no SIGKILL")
    def test_a_killed_process_and_two_at_once(self, loragen, command, tmp_path):
        """One process is killed in a trial. Two others then go on with the study together."""
        arguments = command({"training.max_steps": 60}, "--param", RATE, "--trials", 3)
        arguments += ["--no-prune"]
        killed = Command(tmp_path, *arguments)
        metrics = tmp_path / "runs"
        until = time.monotonic() + 200
        while not list(metrics.glob("*/metrics.jsonl")):
            assert time.monotonic() < until and killed.running()
            time.sleep(0.05)
        os.kill(killed.pid, signal.SIGKILL)
        killed.finish()
        (tmp_path / "other").mkdir()
        other = Command(tmp_path / "other", *arguments)
        answered = loragen(*arguments)
        assert answered.exit_code == 0, answered.output
        assert other.finish(200)[0] == 0
        trials = answer(loragen(*arguments, "--json"))["trials"]
        dead, *others = trials
        assert (dead["state"], dead["problem"]) == ("failed", "its process has died")
        assert dead["again"]
        assert [trial["state"] for trial in others] == ["finished"] * 3
        assert [t["params"] for t in others].count(dead["params"]) == 1
        assert len({t["run"] for t in trials}) == 4

    def test_dry_run_writes_nothing(self, loragen, command, tmp_path):
        result = loragen(*command(None, "--param", RANK, "--dry-run"))
        assert result.exit_code == 0, result.output
        assert "lora.rank: int:2:4" in result.stderr
        assert "val_ratio: 0.25" in result.stdout
        assert not (tmp_path / "study").exists()


class TestRefused:
    def test_without_the_extra_it_says_what_to_install(self, fails, command, monkeypatch):
        from loragen.core.learning.sweep import study

        monkeypatch.setattr(study, "find_spec", lambda _: None)
        assert "pip install '" in fails(2, *command(None, "--param", RANK))

    def test_without_validation_rows(self, fails, command):
        text = fails(2, *command({"data.val_ratio": 0.0}, "--param", RANK))
        assert "set data.val_ratio=0.1, or data.validation=FILE" in text

    @pytest.mark.parametrize("metric", ["train/loss", "test/accuracy", "accuracy"])
    def test_by_anything_but_a_validation_metric(self, fails, command, metric):
        text = fails(2, *command(None, "--param", RANK, "--metric", metric))
        assert text.startswith(f"--metric {metric}: a sweep chooses by a validation metric alone")

    def test_by_the_test_split(self, fails, lora_config, collection, tmp_path):
        from tests.conftest import rows_of, write_lines

        root = tmp_path / "data"
        for split in ("train", "test"):
            write_lines(root / "sea" / f"sea_{split}_formatted.jsonl", rows_of(("a", "b")))
        tested = root / "sea" / "sea_test_formatted.jsonl"
        tested.write_text(tested.read_text() + "\n")
        config = tmp_path / "config.yaml"
        settings = {"data.root": str(root), "data.validation": str(tested)}
        config.write_text(dump(lora_config(settings)), encoding="utf-8")
        given = ("sweep", "lora", "train", "--config", config, "--dataset", "sea")
        assert "is the test split" in fails(2, *given, "--param", RANK)

    def test_everything_wrong_at_once(self, fails, command):
        arguments = command(
            None, "--param", "lora.rnk=int:1:2", "--param", "lora.alpha=lgo:1:2",
            "--param", "seed=int:1:9", "--param", "lora.dropout=float:0:2",
            "--set", "lora.dropout=0.1",
        )  # fmt: skip
        lines = fails(2, *arguments, lines=5)
        assert "Did you mean 'log'?" in lines[0]
        assert any("lora.rnk" in line and "rank" in line for line in lines)
        assert any(line.startswith("--param seed: it cannot be searched") for line in lines)
        assert any("also set to one value" in line for line in lines)
        assert any("lora.dropout: input should be less than 1 (got 2.0)" in line for line in lines)

    def test_several_devices(self, fails, command):
        text = fails(2, *command({"trainer.devices": 2}, "--param", RANK))
        assert "one device" in text


class TestGenerator:
    @pytest.fixture
    def given(self, gen_config, tmp_path):
        file = tmp_path / "gen.yaml"
        file.write_text(dump(gen_config()), encoding="utf-8")
        return ["sweep", "gen", "train", "--config", file, "--study", tmp_path / "study"]

    @needs_optuna
    def test_the_value_is_that_of_the_step_that_is_kept(self, loragen, given):
        rate = "training.learning_rate=log:1e-3:1e-1"
        found = answer(loragen(*given, "--param", rate, "--trials", 2, "--json"))
        for trial in found["trials"]:
            assert trial["state"] == "finished"
            manifest = manifest_of(trial)
            at = trial["validated"]
            assert trial["value"] == at[str(manifest["kept_step"])] == min(at.values())
        config = load(GenTrainConfig, Path(found["config"]), environment={})
        assert config.training.learning_rate == found["best"]["params"]["training.learning_rate"]

    def test_what_changes_the_measure_is_not_searched(self, fails, given):
        text = fails(2, *given, "--param", "training.l1_weight=float:0:1")
        assert "cannot be searched" in text

    def test_a_held_out_metric_without_held_out_datasets(self, fails, given):
        arguments = (*given, "--param", "training.learning_rate=log:1e-3:1e-1")
        assert "set val_sources" in fails(2, *arguments, "--metric", "val_unseen/loss")
