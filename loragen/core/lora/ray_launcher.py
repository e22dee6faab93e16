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
from loragen.core.lora.worker import Launcher, TrainingJob, run_job

log = logging.getLogger(__name__)

STORE_BYTES = 100 * 2**20
"""Of a cluster started here: only configurations pass through its object store."""
GRACE_SECONDS = 60.0


@contextmanager
def ray_cluster(config: LoraTrainConfig) -> Iterator[Launcher]:
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
        runs_dir = Path(config.runs_dir).absolute()
        runs_dir.mkdir(parents=True, exist_ok=True)
        task = ray.remote(
            num_cpus=config.launcher.num_cpus,
            num_gpus=config.launcher.num_gpus,
            max_calls=1,  # a new process for every dataset, which frees all its memory
            max_retries=0,  # Ray's own retries would not resume
        )(run_job)
        yield Launcher(
            lambda job, status: RayWorker(ray, task.remote(_absolute(job, config), status.path)),
            folder=runs_dir,
            max_concurrent=config.launcher.max_concurrent or 10**6,  # Ray itself queues the rest
            max_retries=config.launcher.max_retries,
            grace_seconds=GRACE_SECONDS,
        )
    finally:
        ray.shutdown()


def _absolute(job: TrainingJob, config: LoraTrainConfig) -> TrainingJob:
    """Returns the job for a process with another working directory."""
    own = with_absolute_paths(job.config)
    own.runs_dir = str(Path(own.runs_dir).absolute())
    own.data.root = str(Path(own.data.root).absolute())
    if own.data.dataset and Path(own.data.dataset).is_file():
        own.data.dataset = job.location
    if not config.launcher.num_gpus and own.trainer.accelerator == "auto":
        own.trainer.accelerator = "cpu"  # Ray itself would leave all workers on the first GPU
    return job.model_copy(update={"config": own})


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
