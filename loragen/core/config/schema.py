"""The configuration of `loragen lora train` and of `loragen gen train`, one pydantic model each.

The defaults here are the lowest layer. Descriptions become the comments of `loragen config init`.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from loragen.core.files import user_path

DEMO = "demo"
"""The base model that ships with the package."""


MOST_ROWS, MOST_STEPS = 2**20, 10**7
"""The most rows of a batch and steps of a training: more would be listed until memory ends."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=(), allow_inf_nan=False)


AUTO = "auto"
"""The name of a decoder, or of an objective, that is chosen once the sources are known."""
NAMELESS = {AUTO: "hyperconv"}
"""The plugin that options without a name belong to, if it is not the default itself."""


class NoOptions(BaseModel, extra="forbid"):
    """The options of `auto`."""


class PluginSection(BaseModel):
    """`{name: ..., option: value, ...}`: the options are checked by the chosen plugin's Config.

    The key of a section (`schedule`, `encoder`, `decoder`) is the kind of its plugin.
    """

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


Folder = Annotated[
    str, AfterValidator(lambda text: str(user_path(text)) if text.startswith("~") else text)
]
"""A directory, in which `~` is that of the user."""
Loggers = Annotated[
    dict[str, dict[str, Any]],
    Field(description="Logger name -> its options; several log at once."),
]


