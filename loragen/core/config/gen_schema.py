"""What can be configured of `loragen gen train`. Defaults here are the built-in layer."""

from typing import Literal

from pydantic import Field, model_validator

from loragen.core.config.sections import (
    DecoderSection,
    EncoderSection,
    Loggers,
    ScheduleSection,
    Section,
    Trainer,
)


class SourceSection(Section):
    """Checkpoints of one dataset and the prompts that go with them."""

    run: str | None = Field(None, description="A run directory of `lora train`; it knows both.")
    checkpoints: str | None = Field(None, description="A directory of checkpoints or adapters.")
    prompts: str | None = Field(
        None,
        description="A file of rows or texts, hub:owner/name, or a directory of `data prepare`; "
        "else a run's own dataset.",
    )

    @model_validator(mode="after")
    def _one_origin(self) -> "SourceSection":
        if (self.run is None) == (self.checkpoints is None):
            raise ValueError("give either run or checkpoints")
        return self


class Layout(Section):
    token_dim: int = Field(384, ge=1, description="Values per token.")
    max_seq_len: int | Literal["auto"] = Field(
        "auto", description="Most tokens allowed; auto takes what the adapter needs."
    )
    target_form: Literal["raw", "svd"] = Field(
        "raw",
        description="Factors to learn: as trained, or those of the SVD of BA, which any other "
        "factors of the same BA share.",
    )


class GenData(Section):
    checkpoint_dir: str | list[str] | None = Field(
        None, description="Run directories, or folders of them; added to sources."
    )
    prompts: str | None = Field(
        None, description="A directory of `data prepare`, in place of the runs' own datasets."
    )
    pairing: Literal["dataset", "tracked"] = Field(
        "dataset",
        description="A checkpoint goes with any prompts of its dataset, or with those of the rows "
        "that it was trained on last.",
    )
    batch_size: int = Field(
        8, ge=1, description="Pairs of condition and adapter per micro-batch, of all devices."
    )
    prompts_per_condition: int = Field(
        16, ge=1, description="Prompt texts that the generator sees at once."
    )
    samples_per_prompt: int = Field(4, ge=1, description="Rows joined into one prompt text.")
    max_checkpoints: int = Field(50, ge=1, description="The newest so many of every source.")
    cache_tokenized: bool = Field(
        True, description="Keep tokenised checkpoints and embeddings for the next run."
    )
    cache_dir: str = Field(".loragen-cache", description="Where; may be deleted at any time.")
    val_ratio: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of every source's prompt texts held out for val/; prepared prompts "
        "have their own.",
    )


Training = Literal[
    "auto", "reconstruction", "behaviour", "reconstruction-then-behaviour", "transfer"
]
TRANSFER_NORM = 1.0
"""Of a gradient of transfer. A dataset whose like is not among the others gives a large one that
would drown the rest: without the limit what was measured is worse (docs/generating.md)."""


class GenTraining(Section):
    objective: Training = Field(
        "auto",
        description="Collected weights; the base's loss; one after the other; or transfer: the "
        "base's loss with each adapter written from the other datasets alone. auto: what "
        "base, labels and the number of datasets allow.",
    )
    max_epochs: int = Field(100, ge=1, description="An epoch shows every checkpoint once.")
    max_steps: int | None = Field(
        None, ge=1, description="Ends the reconstruction earlier; behaviour has steps of its own."
    )
    learning_rate: float = Field(
        1e-4, gt=0, description="For schedules that have a learning_rate and were given none."
    )
    weight_decay: float = Field(
        0.01, ge=0, description="Of matrices: decoupled in adamw, in the gradient in adam and sgd."
    )
    mse_weight: float = Field(1.0, ge=0, description="Weight of the squared error in the loss.")
    l1_weight: float = Field(0.1, ge=0, description="Weight of the absolute error in the loss.")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="As in torch.optim.")
    momentum: float = Field(0.9, ge=0, lt=1, description="Of sgd; the others have their own.")
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Validate and keep an exponential moving average of the weights (0.999); "
        "null: the weights as they are.",
    )
    encoder_rate: float = Field(
        0.1, gt=0, description="Learning rate of an encoder that is not frozen, as a share."
    )
    condition_noise: float = Field(
        0.0, ge=0, description="Std of Gaussian noise on every prompt, in units of their own std."
    )
    target_noise: float = Field(
        0.0, ge=0, description="Std of Gaussian noise on targets, in units of their own spread."
    )
    importance: bool = Field(
        False, description="Weigh tokens that the checkpoints of a dataset agree on more."
    )
    val_every_epochs: int = Field(
        1, ge=1, description="Validate every so many epochs, and after the last step."
    )
    last_every: int = Field(
        50, ge=1, description="Renew last.ckpt, from which a killed run goes on, so often (steps)."
    )
    val_rows: int = Field(
        32,
        ge=0,
        description="Held-out rows of every dataset that generated adapters are tried on, where "
        "the objective has the base at hand; 0: none.",
    )


