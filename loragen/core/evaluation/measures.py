"""What a table is made of: the measures, by every name they go by. Light."""

from typing import NamedTuple


class Measure(NamedTuple):
    name: str
    """In the results."""
    title: str
    """Above its table."""
    field: str
    """Of `Scores`."""


MEASURES = (
    Measure("accuracy", "exact match", "exact_match"),
    Measure("choice_accuracy", "choice accuracy", "choice_accuracy"),
    Measure("format_validity", "format validity", "format_validity"),
)
