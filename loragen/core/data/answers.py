"""The answers that a dataset allows: a few that recur, or any text. Light."""

from collections.abc import Sequence

from loragen.core.data.rows import Row

MOST_CLOSED_ANSWERS = 16  # a dataset with no more distinct responses has a closed answer set


def closed_answers(rows: Sequence[Row]) -> list[str] | None:
    """The answers of the whole dataset where they are few and recur; None where they are free."""
    distinct = sorted({row.response for row in rows})
    recur = len(distinct) <= min(MOST_CLOSED_ANSWERS, len(rows) // 2)
    return distinct if len(distinct) > 1 and recur else None


def allowed_answers(rows: Sequence[Row], closed: list[str] | None) -> list[list[str]] | None:
    """What each row may be answered with: its own choices, else the closed set; None where some
    row has neither."""
    allowed = [row.choices or closed or [] for row in rows]
    return allowed if all(allowed) else None
