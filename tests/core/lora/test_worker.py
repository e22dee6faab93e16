"""The reports of a worker, and its parent if it dies or is interrupted."""

import signal
from contextlib import contextmanager
from math import inf

import pytest

from loragen.core.base.load import load_training_base
from loragen.core.data.dataset import Dataset
from loragen.core.lora.collect import Launcher, collect
from loragen.core.lora.tasks import Task
from loragen.core.lora.train import train_adapter
from loragen.core.lora.worker import (
    JobResult,
    StatusFile,
    TrainingJob,
    WorkerReport,
    run_job,
)
from loragen.core.progress import Silent
from loragen.core.run.directory import LoraManifest, read_manifest
from tests.core.run.resuming import Kill, StopAt

SETTINGS = {"training.max_steps": 6, "checkpoints.first_step": 3, "final_model": "none"}


@pytest.fixture
def reports(lora_config, dataset, tmp_path):
    """`reports({...})`: those of a job on the colours."""

    def run(settings=None, rows=None):
        config = lora_config({**SETTINGS, **(settings or {})})
        job = TrainingJob(config=config, name="colors", location=str(dataset(rows)))
        status = StatusFile(tmp_path / "status.jsonl")
        run_job(job, status.path)
        return list(status.new_reports())

    return run


def test_a_worker_reports_its_directory_steps_warnings_and_result(reports):
    rows = [{"prompt": "p"}, *({"prompt": f"q {i}", "response": "red"} for i in range(4))]
    started, *others, last = reports({"data.skip_bad_rows": True}, rows)
    assert started == WorkerReport()
    assert last.result.status == "trained"
    (warning,) = [one.warning for one in others if one.warning]
    assert "1 of 5 rows" in warning
    (directory,) = [one.directory for one in others if one.directory]
    assert read_manifest(directory, LoraManifest).status == "success"
    assert [one.step.step for one in others if one.step] == [1, 2, 3, 4, 5, 6]


def test_an_error_of_the_user_has_no_traceback_and_any_other_has(reports, monkeypatch):
    result = reports({"data.val_ratio": 0.99})[-1].result
    assert (result.status, result.traceback) == ("failed", "")
    assert "data.val_ratio" in result.reason
    monkeypatch.setattr("loragen.core.lora.train.load_rows", None)
    result = reports()[-1].result
    assert result.reason.startswith("TypeError")
    assert "Traceback" in result.traceback


def test_only_complete_lines_of_a_status_file_are_read(tmp_path):
    status = StatusFile(tmp_path / "status.jsonl")
    assert list(status.new_reports()) == []
    status.append(WorkerReport(warning="one"))
    whole = status.path.read_bytes()
    status.path.write_bytes(whole + whole[:-5])
    assert [one.warning for one in status.new_reports()] == ["one"]
    status.path.write_bytes(whole + whole)
    assert [one.warning for one in status.new_reports()] == ["one"]
    assert list(status.new_reports()) == []


class Ended:
    """A worker that has ended before its parent looks."""

    def is_running(self):
        return False

    def exit_reason(self):
        return "it was killed"


@pytest.fixture
def launched(monkeypatch):
    """`launched(start, retries)`: workers are started by `start`."""

    def use(start, retries, **options):
        @contextmanager
        def cluster(config):
            yield Launcher(start, max_retries=retries, **{"max_concurrent": 2, **options})

        monkeypatch.setattr("loragen.core.lora.collect.ray_cluster", cluster)

    return use


@pytest.fixture
def killed_once():
    """Starts workers of which every first one is killed in its fifth step."""

    def start(job, status):
        if job.resume:
            run_job(job, status.path)
            return Ended()
        data, base = Dataset.at(job.location), load_training_base(job.config)
        with pytest.raises(Kill):
            train_adapter(
                job.config, data, base, StopAt(5),
                on_start=lambda directory: status.append(WorkerReport(directory=directory)),
            )  # fmt: skip
        return Ended()

    return start


def test_a_worker_that_was_killed_resumes_the_run_that_it_reported(
    lora_config, dataset, launched, killed_once, caplog
):
    launched(killed_once, retries=1)
    files = [dataset(name=f"{name}.jsonl") for name in ("one", "two")]
    tasks = [Task(Dataset(file), str(file)) for file in files]
    config = lora_config({**SETTINGS, "launcher.name": "ray"})
    for outcome in collect(config, tasks, Silent()):
        assert outcome.status == "trained"
        assert outcome.run.manifest.resumed_from == [4]
        assert outcome.run.manifest.dataset.name == outcome.task.name
        assert any(outcome.run.directory.name in line for line in caplog.messages)


