"""Weights & Biases: on the disk by default, on the service on request."""

from __future__ import annotations

import os
from typing import Any, Literal

from pydantic import BaseModel, Field

from loragen.core.errors import UsageError
from loragen.core.protocols import RunInfo
from loragen.plugins.loggers._process import (
    ONLINE_SECONDS,
    Library,
    ProcessLogger,
    Recording,
    RecordingProcess,
    open_or_offline,
    require,
)

LIBRARY = Library(
    "W&B",
    f"{__name__}:record_with_wandb",
    {
        "WANDB_ERROR_REPORTING": "false",
        # These would name every run of a command, or put it elsewhere.
        **dict.fromkeys(("WANDB_RUN_ID", "WANDB_RESUME", "WANDB_DIR", "WANDB_SILENT")),
    },
    r"^wandb: (?:WARNING|ERROR) (.*)",
    "wandb sync {directory}",
)
STEP = "trainer/global_step"
"""The axis of every chart: Lightning's name. W&B's own step cannot go back when a run resumes."""
MODES = {
    "offline": "offline",
    "online": "online",
    "disabled": "disabled",
    "dryrun": "offline",
    "run": "online",
}
"""Values of WANDB_MODE, the last two from old versions."""


class WandB(ProcessLogger):
    """Records a run with W&B below `<run directory>/wandb_logs/`.

    Offline runs are uploaded later with `wandb sync`. If the service does not answer within 30
    seconds, a warning is logged and the run is recorded offline; training never waits longer. W&B's
    capture of anything but metrics and configuration (terminal, code, packages, git, machine) is
    off.
    """

    class Config(BaseModel, extra="forbid"):
        project: str | None = Field(
            None, description="Project; else WANDB_PROJECT, else loragen's own name for it."
        )
        entity: str | None = Field(
            None, description="Team or user; else WANDB_ENTITY, else the key's owner."
        )
        name: str | None = Field(
            None, description="Name of the run; else WANDB_NAME, else the directory's."
        )
        group: str | None = Field(None, description="Group of runs; else WANDB_RUN_GROUP.")
        notes: str | None = Field(None, description="A sentence about the run.")
        tags: list[str] = Field([], description="Words to find the run by.")
        mode: Literal["online", "offline", "disabled"] | None = Field(
            None, description="online, offline or disabled; else WANDB_MODE, else offline."
        )

    def __init__(self, config: Config) -> None:
        require("wandb", "wandb")
        mode = config.mode or os.environ.get("WANDB_MODE") or "offline"
        if mode not in MODES:
            raise UsageError(f"WANDB_MODE: '{mode}' is no mode; it may be {', '.join(MODES)}")
        super().__init__(config)
        self._mode = MODES[mode]

    def start(self, run: RunInfo) -> RecordingProcess:
        directory = run.directory / "wandb_logs"
        config, environment = self.config, os.environ
        arguments: dict[str, Any] = {
            "project": config.project or environment.get("WANDB_PROJECT") or run.project,
            "entity": config.entity or environment.get("WANDB_ENTITY") or None,
            "name": config.name or environment.get("WANDB_NAME") or run.name,
            "group": config.group or environment.get("WANDB_RUN_GROUP") or None,
            "notes": config.notes,
            "tags": config.tags,
            "config": dict(run.config),
            "dir": str(directory.absolute()),
        }
        if run.resume_id is not None:
            arguments |= {"id": run.resume_id, "resume": "allow"}
        return open_or_offline(LIBRARY, arguments, self._mode, directory, ONLINE_SECONDS)


def record_with_wandb(**arguments: Any) -> Recording:
    """Runs in the child."""
    from pathlib import Path

    import wandb

    settings = wandb.Settings(
        console="off",
        disable_git=True,
        save_code=False,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )
    run = wandb.init(settings=settings, **arguments)
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP, step_sync=True)
    return Recording(
        run.id,
        lambda metrics, step: run.log({**metrics, STEP: step}),
        lambda status, _: run.finish(exit_code=0 if status == "success" else 1),
        str(Path(run.dir).parent),
        run.url if arguments["mode"] == "online" else None,
    )
