"""The trainings that a sweep can search: how one is configured, what it validates on, and what a
search must leave alone. Nothing heavy is imported until one trains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic

from loragen.core.config import GenTrainConfig, LoraTrainConfig, Override
from loragen.core.config.load import parse_keys
from loragen.core.data.dataset import Dataset
from loragen.core.data.documents import HubDataset, parsed_source
from loragen.core.errors import ConfigError, DataError, UsageError, listing
from loragen.core.learning.sweep.space import Param, corners
from loragen.core.lora.tasks import IGNORED_ON_RESUME as FREE_FOR_LORA
from loragen.core.lora.tasks import Task, find_tasks
from loragen.core.progress import Progress
from loragen.core.run.directory import ConfigT, GeneratorRun, LoraRun, Run
from loragen.core.run.metrics import METRICS, read_metrics

if TYPE_CHECKING:
    from loragen.core.base.load import LanguageModel
    from loragen.core.run.loop import Trial

MEASURE = "it changes what is validated on, or the unit of it, so that trials cannot be compared"
PLACE = "it does not change what is learned"
SEED = "it draws other validation rows, and the best of several seeds is luck"
HIGHER_IS_BETTER = ("accuracy",)


def usual_direction(metric: str) -> str:
    """Returns `maximize` for an accuracy, else `minimize`."""
    return "maximize" if metric.rpartition("/")[2] in HIGHER_IS_BETTER else "minimize"


class SweptTraining(ABC, Generic[ConfigT]):
    """A training as the trials of a sweep run it, with different settings each."""

    command: ClassVar[str]
    unswept: ClassVar[Mapping[str, str]]
    """{section or key that no sweep may change: the reason}"""

    def __init__(
        self, load: Callable[[Sequence[Override]], ConfigT], given: Collection[str] = ()
    ) -> None:
        """`load` returns the configuration of the command line with further settings; `given` are
        the keys that the command line sets."""
        self._load: Callable[[Sequence[Override]], ConfigT] = load
        self._given = given

    def config(self, values: Mapping[str, Any]) -> ConfigT:
        """Returns the configuration of a trial. Raises ConfigError."""
        flags = [Override(parse_keys(k.split(".")), v, "--param") for k, v in values.items()]
        config: ConfigT = self._load(flags)
        return config

    def check(self, params: Sequence[Param], problems: Sequence[str], metric: str) -> ConfigT:
        """Returns the configuration with the first ends of all ranges, the `base` of the sweep.

        Raises UsageError with `problems` and everything else wrong with the ranges and the metric.
        """
        found = list(problems)
        for param in params:
            if param.key in self._given:
                found.append(f"--param {param.key}: it is also set to one value; leave one out")
            found += [
                f"--param {param.key}: it cannot be searched: {reason}"
                for key, reason in self.unswept.items()
                if f"{param.key}.".startswith(f"{key}.")
            ]
        base = None
        for values in corners(params):
            try:
                config = self.config(values)
            except ConfigError as error:
                found += error.problems
            else:
                base = base or config
                found += self.problems(config, metric)
        if found or base is None:
            raise ConfigError(*dict.fromkeys(found))
        if (str(base.trainer.devices), base.trainer.num_nodes) != ("1", 1):
            raise UsageError(
                "a sweep gives a trial one device: set trainer.devices=1 and trainer.num_nodes=1, "
                "and start the same command once for each device"
            )
        return base

    @property
    @abstractmethod
    def name(self) -> str:
        """What the study is called if it has no other name."""

    @property
    @abstractmethod
    def free(self) -> Collection[str]:
        """The settings in which a later command may differ from the study's."""

    @abstractmethod
    def inputs(self, config: ConfigT) -> dict[str, str]:
        """Returns {what the trials read: its hash or place}, which has to stay the same."""

    @abstractmethod
    def problems(self, config: ConfigT, metric: str) -> list[str]:
        """Returns why this metric of such a training cannot choose between trials."""

    @abstractmethod
    def train(self, config: ConfigT, trial: "Trial", progress: Progress) -> Run[Any, Any]:
        """Trains. Raises as the training does, and what the trial raises."""

    @abstractmethod
    def recorded(self, config: ConfigT) -> ConfigT:
        """Returns the configuration as a file that `--config` takes."""

    @abstractmethod
    def kept_step(self, run: Any) -> int | None:
        """Returns the step whose weights a finished run has kept; None: the last one."""

    def value(self, run: Run[Any, Any], metric: str) -> float:
        """Returns the metric of the weights that a finished run has kept, as it was validated at
        their step, or last before it. Raises DataError if there is none."""
        kept = self.kept_step(run)
        values = [
            entry[metric]
            for entry in read_metrics(run.directory / METRICS)
            if metric in entry and (kept is None or entry["step"] <= kept)
        ]
        if not values or not isfinite(values[-1]):
            raise DataError(f"{run.directory}: no finite {metric} was logged")
        return values[-1]


