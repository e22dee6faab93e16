"""What can be configured of `loragen lora train`. Defaults here are the built-in layer."""

from typing import Literal

from pydantic import Field, model_validator

from loragen.core.config.sections import Loggers, ScheduleSection, Section, Trainer


class LoraData(Section):
    root: str = Field(
        "data_to_lora/cs", description="Where dataset names are looked up: <root>/<name>/."
    )
    dataset: str | None = Field(
        None, description="A name under root, a file, or hub:owner/name[:config][@split]."
    )
    max_length: int = Field(
        1024, ge=8, description="Longest row in tokens; a longer one loses the start of its prompt."
    )
    val_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of the rows that is held out for val/ metrics."
    )
    validation: str | None = Field(
        None, description="A file of rows for val/ metrics, in place of val_ratio."
    )
    workers: int = Field(0, ge=0, description="Processes that prepare batches beside the training.")
    skip_bad_rows: bool = Field(False, description="Leave bad rows out instead of refusing them.")


class Lora(Section):
    rank: int = Field(8, ge=1, description="Rank of B A, the columns of B.")
    alpha: float = Field(16, gt=0, description="ΔW = alpha / rank · B A.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear, or the modules' names."
    )


class LoraTraining(Section):
    batch_size: int = Field(
        32, ge=1, description="Rows per optimizer step, all devices and accumulation together."
    )
    max_steps: int = Field(125, ge=1, description="Optimizer steps.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    packing: bool = Field(
        True, description="Compute the prefix that all rows share once; false pads every row."
    )
    val_every: int = Field(25, ge=1, description="Validate every so many steps.")
    patience: int | None = Field(
        None, ge=1, description="Stop once val/loss has not improved for this many steps."
    )


class Checkpoints(Section):
    first_step: int = Field(76, ge=1, description="The first step that is kept.")
    every: int = Field(1, ge=1, description="Keep every so many steps from there, and the last.")
    optimizer: Literal["all", "last", "none"] = Field(
        "all", description="Which checkpoints carry the optimizer's state, which resuming needs."
    )
    last_every: int = Field(
        5, ge=1, description="Renew last.ckpt, from which a killed run goes on, so often (steps)."
    )

    def keeps(self, step: int, final: bool) -> bool:
        """Whether a step has a checkpoint of its own; the final one always has."""
        return final or (step >= self.first_step and (step - self.first_step) % self.every == 0)

    def carries_optimizer(self, final: bool) -> bool:
        """Whether such a checkpoint is one to go on from."""
        return self.optimizer == "all" or (self.optimizer == "last" and final)


class Launcher(Section):
    name: Literal["local", "ray"] = Field(
        "local", description="Where several datasets train: one after the other here, or on ray."
    )
    address: str | None = Field(
        None, description="Of a ray cluster that is there, or auto; null starts one here."
    )
    num_cpus: float = Field(1, gt=0, description="Cores of one dataset, on ray.")
    num_gpus: float = Field(
        0, ge=0, description="GPUs of one dataset, on ray; 0.5: two datasets share one."
    )
    max_retries: int = Field(
        1, ge=0, description="How often a dataset is tried again whose worker fails, on ray."
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="Most datasets at a time, on ray; null: as many as fit."
    )


class LoraTrainConfig(Section):
    """`loragen lora train`"""

    base_model: str = Field(
        "Qwen/Qwen2.5-0.5B-Instruct", description="A hub id, a directory, or demo."
    )
    base_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the frozen base; auto: bfloat16 for large ones where it is fast."
    )
    base_quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="QLoRA: a base in 8 or 4 bits; needs a CUDA GPU and bitsandbytes."
    )
    seed: int = Field(
        42,
        ge=0,
        le=2**32 - 1,
        description="Batches, dropout and the LoRA initialisation of a whole collection.",
    )
    runs_dir: str = Field("runs", description="Where run directories are made.")
    data: LoraData = LoraData()
    lora: Lora = Lora()
    training: LoraTraining = LoraTraining()
    schedule: ScheduleSection = ScheduleSection(name="two-stage")
    checkpoints: Checkpoints = Checkpoints()
    track_batches: bool = Field(
        False, description="Write tracking/: which lines made which step and checkpoint."
    )
    final_model: Literal["merged", "none"] = Field(
        "merged", description="merged: also a whole model in the base's dtype, adapter merged in."
    )
    loggers: Loggers = Field({"tensorboard": {}, "swanlab": {}})
    trainer: Trainer = Trainer()
    collection: list[str] = Field(
        [], description="Names under data.root, or files, where no dataset is named."
    )
    launcher: Launcher = Launcher()

    @model_validator(mode="after")
    def _consistent(self) -> "LoraTrainConfig":
        data, precision = self.data, self.trainer.precision
        validates = data.val_ratio > 0 or data.validation is not None
        if data.val_ratio > 0 and data.validation is not None:
            raise ValueError("give either data.val_ratio or data.validation, not both")
        if self.training.patience is not None and not validates:
            raise ValueError(
                "training.patience watches val/loss: it needs data.val_ratio > 0 or data.validation"
            )
        if self.trainer.sets_base_dtype and self.base_dtype != "auto":
            raise ValueError(f"trainer.precision {precision} is the base's too: base_dtype auto")
        if self.launcher.name == "ray" and (self.trainer.devices, self.trainer.num_nodes) != (1, 1):
            raise ValueError(
                "launcher ray gives every dataset one device: trainer.devices 1, num_nodes 1"
            )
        devices = self.trainer.devices if isinstance(self.trainer.devices, int) else 1
        parts = max(1, devices) * self.trainer.num_nodes * self.trainer.accumulate_grad_batches
        if self.training.batch_size % parts:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} must be a multiple of devices x "
                f"num_nodes x accumulate_grad_batches = {parts}: it counts the rows of a whole step"
            )
        return self
