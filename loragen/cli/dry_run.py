"""`loragen lora train --dry-run`: what would happen, and everything that can be wrong before."""

import shlex
import sys
from collections.abc import Sequence

from loragen.cli import render
from loragen.core.config import LoraTrainConfig
from loragen.core.data.documents import parsed_source
from loragen.core.data.rows import check_rows
from loragen.core.errors import DataError, LoragenError
from loragen.core.lora.collect import Task, finished_run, unfinished_run


def check(config: LoraTrainConfig, tasks: Sequence[Task]) -> None:
    """Reads every file and builds the adapter without weights; notes what it has found.

    Raises DataError for bad files, all at once; UsageError where the adapter does not fit the base.
    """
    problems: list[str] = []
    for task in tasks:
        try:
            rows = check_rows(task.source, config.data.skip_bad_rows)
            render.note(f"{task.name}: {rows} rows in {task.source}")
        except LoragenError as error:
            problems += error.problems
        _note_runs(config, task)
    if config.data.validation:
        try:
            rows = check_rows(parsed_source(config.data.validation), config.data.skip_bad_rows)
            render.note(f"data.validation: {rows} rows in {config.data.validation}")
        except LoragenError as error:
            problems += error.problems
    if problems:
        raise DataError(*problems)
    _note_size(config)
    for line in command_lines(config, sys.argv[1:]):
        render.note(line)


def command_lines(config: LoraTrainConfig, arguments: Sequence[str]) -> list[str]:
    """How to start these arguments on several devices or machines; nothing for one device."""
    nodes, devices = config.trainer.num_nodes, _devices(config)
    if nodes == 1 and devices == "1":
        return []
    given = [one for one in arguments if one not in ("--dry-run", "--dry_run")]
    command = shlex.join(["loragen", *given])
    where = (
        "--standalone"
        if nodes == 1
        else f"--nnodes={nodes} --rdzv-id=loragen --rdzv-backend=c10d --rdzv-endpoint=HOST:29500"
    )
    torchrun = f"torchrun {where} --nproc-per-node={devices} --no-python {command}"
    gpus = "" if config.trainer.accelerator == "cpu" else f" --gpus-per-node={devices}"
    srun = f"srun --nodes={nodes} --ntasks-per-node={devices}{gpus} {command}"
    if nodes == 1:
        return [f"on one machine, as it is: {command}", f"or: {torchrun}", f"on Slurm: {srun}"]
    return [
        f"on each of {nodes} machines, HOST being the first: {torchrun}",
        f"on Slurm: {srun}",
    ]


def _devices(config: LoraTrainConfig) -> str:
    """Per machine, as torchrun takes it: a number, or `gpu` for all there are."""
    devices = config.trainer.devices
    if isinstance(devices, str) and "," in devices:
        return str(len([one for one in devices.split(",") if one.strip()]))
    if str(devices) in ("auto", "-1"):
        return "1" if config.trainer.accelerator == "cpu" else "gpu"
    return str(devices)


def _note_runs(config: LoraTrainConfig, task: Task) -> None:
    done, begun = finished_run(config, task), unfinished_run(config, task)
    if done:
        render.note(f"{task.name}: done already in {done.directory}")
    elif begun:
        render.note(f"{task.name}: an unfinished run is in {begun.directory}")


def _note_size(config: LoraTrainConfig) -> None:
    from loragen.core.lora.attach import checkpoint_sizes, count_values

    values = count_values(config)
    sizes = checkpoint_sizes(config, values)
    render.note(
        f"the adapter has {values:,} values; {len(sizes)} checkpoints a dataset, "
        f"{sum(sizes) / 1e6:,.1f} MB"
    )
