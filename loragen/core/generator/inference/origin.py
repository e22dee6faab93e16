"""Where a generated adapter comes from: plain data, written beside its weights."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Origin:
    generator: str
    """The name of the experiment, or of the file."""
    format_version: int
    """Of the generator's file."""
    base_model: str
    encoder: str
    decoder: str
    prompts: int
    prompts_sha256: str
    """Of all prompts in their order."""
    draws: int = 1
    prompts_per_draw: int = 0
    seed: int | None = None
    """Of the draws; None where all prompts were read at once."""
    plugins: list[dict[str, str]] = field(default_factory=list)
    """`kind`, `name`, `distribution` and `version` of what made the generator."""
    datasets: list[str] = field(default_factory=list)
    """What the generator was trained on."""
    nearest_dataset: str | None = None
    distance: float | None = None
    """Of the prompts to the training, in units of its reach (`familiarity`); None of a generator
    that was trained before this was measured."""
    far: bool = False
    """Whether that is too far to expect an adapter that does what the prompts ask."""
    vague: bool = False
    """Whether the prompts are too few to tell which dataset they are of."""

    def warning(self) -> str | None:
        """One line for the user where the prompts are not like those of the training."""
        if self.far:
            return (
                "these prompts are far from everything the generator was trained on, "
                f"{self.distance:g} times its reach from the nearest dataset, "
                f"{self.nearest_dataset} (within is below 1): evaluate the adapter before you "
                "expect anything of it"
            )
        if self.vague:
            return (
                f"{self.prompts_per_draw} of such prompts do not tell one dataset from another: "
                "give more of them, as in training"
            )
        return None
