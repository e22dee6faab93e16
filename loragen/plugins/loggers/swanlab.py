"""SwanLab: on the disk by default, on the service or the local dashboard on request."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, Field

from loragen.core.errors import UsageError
from loragen.core.protocols import RunInfo, Status

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

log = logging.getLogger(__name__)

DIRECTORY = "swanlab_logs"
Mode = Literal["online", "cloud", "local", "offline", "disabled"]


class SwanLab:
    """Records a run with SwanLab below `<run directory>/swanlab_logs/`.

    Offline runs are uploaded later with `swanlab sync`. A service that does not answer within ten
    seconds costs one warning and the run is recorded offline; training never waits for it longer.
    What SwanLab would capture beyond metrics and configuration (terminal, packages, git, hardware
    use) stays off.
    """

    class Config(BaseModel, extra="forbid"):
        project: str | None = Field(
            None, description="Project; else SWANLAB_PROJECT, else loragen's own name for it."
        )
        workspace: str | None = Field(
            None, description="Team or user; else SWANLAB_WORKSPACE, else the key's owner."
        )
        experiment_name: str | None = Field(
            None, description="Name of the run; else SWANLAB_EXPERIMENT, else the directory's."
        )
        description: str | None = Field(None, description="A sentence about the run.")
        tags: list[str] = Field([], description="Words to find the run by.")
        mode: Mode | None = Field(
            None,
            description="online (= cloud), local (dashboard), offline or disabled; "
            "else SWANLAB_MODE, else offline.",
        )

    def __init__(self, config: Config) -> None:
        self.config = config
        self._mode = _mode(config)
        self._run: Any = None  # swanlab's Run, while it is open
        self._run_id: str | None = None

    def open(self, run: RunInfo) -> Logger:
        from loragen.plugins.loggers import _swanlab_run

        logger = _swanlab_run.start(_or_offline(self._mode), self._arguments(run))
        self._run = logger.experiment
        self._run_id = None if self._run.mode == "disabled" else str(self._run.id)
        return logger

    @property
    def run_id(self) -> str | None:
        return self._run_id

    def close(self, status: Status) -> None:
        if self._run is not None:
            from loragen.plugins.loggers import _swanlab_run

            _swanlab_run.finish(self._run, status)
            self._run = None

    def _arguments(self, run: RunInfo) -> dict[str, Any]:
        config, environment = self.config, os.environ
        directory = run.directory / DIRECTORY
        arguments: dict[str, Any] = {
            "project": config.project or environment.get("SWANLAB_PROJECT") or run.project,
            "workspace": config.workspace or environment.get("SWANLAB_WORKSPACE") or None,
            "experiment_name": (
                config.experiment_name or environment.get("SWANLAB_EXPERIMENT") or run.name
            ),
            "description": config.description,
            "tags": list(config.tags),
            "log_dir": str(directory),
            "save_dir": str(directory),
            "config": dict(run.config),
        }
        if run.resume_id is not None:
            arguments |= {"id": run.resume_id, "resume": "allow"}
        return arguments


def _mode(config: SwanLab.Config) -> str:
    mode = config.mode or os.environ.get("SWANLAB_MODE") or "offline"
    if mode not in get_args(Mode):
        raise UsageError(f"SWANLAB_MODE is '{mode}'; it may be {', '.join(get_args(Mode))}")
    return "online" if mode == "cloud" else mode


def _or_offline(mode: str) -> str:
    """Where the dashboard is missing, SwanLab would record for it all the same, and in vain."""
    if mode == "local" and find_spec("swanboard") is None:
        log.warning(
            "SwanLab's local dashboard is not installed (pip install 'swanlab[dashboard]'); "
            "recording offline instead"
        )
        return "offline"
    return mode