class SweptLora(SweptTraining[LoraTrainConfig]):
    """`lora train` of one dataset. Trials share the base model that is loaded."""

    command = "lora train"
    unswept: ClassVar[Mapping[str, str]] = {
        "base_model": MEASURE,
        "chat_template_kwargs": MEASURE,
        "collection": MEASURE,
        "data.dataset": MEASURE,
        "data.root": MEASURE,
        "data.skip_bad_rows": MEASURE,
        "data.val_ratio": MEASURE,
        "data.validation": MEASURE,
        "launcher": PLACE,
        "loggers": PLACE,
        "runs_dir": PLACE,
        "seed": SEED,
        "track_batches": PLACE,
        "trainer.limit_val_batches": MEASURE,
        "trust_remote_code": PLACE,
    }
    metrics = ("val/loss", "val/accuracy")

    def __init__(
        self,
        load: Callable[[Sequence[Override]], LoraTrainConfig],
        given: Collection[str] = (),
        named: Sequence[str] = (),
    ) -> None:
        """`named` are the datasets of the command line."""
        super().__init__(load, given)
        self._named = named
        self._task: Task | None = None
        self._base: LanguageModel | None = None
        self._base_settings: object = None

    def task(self, config: LoraTrainConfig) -> Task:
        """Returns the one dataset, which is opened once. Raises UsageError if there are others."""
        if self._task is None:
            tasks = find_tasks(config, self._named, every=False)
            if len(tasks) > 1:
                names = listing([task.name for task in tasks], 3)
                raise UsageError(f"a sweep trains on one dataset; name one of {names}")
            (self._task,) = tasks
        return self._task

    @property
    def name(self) -> str:
        assert self._task is not None
        return f"{self._task.name}_lora"

    @property
    def free(self) -> Collection[str]:
        return FREE_FOR_LORA

    def inputs(self, config: LoraTrainConfig) -> dict[str, str]:
        task = self.task(config)
        validation = task.validation
        return {
            "the base model": config.base_model,
            "the dataset": task.dataset.sha256,
            "data.validation": validation.sha256 if validation else "",
        }

    def problems(self, config: LoraTrainConfig, metric: str) -> list[str]:
        found = []
        if metric not in self.metrics:
            found.append(
                f"--metric {metric}: a sweep chooses by a validation metric alone, never by "
                f"training or test data; lora train validates {listing(self.metrics)}"
            )
        if not config.data.val_ratio and config.data.validation is None:
            found.append(
                "a sweep needs validation rows: set data.val_ratio=0.1, or data.validation=FILE "
                "with rows that are in no test"
            )
        elif config.data.validation and self._is_test_split(config):
            found.append(
                f"data.validation {config.data.validation} is the test split of the dataset: "
                "nothing is chosen on test data; set data.val_ratio=0.1 instead"
            )
        return found

    def _is_test_split(self, config: LoraTrainConfig) -> bool:
        source = parsed_source(str(config.data.validation))
        if isinstance(source, HubDataset):
            return source.split == "test"
        task = self.task(config)
        file = task.dataset.file
        names = [task.argument, *([str(file.parent)] if file else [])]
        for name in names:
            if Path(name).is_file():
                continue
            with suppress(UsageError):
                tested = Dataset.find(name, Path(config.data.root), "test")
                if tested.file and task.validation and tested.sha256 == task.validation.sha256:
                    return True
        return False

    def train(self, config: LoraTrainConfig, trial: "Trial", progress: Progress) -> LoraRun:
        from loragen.core.base.load import load_training_base
        from loragen.core.lora.train import train_adapter

        task, settings = self.task(config), _base_settings(config)
        if self._base is None or self._base_settings != settings:
            self._base = None  # freed first
            self._base, self._base_settings = load_training_base(config), settings
        return train_adapter(
            task.config(config),
            task.dataset,
            self._base,
            progress,
            validation=task.validation,
            trial=trial,
        )

    def recorded(self, config: LoraTrainConfig) -> LoraTrainConfig:
        return self.task(config).config(config)

    def kept_step(self, run: LoraRun) -> int | None:  # noqa: ARG002  # the last step is kept
        return None


