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
    prompts_per_draw: int | None = None
    """None: all prompts at once."""
    plugins: list[dict[str, str]] = field(default_factory=list)
    """`kind`, `name`, `distribution` and `version` of what made the generator."""
    datasets: list[str] = field(default_factory=list)
    """What the generator was trained on."""
