"""MLflow: a SQLite store in the run directory, or any tracking server."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from loragen.core.protocols import RunInfo, Status
from loragen.plugins.loggers._process import (
    DISK_SECONDS,
    NO_WARNING,
    ONLINE_SECONDS,
    Library,
    ProcessLogger,
    Recording,
    RecordingProcess,
    require,
)

SQLITE = "sqlite:///"
STATES = {"success": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
"""The status of a run -> MLflow's."""
LIBRARY = Library(
    "MLflow",
    f"{__name__}:record_with_mlflow",
    {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ASYNC_LOGGING": "false",  # an error would be lost
        "MLFLOW_RUN_ID": None,  # would name every run of a command
    },
    NO_WARNING,  # an error is raised
)


class MLflow(ProcessLogger):
    """Records a run with MLflow: `<run directory>/mlflow_logs/mlflow.db`, or another store.

    `mlflow ui --backend-store-uri sqlite:///<file>` shows a store. A `tracking_uri` collects the
    runs of several directories in one.
    """

    class Config(BaseModel, extra="forbid"):
        tracking_uri: str | None = Field(
            None,
            description="A store, sqlite:///mlflow.db or http://server:5000; else "
            "MLFLOW_TRACKING_URI, else a SQLite file in the run directory.",
        )
        experiment_name: str | None = Field(
            None, description="Experiment; else MLFLOW_EXPERIMENT_NAME, else loragen's own name."
        )
        run_name: str | None = Field(None, description="Name of the run; else the directory's.")
        tags: dict[str, str] = Field({}, description="Tags of the run.")

    def __init__(self, config: Config) -> None:
        require("mlflow", "mlflow")
        super().__init__(config)
        self._uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or None
        if self._uri is None or self._uri.startswith(SQLITE):
            require("sqlalchemy", "mlflow")

    def start(self, run: RunInfo) -> RecordingProcess:
        directory = run.directory / "mlflow_logs"
        config, environment = self.config, os.environ
        uri, seconds = self._uri, DISK_SECONDS
        if uri is None:
            uri = f"{SQLITE}{(directory / 'mlflow.db').absolute().as_posix()}"
        elif uri.startswith(SQLITE):  # relative to where the user is
            uri = SQLITE + Path(uri.removeprefix(SQLITE)).expanduser().absolute().as_posix()
        else:
            seconds = ONLINE_SECONDS
        experiment = config.experiment_name or environment.get("MLFLOW_EXPERIMENT_NAME")
        arguments = {
            "tracking_uri": uri,
            "experiment_name": experiment or run.project,
            "run_name": config.run_name or run.name,
            "tags": config.tags,
            "params": _flat(run.config),
            "run_id": run.resume_id,
        }
        return RecordingProcess(LIBRARY, arguments, directory, seconds)


def _flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Returns nested options as ``{"data.dataset": "arc", ...}``."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and value
        flat |= _flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": str(value)}
    return flat


def record_with_mlflow(
    tracking_uri: str,
    experiment_name: str,
    run_name: str,
    tags: dict[str, str],
    params: dict[str, str],
    run_id: str | None,
) -> Recording:
    """Runs in the child, whose working directory is that of the artifacts of a SQLite store."""
    from time import time

    from mlflow.entities import Metric, Param
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri)
    if run_id is not None:
        try:
            client.update_run(run_id, status="RUNNING")
        except MlflowException:  # the run directory, or the store, has moved
            run_id = None
    if run_id is None:
        experiment = client.get_experiment_by_name(experiment_name)
        if experiment is None:
            try:
                experiment_id = client.create_experiment(experiment_name)
            except MlflowException:  # another process has created it
                experiment_id = client.get_experiment_by_name(experiment_name).experiment_id
        else:
            experiment_id = experiment.experiment_id
        run_id = client.create_run(experiment_id, tags=tags, run_name=run_name).info.run_id
        values = [Param(_key(key), value[:500]) for key, value in params.items()]
        for first in range(0, len(values), 100):  # the most that MLflow takes
            client.log_batch(run_id, params=values[first : first + 100])
    identity: str = run_id

    def log(metrics: dict[str, float], step: int) -> None:
        now = int(1000 * time())
        values = [Metric(_key(name), value, now, step) for name, value in metrics.items()]
        client.log_batch(identity, metrics=values)

    def finish(status: Status, reason: str | None) -> None:  # noqa: ARG001  # MLflow keeps none
        client.set_terminated(identity, STATES[status])

    return Recording(identity, log, finish)


def _key(name: str) -> str:
    """Returns a name with what MLflow does not allow in one replaced."""
    return re.sub(r"[^/\w.\- :]", "_", name)
