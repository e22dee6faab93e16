"""What is told on stderr while something trains."""

import io
import sys

from loragen.cli.progress import PlainProgress, RichProgress, figures, terminal_progress
from loragen.core.progress import Step, Validation

STEP = Step(8, 100, 1, 0.5, 123.4, "pairs/s", "reconstruction", (8, 40))
FIRST = Validation(
    "reconstruction",
    (8, 40),
    {"val/loss": 0.125, "val/mse": 0.1, "val/behaviour": 2.0, "val_unseen/accuracy": 0.75},
    ("reconstruction", 8),
)
LATER = Validation("behaviour", (2, 60), {"val/loss": 0.25}, ("reconstruction", 8))
FIRST_TOLD = (
    "generator: validated after reconstruction, step 8/40: val/loss 0.1250, val/behaviour 2.0000, "
    "val_unseen/accuracy 0.7500; the best so far"
)
LATER_TOLD = (
    "generator: validated after behaviour, step 2/60: val/loss 0.2500; "
    "best so far: reconstruction, step 8"
)


def test_figures_of_a_step():
    assert figures(STEP) == "reconstruction, step 8/40, loss 0.5000, 123 pairs/s"
    slow = Step(3, 9, 2, 0.5, 0.0523, "answer tokens/s")
    assert figures(slow) == "stage 2, step 3/9, loss 0.5000, 0.052 answer tokens/s"


def test_validations_are_lines_of_their_own(capsys, monkeypatch):
    progress = PlainProgress()
    progress.start("generator", 100)
    for validation in (FIRST, LATER):
        progress.validated(validation)
        monkeypatch.setattr(progress, "_next_validation", 0.0)  # ten seconds later
    assert capsys.readouterr().err.splitlines() == [FIRST_TOLD, LATER_TOLD]


def test_validations_that_come_fast_and_bring_nothing_new_are_left_out(capsys):
    progress = PlainProgress()
    progress.start("generator", 100)
    for validation in (FIRST, LATER, FIRST):
        progress.validated(validation)
    assert capsys.readouterr().err.splitlines() == [FIRST_TOLD, FIRST_TOLD]


def test_on_a_terminal_they_stand_above_the_bar(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    progress = terminal_progress()
    assert isinstance(progress, RichProgress)
    progress.start("generator", 100)
    progress.step(STEP)
    progress.validated(FIRST)
    progress.stop()
    assert FIRST_TOLD in sys.stderr.getvalue()
