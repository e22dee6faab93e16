"""Trackio, Hugging Face's local-first tracker: a SQLite file in the run directory, or a Space."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from loragen.core.protocols import RunInfo
from loragen.plugins.loggers._process import (
    DISK_SECONDS,
    ONLINE_SECONDS,
    Library,
    ProcessLogger,
    Recording,
    RecordingProcess,
    require,
)

LIBRARY = Library(
    "Trackio",
    f"{__name__}:record_with_trackio",
    {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"},
    r"(?:UserWarning|Trackio warning): (.*)",
)
REMOTE = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class Trackio(ProcessLogger):
    """Records a run with Trackio below `<run directory>/trackio_logs/`.

    `TRACKIO_DIR=<run directory>/trackio_logs trackio show` opens the dashboard. A `directory` (or
    TRACKIO_DIR) collects several runs in one, a `space_id` sends them to a Hugging Face Space.
    Trackio's own hardware metrics are off.
    """

    class Config(BaseModel, extra="forbid"):
        project: str | None = Field(None, description="Project; else loragen's own name for it.")
        name: str | None = Field(None, description="Name of the run; else the directory's.")
        group: str | None = Field(None, description="Group of runs.")
        directory: str | None = Field(
            None, description="Where the files are; else TRACKIO_DIR, else in the run directory."
        )
        space_id: str | None = Field(
            None, description="A Hugging Face Space, user/name; else TRACKIO_SPACE_ID, else none."
        )

    def __init__(self, config: Config) -> None:
        require("trackio", "trackio")
        super().__init__(config)

    def start(self, run: RunInfo) -> RecordingProcess:
        config, environment = self.config, dict(LIBRARY.environment)
        directory = run.directory / "trackio_logs"
        chosen = config.directory or os.environ.get("TRACKIO_DIR")
        store = Path(chosen).expanduser() if chosen else directory
        environment["TRACKIO_DIR"] = str(store.absolute())
        seconds = ONLINE_SECONDS
        if not config.space_id and not any(map(os.environ.get, REMOTE)):
            environment["HF_HUB_OFFLINE"] = "1"  # it would ask the hub for the user's name
            seconds = DISK_SECONDS
        arguments = {
            "project": config.project or run.project,
            "name": config.name or run.name,
            "group": config.group,
            "space_id": config.space_id,
            "config": dict(run.config),
            "resume": "allow" if run.resume_id else "never",
        }
        library = replace(LIBRARY, environment=environment)
        return RecordingProcess(library, arguments, directory, seconds)


def record_with_trackio(**arguments: Any) -> Recording:
    """Runs in the child."""
    import trackio

    run = trackio.init(**arguments, embed=False, auto_log_gpu=False, auto_log_cpu=False)
    return Recording(
        run.id,
        lambda metrics, step: run.log(metrics, step=step),
        lambda *_: run.finish(),  # Trackio keeps no status
    )
