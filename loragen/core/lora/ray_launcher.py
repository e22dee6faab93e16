"""The workers of `lora train` as tasks of a Ray cluster: an existing one, or one started here.

The files of all datasets and runs_dir have to be on a file system that all machines share.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from loragen.core.config import LoraTrainConfig
from loragen.core.errors import UsageError, one_line
from loragen.core.lora.settings import with_absolute_paths
from loragen.core.lora.tasks import Task
from loragen.core.lora.worker import StatusFile, TrainingJob, run_job

log = logging.getLogger(__name__)

STORE_BYTES = 100 * 2**20
"""Of a cluster started here: only configurations pass through its object store."""


@contextmanager
def ray_cluster(config: LoraTrainConfig) -> Iterator["RayLauncher"]:
    """Connects to Ray; a cluster that was started here ends with the block.

    Raises UsageError where Ray is not installed, there is no such cluster, or no machine of it has
    what one dataset needs.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray reports dead workers on stdout; we do, in one line on stderr.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".*")
    try:
        ray: Any = import_module("ray")
        import_module("ray.exceptions")
    except ImportError:
        raise UsageError("launcher ray needs ray: pip install 'loragen[ray]'") from None
    address = config.launcher.address
    ours = {} if address else {"object_store_memory": STORE_BYTES, "include_dashboard": False}
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.FATAL, **ours
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UsageError(f"launcher.address {address}: {one_line(error)}") from None
    try:
        resources = ray.cluster_resources()
        needs = {"CPU": config.launcher.num_cpus, "GPU": config.launcher.num_gpus}
        for kind, number in needs.items():
            if number > resources.get(kind, 0):  # it would wait for ever
                raise UsageError(
                    f"launcher.num_{kind.lower()}s: a dataset needs {number:g}, "
                    f"the cluster has {resources.get(kind, 0):g}"
                )
        if not needs["GPU"] and resources.get("GPU"):
            log.warning("launcher.num_gpus is 0: the %d GPUs stay idle", resources["GPU"])
        yield RayLauncher(ray, config)
    finally:
        ray.shutdown()


class RayLauncher:
    """Starts a task of the cluster per dataset, in a process of its own."""

    grace_seconds = 60.0

    def __init__(self, ray: Any, config: LoraTrainConfig) -> None:
        settings = config.launcher
        self.max_concurrent = (
            settings.max_concurrent or 10**6
        )  # as many as the cluster has room for
        self.max_retries = settings.max_retries
        # Workers have another working directory; and without a GPU they use the CPU, where Ray
        # itself would leave them all on the first GPU.
        self._config = with_absolute_paths(config)
        self._config.runs_dir = str(Path(config.runs_dir).absolute())
        self._config.data.root = str(Path(config.data.root).absolute())
        if not settings.num_gpus and config.trainer.accelerator == "auto":
            self._config.trainer.accelerator = "cpu"
        self.folder: Path | None = Path(self._config.runs_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._ray = ray
        self._run_job = ray.remote(
            num_cpus=settings.num_cpus,
            num_gpus=settings.num_gpus,
            max_calls=1,  # a new process for every dataset, which frees all its memory
            max_retries=0,  # Ray's own retries would not resume
        )(run_job)

    def start(self, task: Task, resume: Path | None, status: StatusFile) -> "RayWorker":
        config = task.config(self._config)
        if Path(task.argument).is_file():
            config.data.dataset = task.dataset.location
        job = TrainingJob(
            config=config, name=task.name, location=task.dataset.location, resume=resume
        )
        return RayWorker(self._ray, self._run_job.remote(job, status.path))


class RayWorker:
    """A task of the cluster that runs a training job."""

    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def is_running(self) -> bool:
        ready, _ = self._ray.wait([self._reference], timeout=0)
        return not ready

    def interrupt(self) -> None:
        self._ray.cancel(self._reference)  # as a Ctrl+C, while it trains

    def kill(self) -> None:
        self._ray.cancel(self._reference, force=True)

    def exit_reason(self) -> str:
        try:
            self._ray.get(self._reference)
        except self._ray.exceptions.RayError as error:
            return f"its worker died ({type(error).__name__})"
        return "its worker ended without a result"
