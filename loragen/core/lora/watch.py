"""A run of another process, followed by the files in its directory."""

from math import nan
from pathlib import Path

from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import location
from loragen.core.errors import LoragenError
from loragen.core.lora.collect import Task, run_directories
from loragen.core.manifests import LoraManifest, read_manifest
from loragen.core.metrics_log import METRICS, metrics_after
from loragen.core.progress import Step


class RunWatch:
    """Made before the process starts, to tell its run from those that are there."""

    def __init__(self, config: LoraTrainConfig, task: Task) -> None:
        self._config, self._task = config, task
        self._known = set(run_directories(config, task))
        self._directory: Path | None = None
        self._step = 0

    @property
    def directory(self) -> Path | None:
        """The run, once it is there."""
        if self._directory is None:
            found = (d for d in run_directories(self._config, self._task) if d not in self._known)
            self._directory = next(filter(self._is_ours, found), None)
        return self._directory

    def news(self) -> list[Step]:
        """The steps since the last call."""
        if self.directory is None:
            return []
        entries = metrics_after(self.directory / METRICS, self._step)
        total = self._config.training.max_steps
        steps = [
            Step(
                int(entry["step"]),
                total,
                int(entry["train/stage"]),
                entry["train/loss"],
                entry.get("train/tokens_per_second", nan),
                "answer tokens/s",
            )
            for entry in entries
            if "train/loss" in entry
        ]
        self._step = max([self._step, *(step.step for step in steps)])
        return steps

    def _is_ours(self, directory: Path) -> bool:
        try:
            manifest = read_manifest(directory, LoraManifest)
        except LoragenError:  # being written
            return False
        return manifest.dataset.path == location(self._task.source)
