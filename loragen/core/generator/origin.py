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

    def warning(self) -> str | None:
        """One line for the user where the prompts are far from the training."""
        if not self.far:
            return None
        return (
            f"these prompts are far from everything the generator was trained on: {self.distance:g} "
            f"times its reach from the nearest dataset, {self.nearest_dataset} (within is below 1); "
            "do not expect the adapter to do what they ask before you have evaluated it"
        )