class Behaviour(Section):
    """The phase that trains through the base model."""

    base_model: str | None = Field(None, description="null: the one that the runs were made on.")
    max_steps: int = Field(400, ge=1, description="Optimizer steps.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Its own, for schedules that have a learning_rate. null: 5e-4 for transfer, "
        "1e-4 for behaviour, which moves every weight and diverges sooner.",
    )
    batch_size: int = Field(
        8, ge=1, description="Adapters per micro-batch, of all devices, each of another dataset."
    )
    rows_per_adapter: int = Field(8, ge=1, description="Labelled rows that each is tried on.")
    max_length: int = Field(512, ge=8, description="Longest row in tokens, as in lora train.")
    reconstruction_weight: float = Field(
        0.1, ge=0, description="Weight of the reconstruction loss beside the base's."
    )

    @property
    def rate(self) -> float:
        """For a phase of behaviour."""
        return self.learning_rate or 1e-4

    @property
    def transfer_rate(self) -> float:
        return self.learning_rate or 5e-4


class GenTrainConfig(Section):
    """`loragen gen train`"""

    seed: int = Field(
        42, ge=0, description="Initial weights, grouping of prompts, split and batches."
    )
    experiments_dir: str = Field("experiments", description="Where experiment directories go.")
    sources: list[SourceSection] = Field([], description="What to learn from.")
    val_sources: list[SourceSection] = Field(
        [], description="Datasets held out whole, for val_unseen/ metrics."
    )
    encoder: EncoderSection = EncoderSection(name="sbert")
    decoder: DecoderSection = DecoderSection(name="hyperconv")
    layout: Layout = Layout()
    data: GenData = GenData()
    training: GenTraining = GenTraining()
    behaviour: Behaviour = Behaviour()
    schedule: ScheduleSection = ScheduleSection(name="cosine")
    loggers: Loggers = Field({"tensorboard": {}, "swanlab": {}})
    trainer: Trainer = Trainer()

    def with_objective(self, objective: Training) -> "GenTrainConfig":
        """A copy that is trained for this, with what depends on it."""
        found = self.model_copy(deep=True)
        found.training.objective = objective
        if objective == "transfer" and found.trainer.gradient_clip_val is None:
            found.trainer.gradient_clip_val = TRANSFER_NORM
        return found

    @model_validator(mode="after")
    def _shared_equally(self) -> "GenTrainConfig":
        """As far as it is known now: with `devices: auto` the training asks again, and what an
        objective `auto` comes to counts then."""
        devices = self.trainer.devices if isinstance(self.trainer.devices, int) else 1
        ranks = max(1, devices) * self.trainer.num_nodes
        objective, sizes = self.training.objective, {}
        if objective.startswith("reconstruction"):
            sizes["data"] = self.data.batch_size
        if objective not in ("auto", "reconstruction"):
            sizes["behaviour"] = self.behaviour.batch_size
        for section, size in sizes.items():
            if size % ranks:
                raise ValueError(
                    f"{section}.batch_size {size} must be a multiple of devices x num_nodes = "
                    f"{ranks}: it counts the pairs of all"
                )
        return self

    @model_validator(mode="after")
    def _wide_enough(self) -> "GenTrainConfig":
        if self.trainer.precision == "bf16-true":
            raise ValueError(
                "trainer.precision bf16-true would round the adapters to be learned; bf16-mixed "
                "computes in bfloat16 and keeps them"
            )
        return self