class TrainerSection(Section):
    """Passed to `lightning.pytorch.Trainer`."""

    accelerator: str = Field("auto", description="auto, cpu, gpu, mps, ...")
    devices: int | str = Field(1, description="How many devices of this machine, or auto.")
    num_nodes: int = Field(1, ge=1, description="How many machines.")
    strategy: str = Field("auto", description="auto, ddp, fsdp, deepspeed_stage_2, ...")
    precision: Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true"] = Field(
        "32-true", description="Precision of the forward pass; *-true: of the base weights too."
    )
    gradient_clip_val: float | None = Field(
        None,
        ge=0,
        description="Largest gradient norm; 0: no limit. null: 1.0 for a generator's transfer, "
        "else no limit.",
    )
    accumulate_grad_batches: int = Field(
        1, ge=1, description="Micro-batches per step; in lora train they share training.batch_size."
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
        """Whether the precision is also that of the base weights, instead of `base_dtype`."""
        return self.precision in {"bf16-true", "64-true"}


class LoraDataSection(Section):
    root: Folder = Field(
        "data_to_lora/cs", description="Where dataset names are looked up: <root>/<name>/."
    )
    dataset: str | None = Field(
        None, description="A name under root, a file, or hub:owner/name[:config][@split]."
    )
    max_length: int = Field(
        1024,
        ge=8,
        description="Longest row in tokens; a longer one loses the middle of its prompt.",
    )
    val_ratio: float = Field(
        0.0, ge=0, lt=1, description="Share of the rows held out for val/ metrics."
    )
    validation: str | None = Field(
        None, description="A file of rows for val/ metrics, instead of val_ratio."
    )
    workers: int = Field(0, ge=0, description="Processes that prepare batches during the training.")
    skip_bad_rows: bool = Field(False, description="Leave bad rows out instead of refusing them.")


class LoraSection(Section):
    rank: int = Field(8, ge=1, description="Rank of B A, the columns of B.")
    alpha: float = Field(16, gt=0, description="ΔW = alpha / rank · B A.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the input of A.")
    target_modules: str | list[str] = Field(
        "all-linear", description="all-linear, or the modules' names."
    )
    freeze_a: bool = Field(
        False,
        description="Train B alone (LoRA-FA, arXiv 2308.03303). Adapters of one seed share A, and "
        "their combinations are exact: the mean of B A is the mean of B, times A.",
    )


class LoraTrainingSection(Section):
    batch_size: int = Field(
        32,
        ge=1,
        le=MOST_ROWS,
        description="Rows per optimizer step, all devices and accumulation together.",
    )
    max_steps: int = Field(125, ge=1, le=MOST_STEPS, description="Optimizer steps.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    packing: bool = Field(
        True, description="Compute the prefix that all rows share once; false pads every row."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Keep each layer's input alone and compute its activations twice: less memory, "
        "more time, the same result.",
    )
    val_every: int = Field(25, ge=1, description="Validate every so many steps.")
    patience: int | None = Field(
        None, ge=1, description="Stop when val/loss has not improved for so many steps."
    )


class CheckpointsSection(Section):
    first_step: int = Field(76, ge=1, description="The first step that is kept.")
    every: int = Field(1, ge=1, description="Keep every so many steps from there, and the last.")
    optimizer: Literal["all", "last", "none"] = Field(
        "all", description="Which checkpoints hold the optimizer state, which resuming needs."
    )
    last_every: int = Field(
        5,
        ge=1,
        description="Write last.ckpt, from which a killed run resumes, every so many steps.",
    )

    def keeps(self, step: int, final: bool) -> bool:
        """Whether a step is kept as a checkpoint; the final one always is."""
        return final or (step >= self.first_step and (step - self.first_step) % self.every == 0)

    def carries_optimizer(self, final: bool) -> bool:
        """Whether a checkpoint holds the optimizer state, which resuming needs."""
        return self.optimizer == "all" or (self.optimizer == "last" and final)


class LauncherSection(Section):
    name: Literal["local", "ray"] = Field(
        "local", description="Where several datasets train: one after the other here, or on Ray."
    )
    address: str | None = Field(
        None, description="Address of a running Ray cluster, or auto; null starts one here."
    )
    num_cpus: float = Field(1, gt=0, description="CPU cores per dataset, on Ray.")
    num_gpus: float = Field(
        0, ge=0, description="GPUs per dataset, on Ray; 0.5: two datasets share one."
    )
    max_retries: int = Field(
        1, ge=0, description="How often a dataset is retried after its worker failed, on Ray."
    )
    max_concurrent: int | None = Field(
        None, ge=1, description="Most datasets at a time, on Ray; null: as many as fit."
    )


OWN_KWARGS = (
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "messages",
    "padding",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tools",
    "truncation",
)
"""Arguments of ``apply_chat_template`` that loragen gives itself, or that are no switches."""


def check_template_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the switches of a chat template. Raises ValueError for arguments that are none."""
    if own := [key for key in kwargs if key in OWN_KWARGS]:
        raise ValueError(f"'{own[0]}' is not for the chat template to decide")
    return kwargs


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(check_template_kwargs)]


class LoraTrainConfig(Section):
    """The configuration of `loragen lora train`."""

    base_model: str = Field(
        "Qwen/Qwen2.5-0.5B-Instruct", description="A hub id, a directory, a GGUF file, or demo."
    )
    trust_remote_code: bool = Field(
        False, description="Run the Python code that comes with the base model, if it has any."
    )
    base_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="Dtype of the frozen base; auto: bfloat16 for a large one if that is fast.",
    )
    base_quantization: Literal["none", "8bit", "4bit"] = Field(
        "none", description="QLoRA: a base in 8 or 4 bits; needs a CUDA GPU and bitsandbytes."
    )
    chat_template_kwargs: TemplateKwargs = Field(
        {}, description="What the chat template is given, such as enable_thinking: false."
    )
    seed: int = Field(
        42,
        ge=0,
        le=2**32 - 1,
        description="Seed of batches, dropout and the LoRA initialisation, for all datasets alike.",
    )
    runs_dir: Folder = Field("runs", description="Directory of the run directories.")
    data: LoraDataSection = LoraDataSection()
    lora: LoraSection = LoraSection()
    training: LoraTrainingSection = LoraTrainingSection()
    schedule: PluginSection = PluginSection(name="two-stage")
    checkpoints: CheckpointsSection = CheckpointsSection()
    track_batches: bool = Field(
        False, description="Write tracking/: which rows each step and checkpoint was trained on."
    )
    final_model: Literal["merged", "none"] = Field(
        "none",
        description="merged: also write the base with the adapter merged in; `lora export --merge` "
        "does so later.",
    )
    loggers: Loggers = Field({"tensorboard": {}, "swanlab": {}})
    trainer: TrainerSection = TrainerSection()
    collection: list[str] = Field(
        [], description="Names under data.root, or files: what to train on if no dataset is named."
    )
    launcher: LauncherSection = LauncherSection()

    @model_validator(mode="after")
    def _consistent(self) -> "LoraTrainConfig":
        data, trainer = self.data, self.trainer
        validates = data.val_ratio > 0 or data.validation is not None
        if data.val_ratio > 0 and data.validation is not None:
            raise ValueError("give either data.val_ratio or data.validation, not both")
        if self.training.patience is not None and not validates:
            raise ValueError(
                "training.patience watches val/loss: it needs data.val_ratio > 0 or data.validation"
            )
        if trainer.sets_base_dtype and self.base_dtype != "auto":
            raise ValueError(
                f"trainer.precision {trainer.precision} sets the base's dtype too; "
                "leave base_dtype auto"
            )
        if self.launcher.name == "ray" and (trainer.devices, trainer.num_nodes) != (1, 1):
            raise ValueError(
                "launcher ray gives a dataset one device; set trainer.devices and num_nodes to 1"
            )
        devices = trainer.devices if isinstance(trainer.devices, int) else 1
        shares = max(1, devices) * trainer.num_nodes * trainer.accumulate_grad_batches
        if self.training.batch_size % shares:
            raise ValueError(
                f"training.batch_size {self.training.batch_size} must be a multiple of devices x "
                f"num_nodes x accumulate_grad_batches = {shares}: it counts all rows of a step"
            )
        return self


class SourceSection(Section):
    """The checkpoints of one dataset and its prompts."""

    run: str | None = Field(None, description="A run directory of `lora train`, with its prompts.")
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


class LayoutSection(Section):
    token_dim: int = Field(384, ge=1, description="Values per token.")
    max_seq_len: int | Literal["auto"] = Field(
        "auto", description="Most tokens allowed; auto: as many as the adapter needs."
    )
    target_form: Literal["raw", "svd"] = Field(
        "raw",
        description="Factors to learn. raw: as trained; svd: those of the SVD of BA, equal for all "
        "factors of the same BA.",
    )


class GenDataSection(Section):
    checkpoint_dir: str | list[str] | None = Field(
        None, description="Run directories, folders of them, or libraries; added to sources."
    )
    prompts: str | None = Field(
        None, description="A directory of `data prepare`, instead of the runs' own datasets."
    )
    pairing: Literal["dataset", "tracked"] = Field(
        "dataset",
        description="A checkpoint is paired with any prompts of its dataset, or (tracked) with "
        "those of the rows that its last step was trained on.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=MOST_ROWS,
        description="Pairs of condition and adapter per micro-batch, all devices together.",
    )
    prompts_per_condition: int = Field(
        16, ge=1, le=MOST_ROWS, description="Prompt texts that the generator sees at once."
    )
    samples_per_prompt: int = Field(
        4, ge=1, le=MOST_ROWS, description="Rows joined into one prompt text."
    )
    max_checkpoints: int = Field(
        50, ge=1, description="Use so many checkpoints of every source, the newest."
    )
    cache_tokenized: bool = Field(
        True, description="Keep tokenised checkpoints and embeddings for the next run."
    )
    cache_dir: Folder = Field(
        ".loragen-cache", description="The directory; may be deleted at any time."
    )
    val_ratio: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of every source's prompt texts held out for val/; prepared prompts "
        "come with their own split.",
    )


def phases_in(objective: str) -> list[str]:
    """Returns the names of the objectives in `A-then-B`, in their order."""
    return objective.split("-then-")


class GenTrainingSection(Section):
    objective: str = Field(
        "auto",
        description="reconstruction: collected weights; behaviour: the base's loss; transfer: the "
        "same, for decoders that combine collected adapters; another installed one; A-then-B: one "
        "after the other; auto: what base, labels and the number of datasets allow.",
    )
    objective_options: dict[str, dict[str, Any]] = Field(
        {}, description="Options of an objective: its name -> its options."
    )
    max_epochs: int = Field(100, ge=1, description="An epoch shows every checkpoint once.")
    max_steps: int | None = Field(
        None,
        ge=1,
        le=MOST_STEPS,
        description="Ends the reconstruction earlier; behaviour has steps of its own.",
    )
    learning_rate: float = Field(
        1e-4, gt=0, description="For a schedule that takes a learning_rate and was given none."
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        description="Of weight matrices; decoupled in adamw, an L2 term in adam and sgd.",
    )
    mse_weight: float = Field(1.0, ge=0, description="Weight of the squared error in the loss.")
    l1_weight: float = Field(0.1, ge=0, description="Weight of the absolute error in the loss.")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="As in torch.optim.")
    momentum: float = Field(
        0.9, ge=0, lt=1, description="Momentum of sgd; the other optimizers have their own."
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Validate and keep an exponential moving average of the weights (0.999); "
        "null: the weights as they are.",
    )
    encoder_rate: float = Field(
        0.1,
        gt=0,
        description="Learning rate of an encoder that is not frozen, as a share of the rate.",
    )
    condition_noise: float = Field(
        0.0, ge=0, description="Std of Gaussian noise on prompt embeddings, in units of their std."
    )
    target_noise: float = Field(
        0.0, ge=0, description="Std of Gaussian noise on target tokens, in units of their std."
    )
    importance: bool = Field(
        False, description="Weigh tokens that the checkpoints of a dataset agree on more."
    )
    val_every_epochs: int | None = Field(
        None,
        ge=1,
        description="Validate every so many epochs, and after the last step; null: every "
        "epoch, but not more than eight times in all.",
    )
    last_every: int = Field(
        50,
        ge=1,
        description="Write last.ckpt, from which a killed run resumes, every so many steps.",
    )
    val_rows: int = Field(
        8,
        ge=0,
        description="Held-out rows of every dataset to evaluate generated adapters on, if the "
        "objective loads the base; 0: none.",
    )

    @property
    def phases(self) -> list[str]:
        """The names of the objectives, in their order."""
        return phases_in(self.objective)


class BehaviourSection(Section):
    """Settings of the phase that trains through the base model."""

    base_model: str | None = Field(None, description="null: the one that the runs were trained on.")
    max_steps: int = Field(200, ge=1, le=MOST_STEPS, description="Optimizer steps.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Of this phase, for a schedule that takes a learning_rate. null: 5e-4 for "
        "transfer, 1e-4 for behaviour, which trains every weight and diverges sooner.",
    )
    batch_size: int = Field(
        8,
        ge=1,
        le=MOST_ROWS,
        description="Adapters per micro-batch, all devices together, of different datasets if "
        "there are that many.",
    )
    rows_per_adapter: int = Field(4, ge=1, le=MOST_ROWS, description="Labelled rows per adapter.")
    max_length: int = Field(512, ge=8, description="Longest row in tokens, as in lora train.")
    gradient_checkpointing: bool = Field(
        False,
        description="Keep the input of each of the base's layers alone and compute its activations "
        "twice: less memory, more time, the same result.",
    )
    reconstruction_weight: float = Field(
        0.1, ge=0, description="Weight of the reconstruction loss beside the base's."
    )


class GenTrainConfig(Section):
    """The configuration of `loragen gen train`."""

    seed: int = Field(
        42,
        ge=0,
        le=2**32 - 1,
        description="Initial weights, grouping of prompts, split and batches.",
    )
    trust_remote_code: bool = Field(
        False, description="Run the Python code that comes with the base model, if it has any."
    )
    experiments_dir: Folder = Field(
        "experiments", description="Directory of the experiment directories."
    )
    sources: list[SourceSection] = Field([], description="What to learn from.")
    val_sources: list[SourceSection] = Field(
        [], description="Datasets held out entirely, for val_unseen/ metrics."
    )
    encoder: PluginSection = PluginSection(name="sbert")
    decoder: PluginSection = Field(
        PluginSection(name=AUTO),
        description="mixture: an affine combination of the collected adapters; neighbours: one "
        "of all datasets, moved towards that of the most similar one; hyperconv: the output of the "
        "convolutional decoder of Drag-and-Drop LLMs; another installed one; auto: for the "
        "objective transfer mixture if it makes the adapters of left-out datasets, else "
        "neighbours; for other objectives hyperconv. Options without a name are those of "
        "hyperconv.",
    )
    layout: LayoutSection = LayoutSection()
    data: GenDataSection = GenDataSection()
    training: GenTrainingSection = GenTrainingSection()
    behaviour: BehaviourSection = BehaviourSection()
    schedule: PluginSection = PluginSection(name="cosine")
    loggers: Loggers = Field({"tensorboard": {}, "swanlab": {}})
    trainer: TrainerSection = TrainerSection()

    @model_validator(mode="after")
    def _consistent(self) -> "GenTrainConfig":
        trainer, phases = self.trainer, self.training.phases
        # `devices: auto` and the phases of `objective: auto` are checked once they are known.
        num_processes = trainer.num_nodes
        if isinstance(trainer.devices, int):
            num_processes *= max(1, trainer.devices)
        sizes = {}
        if "reconstruction" in phases:
            sizes["data"] = self.data.batch_size
        if "behaviour" in phases or "transfer" in phases:
            sizes["behaviour"] = self.behaviour.batch_size
        for section, size in sizes.items():
            if size % num_processes:
                raise ValueError(
                    f"{section}.batch_size {size} must be a multiple of devices x num_nodes = "
                    f"{num_processes}: it counts the pairs of all devices"
                )
        if trainer.precision == "bf16-true":
            raise ValueError(
                "trainer.precision bf16-true would round the adapters to be learned; give "
                "bf16-mixed, which computes in bfloat16 and keeps them"
            )
        return self


MODELS: dict[str, type[BaseModel]] = {"lora": LoraTrainConfig, "gen": GenTrainConfig}


def command_of(model: type[BaseModel]) -> str:
    """Returns the command that a model configures: `lora` or `gen`."""
    return next(command for command, known in MODELS.items() if issubclass(model, known))
