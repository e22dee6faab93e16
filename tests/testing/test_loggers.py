# ruff: noqa: ARG005  # a stand-in ignores what the real one would use

import pytest

from loragen.testing import check_logger

from .stand_ins import Options, variant


class Logger:
    Config = Options
    run_id = None

    def __init__(self, config):
        pass

    def open(self, run):
        from lightning.pytorch.loggers import CSVLogger

        return CSVLogger(self.where(run), name="", version="")

    def where(self, run):
        return run.directory

    closed = None

    def close(self, status):
        self.closed = status


@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # a resumed run
def test_a_correct_logger_passes(tmp_path):
    check_logger(Logger, tmp_path)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"where": lambda self, run: "."}, "writes outside the run directory"),
        ({"where": lambda self, run: run.directory.parent}, "writes outside the run directory"),
        ({"run_id": "same"}, "two runs one run_id"),
        ({"run_id": property(lambda self: f"after {self.closed}")}, "changes at close"),
        ({"where": lambda self, run: run.directory if run.resume_step == 0 else "."}, "outside"),
        ({"run_id": 7}, "run_id is 7"),
        ({"open": lambda self, run: None}, "must give a lightning.pytorch Logger"),
    ],
)
@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_a_broken_contract_is_named(attributes, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        check_logger(variant(Logger, **attributes), tmp_path)
