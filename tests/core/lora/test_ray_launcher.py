"""Two workers on a Ray of this machine, one of which kills itself, once."""

import os
import signal
import sys
from pathlib import Path

import pytest

from loragen.core.config import LoraTrainConfig, load
from loragen.core.errors import UsageError
from loragen.core.lora import launch as ray_launcher
from loragen.core.lora.collect import collect
from loragen.core.lora.tasks import Task, finished_run
from loragen.core.lora.worker import TrainingJob, train_job
from loragen.core.run.directory import LoraManifest, read_manifest

from .test_collect import Recorded

SETTINGS = {
    "launcher.name": "ray",
    "training.max_steps": 6,
    "checkpoints.first_step": 3,
    "final_model": "none",
}


def dies_once(marker):
    """What a worker runs in place of `train_job`: the first to come this far is killed."""

    def job(job):
        from loragen.core.lora import module as callbacks
        from loragen.core.lora.worker import train_job

        real = callbacks.StepCheckpoints._after

        def after(self, trainer, module):
            real(self, trainer, module)
            if job.name == "two" and trainer.global_step == 4 and not Path(marker).exists():
                Path(marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        callbacks.StepCheckpoints._after = after
        return train_job(job)

    return job


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_a_worker_that_dies_is_tried_again_from_its_checkpoint(
    lora_config, dataset, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("ray")
    rows = [{"prompt": f"q {i}", "response": "red"} for i in range(8)]
    files = [dataset(rows, f"{name}.jsonl") for name in ("one", "two")]
    found = [Task(str(file), file.stem, file) for file in files]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_launcher, "train_job", dies_once(str(tmp_path / "died")))
    config = lora_config({**SETTINGS, "runs_dir": "runs"})
    told = Recorded()
    outcomes = collect(config, found, told)

    assert [one.status for one in outcomes] == ["trained", "trained"], outcomes
    one, two = (outcome.run for outcome in outcomes)
    assert one.directory.parent == two.directory.parent == Path("runs")
    assert two.manifest.steps == [3, 4, 5, 6]
    assert two.manifest.resumed_from == [4]
    assert one.manifest.resumed_from == []
    retries = [line for line in caplog.messages if "retry" in line]
    assert len(retries) == 1
    assert retries[0].startswith("two: its worker died")
    assert two.directory.name in retries[0]
    assert ("one", 6) in told.steps
    assert ("two", 6) in told.steps

    own = load(LoraTrainConfig, one.directory / "config.yaml", environment={})
    assert Path(own.data.dataset).is_absolute()
    assert read_manifest(one.directory, LoraManifest).status == "success"
    config.launcher.name = "local"
    assert finished_run(config, found[0]).directory == one.directory


def test_what_the_user_can_mend_is_told_and_not_raised(lora_config, dataset):
    """A worker that raises is tried again; one that tells is not."""
    job = TrainingJob(
        config=lora_config({"data.val_ratio": 0.99}), name="colors", source=str(dataset())
    )
    result = train_job(job)
    assert result.status == "failed"
    assert "data.val_ratio leaves no rows" in result.reason


def test_without_ray_there_is_one_line(lora_config, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    file = dataset()
    with pytest.raises(UsageError, match=r"pip install 'loragen\[ray\]'"):
        collect(lora_config(SETTINGS), [Task(str(file), "colors", file)], Recorded())


def test_a_dataset_that_no_machine_can_hold_is_refused(lora_config):
    config = lora_config({**SETTINGS, "launcher.num_gpus": 0.5})
    with pytest.raises(UsageError, match=r"num_gpus: a dataset asks for 0\.5, the cluster has 0"):
        ray_launcher._check_room(config, {"CPU": 2})