def test_a_worker_that_is_killed_too_often_has_failed(lora_config, dataset, launched, killed_once):
    launched(killed_once, retries=0)
    tasks = [Task(Dataset(dataset(name=f"{name}.jsonl")), name) for name in ("one", "two")]
    outcomes = collect(lora_config({**SETTINGS, "launcher.name": "ray"}), tasks, Silent())
    assert [one.status for one in outcomes] == ["failed", "failed"]
    assert "it was killed" in outcomes[0].reason


def test_an_error_of_the_user_is_not_retried(lora_config, dataset, launched):
    jobs = []

    def start(job, status):
        jobs.append(job.name)
        run_job(job, status.path)
        return Ended()

    launched(start, retries=3)
    tasks = [Task(Dataset(dataset(name=f"{name}.jsonl")), name) for name in ("one", "two")]
    settings = {**SETTINGS, "launcher.name": "ray", "data.val_ratio": 0.99}
    outcomes = collect(lora_config(settings), tasks, Silent())
    assert [one.status for one in outcomes] == ["failed", "failed"]
    assert jobs == ["one", "two"]


class Interrupting(Ended):
    """A worker that runs until it is interrupted; its start sends signals to its parent."""

    def __init__(self, signals, stops=True):
        self.running, self.stops, self.calls = True, stops, []
        for number in signals:
            signal.raise_signal(number)

    def is_running(self):
        return self.running

    def interrupt(self):
        self.calls.append("interrupt")
        self.running = not self.stops

    def kill(self):
        self.calls.append("kill")


@pytest.fixture
def interrupted(lora_config, dataset, launched):
    """`interrupted(worker, grace)`: the outcomes of two datasets, of which the first is started."""

    def run(worker, grace=60.0):
        workers = []

        def start(job, status):
            workers.append(worker())
            return workers[-1]

        launched(start, retries=1, max_concurrent=1, grace_seconds=grace)
        tasks = [Task(Dataset(dataset(name=f"{name}.jsonl")), name) for name in ("one", "two")]
        config = lora_config({**SETTINGS, "launcher.name": "ray"})
        try:
            return collect(config, tasks, Silent())
        finally:
            (run.worker,) = workers

    return run


def test_a_signal_interrupts_the_workers_and_starts_no_other(interrupted):
    outcomes = interrupted(lambda: Interrupting([signal.SIGINT]))
    assert [(one.status, one.reason) for one in outcomes] == [("interrupted", "not started")] * 2
    assert interrupted.worker.calls == ["interrupt"]


def test_a_worker_that_does_not_stop_in_time_is_killed(interrupted):
    outcomes = interrupted(lambda: Interrupting([signal.SIGTERM], stops=False), grace=0.1)
    assert [one.status for one in outcomes] == ["interrupted", "interrupted"]
    assert "killed" in outcomes[0].reason
    assert interrupted.worker.calls == ["interrupt", "kill"]


def test_a_worker_is_interrupted_once_however_long_it_takes(interrupted):
    """A second signal would end it before its step is saved."""

    class Slow(Interrupting):
        polls = 0

        def is_running(self):
            self.polls += bool(self.calls)
            return self.polls < 4

    outcomes = interrupted(lambda: Slow([signal.SIGINT], stops=False), grace=inf)
    assert [one.status for one in outcomes] == ["interrupted", "interrupted"]
    assert interrupted.worker.calls == ["interrupt"]


def test_a_second_signal_kills_the_workers(interrupted):
    class Twice(Interrupting):
        def interrupt(self):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: Twice([signal.SIGINT]))
    assert interrupted.worker.calls == ["kill"]


def test_a_signal_to_one_worker_on_this_machine_starts_no_other(lora_config, dataset, monkeypatch):
    def start(job, status):
        result = JobResult(status="interrupted", reason="interrupted at step 3")
        status.append(WorkerReport(result=result))
        return Ended()

    monkeypatch.setattr("loragen.core.lora.collect.Subprocess", start)
    tasks = [Task(Dataset(dataset(name=f"{name}.jsonl")), name) for name in ("one", "two")]
    outcomes = collect(lora_config({**SETTINGS, "trainer.devices": 2}), tasks, Silent())
    assert [(one.status, one.reason) for one in outcomes] == [
        ("interrupted", "interrupted at step 3"),
        ("interrupted", "not started"),
    ]


def test_a_report_that_cannot_be_written_stops_no_training(reports, monkeypatch):
    """A warning with a file name of another encoding; a disk that is full for a while."""
    dump = WorkerReport.model_dump_json

    def full(report, **options):
        if report.step or (report.directory and not report.result):
            raise OSError("no space left on device")
        return dump(report, **options)

    monkeypatch.setattr(WorkerReport, "model_dump_json", full)
    assert WorkerReport(warning="caf\udce9").warning == "caf\\udce9"
    _, last = reports()
    assert last.result.status == "trained"
    assert read_manifest(last.directory, LoraManifest).status == "success"