def _base_settings(config: LoraTrainConfig) -> object:
    """Returns what decides how the base is loaded."""
    trainer = config.trainer
    return config.base_dtype, config.base_quantization, trainer.precision, trainer.accelerator


class SweptGenerator(SweptTraining[GenTrainConfig]):
    """`gen train`. What the trials read of the sources is cached on the disk."""

    command = "gen train"
    unswept: ClassVar[Mapping[str, str]] = {
        "behaviour.base_model": MEASURE,
        "behaviour.max_length": MEASURE,
        "data.cache_dir": PLACE,
        "data.cache_tokenized": PLACE,
        "data.checkpoint_dir": MEASURE,
        "data.prompts": MEASURE,
        "data.val_ratio": MEASURE,
        "experiments_dir": PLACE,
        "layout.target_form": MEASURE,
        "loggers": PLACE,
        "seed": SEED,
        "sources": MEASURE,
        "trainer.limit_val_batches": MEASURE,
        "training.importance": MEASURE,
        "training.l1_weight": MEASURE,
        "training.mse_weight": MEASURE,
        "training.objective": MEASURE,
        "training.val_rows": MEASURE,
        "trust_remote_code": PLACE,
        "val_sources": MEASURE,
    }

    @property
    def name(self) -> str:
        return "lora_generator"

    @property
    def free(self) -> Collection[str]:
        from loragen.core.learning.train import IGNORED_ON_RESUME

        return IGNORED_ON_RESUME

    def inputs(self, config: GenTrainConfig) -> dict[str, str]:
        from loragen.core.learning.sources import open_sources

        found = open_sources(config)
        places = [
            str(source.directory.absolute()) for source in (*found.training, *found.validation)
        ]
        return {"the sources": "\n".join(places), "data.prompts": config.data.prompts or ""}

    def problems(self, config: GenTrainConfig, metric: str) -> list[str]:
        where, slash, _ = metric.partition("/")
        prepared = config.data.prompts or any(source.prompts for source in config.sources)
        problem = ""
        if where not in ("val", "val_unseen") or not slash:
            problem = (
                f"--metric {metric}: a sweep chooses by a validation metric alone, never by "
                "training or test data; give val/... or, with val_sources, val_unseen/..."
            )
        elif where == "val_unseen" and not config.val_sources:
            problem = f"--metric {metric}: no dataset is held out: set val_sources"
        elif where == "val" and not config.data.val_ratio and not prepared:
            problem = (
                "a sweep needs validation prompts: set data.val_ratio=0.1, or val_sources and "
                "--metric val_unseen/loss"
            )
        return [problem] if problem else []

    def train(self, config: GenTrainConfig, trial: "Trial", progress: Progress) -> GeneratorRun:
        from loragen.core.learning.train import train

        return train(config, progress, trial=trial)

    def recorded(self, config: GenTrainConfig) -> GenTrainConfig:
        return config

    def kept_step(self, run: GeneratorRun) -> int | None:
        return run.manifest.kept_step
