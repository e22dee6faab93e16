"""SwanLab: on the disk by default, on the service or the local dashboard on request."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

from pydantic import BaseModel, Field

from loragen.core.errors import LoragenError, UsageError
from loragen.core.protocols import RunInfo, Status
from loragen.plugins.loggers._swanlab_process import SwanLabProcess

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

DIRECTORY = "swanlab_logs"
ONLINE_SECONDS = 10.0
"""Timeout for the service to open the run, when training starts."""
DISK_SECONDS = 60.0
"""Timeout to open a run that needs no service; only a stalled disk takes that long."""
UPLOAD_SECONDS = 60.0
"""Timeout for the upload of the remaining metrics, when training ends."""
STATES = {"success": "success", "failed": "crashed", "interrupted": "aborted"}
"""The status of a run -> SwanLab's state."""
Mode = Literal["online", "cloud", "local", "offline", "disabled"]

log = logging.getLogger(__name__)


class SwanLab:
    """Records a run with SwanLab below `<run directory>/swanlab_logs/`.

    Offline runs are uploaded later with `swanlab sync`. If a service does not answer within ten
    seconds, a warning is logged and the run is recorded offline; training never waits longer.
    SwanLab's capture of anything but metrics and configuration (terminal, packages, git, hardware
    use) is off.
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
        mode = config.mode or os.environ.get("SWANLAB_MODE") or "offline"
        if mode not in get_args(Mode):
            raise UsageError(
                f"SWANLAB_MODE: '{mode}' is no mode; it may be {', '.join(get_args(Mode))}"
            )
        self.config = config
        self._mode = "online" if mode == "cloud" else mode
        self.run_id: str | None = None
        self._process: SwanLabProcess | None = None

    def open(self, run: RunInfo) -> Logger:
        mode = self._mode
        if mode == "local" and find_spec("swanboard") is None:
            # SwanLab would record without an error, but no dashboard could list the run.
            mode = "offline"
            log.warning(
                "SwanLab's local dashboard is not installed (pip install 'swanlab[dashboard]'); "
                "recording offline instead"
            )
        directory = run.directory / DIRECTORY
        directory.mkdir(parents=True, exist_ok=True)
        config, environment = self.config, os.environ
        arguments: dict[str, Any] = {
            "project": config.project or environment.get("SWANLAB_PROJECT") or run.project,
            "workspace": config.workspace or environment.get("SWANLAB_WORKSPACE") or None,
            "name": config.experiment_name or environment.get("SWANLAB_EXPERIMENT") or run.name,
            "description": config.description,
            "tags": config.tags,
            "config": dict(run.config),
            "log_dir": str(directory),
        }
        if run.resume_id is not None:
            arguments |= {"id": run.resume_id, "resume": "allow"}
        reason = None
        if mode == "online":
            try:
                process = SwanLabProcess({**arguments, "mode": mode}, ONLINE_SECONDS)
                log.info("SwanLab run: %s", process.url)
            except LoragenError as error:
                mode, reason = "offline", error
        if mode != "online":
            try:
                process = SwanLabProcess({**arguments, "mode": mode}, DISK_SECONDS)
            except LoragenError as error:
                raise LoragenError(f"SwanLab ({mode}) did not start: {error}") from error
        if reason:
            log.warning(
                "SwanLab online did not start (%s); recording offline, `%s` uploads the run later",
                reason,
                process.sync_command,
            )
        self._process = process
        self.run_id = None if mode == "disabled" else process.run_id
        return _lightning_logger(process)

    def close(self, status: Status) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            error = None if status == "success" else status
            process.finish(STATES[status], error, UPLOAD_SECONDS)


def _lightning_logger(process: SwanLabProcess) -> Logger:
    """Returns a Lightning logger. Lightning is imported only here, when a run opens, because a
    configuration is validated without it."""
    from lightning.pytorch.loggers import Logger

    class SwanLabLogger(Logger):
        name = "swanlab"
        version = process.run_id

        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            process.log_metrics(metrics, step or 0)

        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            """Does nothing: the configuration was recorded when the run was opened."""

    return SwanLabLogger()
