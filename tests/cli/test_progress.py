"""What stands on stderr while something trains."""

import io
import sys
import time

import pytest

from loragen.cli.progress import (
    PlainProgress,
    TerminalProgress,
    figures,
    measured,
    terminal_progress,
)
from loragen.core.progress import Silent, Step, Validation

STEP = Step(8, 100, 1, 0.5, 123.4, "pairs/s", "reconstruction", (8, 40), "generator")
BEST = Validation(
    "reconstruction",
    (8, 40),
    {"val/loss": 0.125, "val/mse": 0.1, "val/behaviour": 2.0, "val_unseen/accuracy": 0.75},
    ("reconstruction", 8),
    "generator",
)
WORSE = Validation("behaviour", (2, 60), {"val/loss": 0.25}, ("reconstruction", 8), "generator")


def step(number, name="colors", phase=""):
    return Step(number, 9, 2, 0.5, 12.0, "answer tokens/s", phase, name=name)


@pytest.fixture
def clock(monkeypatch):
    """`clock(3)`: three seconds pass."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


@pytest.fixture
def lines(capsys):
    """The lines that were printed to stderr since the last call."""
    return lambda: capsys.readouterr().err.splitlines()


def test_figures_of_a_step():
    assert figures(STEP) == "reconstruction, step 8/40, loss 0.5000, 123 pairs/s"
    slow = Step(3, 9, 2, 0.5, 0.0523, "answer tokens/s")
    assert figures(slow) == "stage 2, step 3/9, loss 0.5000, 0.052 answer tokens/s"


class TestPlain:
    @pytest.fixture
    def progress(self, clock):
        progress = PlainProgress()
        progress.training_started("colors", 9)
        return progress

    def test_steps_are_printed_now_and_then(self, progress, clock, lines):
        for number in range(1, 10):
            progress.step(step(number))
            clock(4)
        shown = lines()
        assert [line.partition("step ")[2][:3] for line in shown] == ["1/9", "4/9", "7/9", "9/9"]
        assert all(line.startswith("colors: stage 2") for line in shown)
        assert [line.partition("s, ")[2] for line in shown] == ["", "20 s left", "8 s left", ""]

    def test_a_phase_has_a_first_step_of_its_own(self, progress, lines):
        for phase in ("reconstruction", "reconstruction", "behaviour"):
            progress.step(step(3, phase=phase))
        assert [line.split()[1] for line in lines()] == ["reconstruction,", "behaviour,"]

    def test_trainings_that_overlap_have_lines_of_their_own(self, progress, lines):
        for name in ("one", "two", "one"):
            progress.step(step(1, name))
        assert [line.partition(":")[0] for line in lines()] == ["one", "two"]

    def test_a_validation_names_its_metrics_and_the_best(self, progress, clock, lines):
        for validation in (BEST, WORSE):
            progress.validated(validation)
            clock(11)
        best, worse = lines()
        assert best.startswith("generator: validated after reconstruction, step 8/40: ")
        assert "val/loss 0.1250, val/behaviour 2.0000, val_unseen/accuracy 0.7500;" in best
        assert "best so far: reconstruction, step 8" in worse

    def test_fast_validations_are_printed_if_they_are_the_best(self, progress, lines):
        for validation in (BEST, WORSE, BEST):
            progress.validated(validation)
        assert [line.partition("; ")[2] for line in lines()] == ["the best so far"] * 2

    def test_several_datasets_are_numbered(self, progress, lines):
        progress.command_started(["one", "two"])
        progress.outcome("two", "failed", "failed: no such file")
        assert lines() == ["[2/2] two: failed: no such file"]

    def test_a_single_dataset_has_a_line_if_it_is_skipped(self, progress, lines):
        progress.command_started(["one"])
        progress.outcome("one", "done", "done in 3 s")
        progress.outcome("one", "skipped", "done already")
        assert lines() == ["one: done already"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_metrics_of_an_objective_of_another_package_are_all_shown():
    own = Validation("cosine", (2, 60), {"val/distance": 0.25}, ("cosine", 2), "generator")
    assert "val/distance 0.25" in measured(own)


class TestTerminal:
    @pytest.fixture
    def terminal(self, monkeypatch):
        """`terminal()`: from now on stderr is a terminal. (pytest sets its own before the test.)"""

        def replace():
            monkeypatch.setattr(sys, "stderr", Terminal())
            monkeypatch.setenv("COLUMNS", "200")
            return sys.stderr

        return replace

    def test_validations_stand_above_the_bar(self, terminal):
        stderr, progress = terminal(), terminal_progress()
        assert isinstance(progress, TerminalProgress)
        progress.training_started("generator", 100)
        progress.step(STEP)
        progress.validated(BEST)
        progress.training_ended("generator")
        assert "generator: validated after reconstruction, step 8/40" in stderr.getvalue()
        assert figures(STEP) in stderr.getvalue()

    def test_several_datasets_leave_a_line_each(self, terminal):
        stderr, progress = terminal(), terminal_progress()
        progress.command_started(["one", "[two]"])
        for name in ("one", "[two]"):
            progress.training_started(name, 9)
            progress.step(step(3, name))
            progress.outcome(name, "done", "done in 3 s")
        progress.command_ended()
        text = stderr.getvalue()
        assert "[1/2] one: done in 3 s" in text
        assert "[2/2] [two]: done in 3 s" in text
        assert "2 of 2" in text

    def test_outcomes_without_a_training_and_between_trainings_are_counted(self, terminal):
        stderr, progress = terminal(), terminal_progress()
        progress.command_started(["one", "two", "three"])
        progress.outcome("one", "skipped", "finished already")
        progress.training_started("two", 9)
        progress.step(step(3, "two"))
        progress.training_ended("two")
        progress.outcome("two", "done", "done in 3 s")
        progress.training_started("three", 9)
        progress.outcome("three", "failed", "failed: no such file")
        progress.command_ended()
        progress.command_ended()
        assert "3 of 3" in stderr.getvalue()

    def test_only_the_first_process_of_a_launcher_shows_progress(self, terminal, monkeypatch):
        terminal()
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert type(terminal_progress()) is Silent
