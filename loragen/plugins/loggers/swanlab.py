"""SwanLab: on the disk by default, on the service or the local dashboard on request."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field

from loragen.core.errors import UsageError
from loragen.core.protocols import RunInfo
from loragen.plugins.loggers._process import (
    Library,
    ProcessLogger,
    Recording,
    RecordingProcess,
    open_or_offline,
)

ONLINE_SECONDS = 10.0
"""Timeout for the service to open the run, when training starts."""
STATES = {"success": "success", "failed": "crashed", "interrupted": "aborted"}
"""The status of a run -> SwanLab's state."""
# SwanLab parses the first two as groups of settings and refuses to start. The values of all three
# reach it as arguments.
HIDDEN = ("SWANLAB_PROJECT", "SWANLAB_EXPERIMENT", "SWANLAB_WORKSPACE")
LIBRARY = Library(
    "SwanLab",
    f"{__name__}:record_with_swanlab",
    dict.fromkeys(HIDDEN),
    r" \| (?:WARNING|ERROR) \| .*? - (.*)",
    # Without the id, SwanLab would upload the files as another run.
    "swanlab sync --id {id} {directory}",
)
Mode = Literal["online", "cloud", "local", "offline", "disabled"]

log = logging.getLogger(__name__)


class SwanLab(ProcessLogger):
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
        super().__init__(config)
        self._mode = "online" if mode == "cloud" else mode

    def start(self, run: RunInfo) -> RecordingProcess:
        mode = self._mode
        if mode == "local" and find_spec("swanboard") is None:
            # SwanLab would record without an error, but no dashboard could list the run.
            mode = "offline"
            log.warning(
                "SwanLab's local dashboard is not installed (pip install 'swanlab[dashboard]'); "
                "recording offline instead"
            )
        directory = run.directory / "swanlab_logs"
        config, environment = self.config, os.environ
        arguments: dict[str, Any] = {
            "project": config.project or environment.get("SWANLAB_PROJECT") or run.project,
            "workspace": config.workspace or environment.get("SWANLAB_WORKSPACE") or None,
            "name": config.experiment_name or environment.get("SWANLAB_EXPERIMENT") or run.name,
            "description": config.description,
            "tags": config.tags,
            "config": dict(run.config),
            "log_dir": str(directory.absolute()),
        }
        if run.resume_id is not None:
            arguments |= {"id": run.resume_id, "resume": "allow"}
        return open_or_offline(LIBRARY, arguments, mode, directory, ONLINE_SECONDS)


def record_with_swanlab(**arguments: Any) -> Recording:
    """Runs in the child."""
    import swanlab

    settings = swanlab.Settings(
        interactive=False,
        terminal=swanlab.Settings.Terminal(proxy_type="none"),
        probe=swanlab.Settings.Probe(requirements=False, git=False, monitor=False),
    )
    run = swanlab.init(settings=settings, **arguments)
    return Recording(
        run.id,
        lambda metrics, step: run.log(metrics, step=step),
        lambda status, reason: run.finish(state=STATES[status], error=reason),
        str(run.dir),
        run.url if run.mode == "online" else None,
    )
