"""The sections that both trainings share. Defaults here are the built-in layer."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

DEMO = "demo"
"""The base model that ships with the package."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class PluginSection(BaseModel):
    """`{name: ..., option: value, ...}`: the options are checked by the chosen plugin's Config."""

    model_config = ConfigDict(extra="allow")
    kind: ClassVar[str]
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ScheduleSection(PluginSection):
    kind = "schedule"


class EncoderSection(PluginSection):
    kind = "encoder"


class DecoderSection(PluginSection):
    kind = "decoder"


Loggers = Annotated[
    dict[str, dict[str, Any]],
    Field(description="Logger name -> its options; several log at once."),
]


class Trainer(Section):
    """Passed to `lightning.pytorch.Trainer`."""

    accelerator: str = Field("auto", description="auto, cpu, gpu, mps, ...")
    devices: int | str = Field(1, description="How many devices of this machine, or auto.")
    num_nodes: int = Field(1, ge=1, description="How many machines.")
    strategy: str = Field("auto", description="auto, ddp, fsdp, deepspeed_stage_2, ...")
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = Field(
        "32-true", description="Arithmetic of the forward pass, and the base weights' for *-true."
    )
    gradient_clip_val: float | None = Field(
        None,
        ge=0,
        description="Largest gradient norm; 0: any. null: 1.0 for a generator's transfer, any for "
        "everything else.",
    )
    accumulate_grad_batches: int = Field(
        1, ge=1, description="Micro-batches per step; those of lora share training.batch_size."
    )
    limit_train_batches: int | float | None = Field(
        None, gt=0, description="Stop after so many micro-batches, or that share of them."
    )
    limit_val_batches: int | float | None = Field(
        None, gt=0, description="Validate on so many batches, or that share of them."
    )
    detect_anomaly: bool = Field(False, description="Trace NaN gradients to their operation; slow.")

    @property
    def sets_base_dtype(self) -> bool:
        """Whether the precision is the base weights' too; base_dtype has no say then."""
        return self.precision in {"bf16-true", "64-true"}
