"""The contract of a logger. Lightning is imported only when the check is called."""

from contextlib import chdir
from pathlib import Path
from typing import Any, get_args

from loragen.core.protocols import RunInfo, RunLogger, Status
from loragen.testing._common import validated_options


def check_logger(cls: Any, tmp_path: Path, **options: Any) -> None:
    """Checks that a logger opens a `lightning.pytorch` Logger, and closes it with any status.

    It writes below the run directory only, not into the working directory. Its `run_id` is a text
    or None, does not change at close, and differs between runs of one process. The same holds for a
    resumed run, in the directory of an earlier run and with its id and steps.
    """
    (tmp_path / "work").mkdir()
    ids: list[str] = []
    with chdir(tmp_path / "work"):
        for status in get_args(Status):
            run_id = _log_one_run(cls, options, tmp_path / status, status)
            ids += [run_id] if run_id else []
        assert len(set(ids)) == len(ids), f"{cls.__name__} gives two runs one run_id: {ids}"
        first = ids[0] if ids else None
        _log_one_run(cls, options, tmp_path / "success", "success", first, 1)


def _log_one_run(
    cls: Any, options: dict[str, Any], directory: Path, status: Status, *resumed: Any
) -> str | None:
    """Returns the `run_id`; `resumed` are the id and the steps of a run that is resumed."""
    from lightning.pytorch.loggers import Logger

    directory.mkdir(exist_ok=True)
    before = _files(directory.parent)
    config = {"seed": 42, "data": {"dataset": "check"}}
    plugin: RunLogger = cls(validated_options(cls, options))
    run = RunInfo(directory, directory.name, "loragen-check", config, *resumed)
    logger = plugin.open(run)
    assert isinstance(logger, Logger), f"{cls.__name__}.open must give a lightning.pytorch Logger"
    for step in (run.resume_step + 1, run.resume_step + 2):
        logger.log_metrics({"train/loss": 1.0 / step, "lr": 1e-4}, step=step)
    run_id = plugin.run_id
    assert run_id is None or (isinstance(run_id, str) and run_id), f"run_id is {run_id!r}"
    logger.finalize("success" if status == "success" else "failed")  # in the order of a training
    plugin.close(status)
    assert plugin.run_id == run_id, f"{cls.__name__}.run_id changes at close"
    changed = {p for p, state in _files(directory.parent).items() if before.get(p) != state}
    strays = sorted(str(p) for p in changed if not p.is_relative_to(directory))
    assert not strays, f"{cls.__name__} writes outside the run directory: {strays}"
    return run_id


def _files(directory: Path) -> dict[Path, tuple[int, int]]:
    """Returns size and time of every file, which change when it is written to."""
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in files}
