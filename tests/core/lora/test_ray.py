"""Two workers on a Ray cluster of this machine, one of which kills itself, once."""

import os
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from loragen.core.config import LoraTrainConfig, load
from loragen.core.data.dataset import Dataset
from loragen.core.errors import UsageError
from loragen.core.lora.collect import collect
from loragen.core.lora.tasks import Task, earlier_runs
from loragen.core.lora.worker import run_job
from loragen.core.run.directory import LoraManifest, read_manifest

from .test_collect import Recorded

SETTINGS = {
    "launcher.name": "ray",
    "training.max_steps": 6,
    "checkpoints.first_step": 3,
    "final_model": "none",
}


@pytest.fixture
def tasks(dataset):
    rows = [{"prompt": f"q {i}", "response": "red"} for i in range(8)]
    files = [dataset(rows, f"{name}.jsonl") for name in ("one", "two")]
    return [Task(Dataset(file), str(file)) for file in files]


def dying_once(marker):
    """What a worker runs in place of `run_job`: dataset two is killed after its fourth step."""

    def job(job, status_file):
        from loragen.core.lora.module import StepCheckpoints

        on_step = StepCheckpoints.on_step

        def on_step_then_die(self, trainer, module, batch):
            on_step(self, trainer, module, batch)
            if job.name == "two" and trainer.global_step == 4 and not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        StepCheckpoints.on_step = on_step_then_die
        run_job(job, status_file)

    return job


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_worker_that_dies_is_started_again_from_its_checkpoint(
    lora_config, tasks, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("loragen.core.lora.collect.run_job", dying_once(str(tmp_path / "died")))
    config = lora_config({**SETTINGS, "runs_dir": "runs"})
    recorded = Recorded()
    outcomes = collect(config, tasks, recorded)

    assert [one.status for one in outcomes] == ["trained", "trained"], outcomes
    one, two = (outcome.run for outcome in outcomes)
    assert one.directory.parent == two.directory.parent == Path("runs")
    assert two.manifest.steps == [3, 4, 5, 6]
    assert two.manifest.resumed_from == [4]
    assert one.manifest.resumed_from == []
    assert len(list(Path("runs").iterdir())) == 2
    retries = [line for line in caplog.messages if "retry" in line]
    assert len(retries) == 1
    assert retries[0].startswith("two: ")
    assert two.directory.name in retries[0]
    assert ("one", 6) in recorded.steps
    assert ("two", 6) in recorded.steps

    own = load(LoraTrainConfig, one.directory / "config.yaml", environment={})
    assert Path(own.data.dataset).is_absolute()
    assert read_manifest(one.directory, LoraManifest).status == "success"
    config.launcher.name = "local"
    assert earlier_runs(config, tasks[0]).finished.directory == one.directory


def test_without_ray_there_is_one_line(lora_config, tasks, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'ray"):
        collect(lora_config(SETTINGS), tasks, Recorded())


def test_a_dataset_that_no_machine_can_hold_is_refused(lora_config, tasks, monkeypatch, tmp_path):
    ray = ModuleType("ray")
    ray.init = lambda **_: None
    ray.cluster_resources = lambda: {"CPU": 2}
    ray.shutdown = lambda: None
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.exceptions", ModuleType("ray.exceptions"))
    config = lora_config({**SETTINGS, "launcher.num_gpus": 0.5})
    with pytest.raises(UsageError, match=r"launcher\.num_gpus"):
        collect(config, tasks, Recorded())
    assert not (tmp_path / "runs").exists()
