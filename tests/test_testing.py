"""The contract checks catch what they promise to catch: each bad plugin breaks one promise."""
# ruff: noqa: ARG005  # a stand-in ignores what the real one would use

import pytest
import torch
from pydantic import BaseModel, Field
from torch import nn

from loragen.core.protocols import Rate
from loragen.testing import check_decoder, check_encoder, check_logger, check_schedule, grid


class Options(BaseModel, extra="forbid"):
    size: int = Field(4, description="Values.")


class Schedule:
    Config = Options

    def __init__(self, config):
        self.calls = 0

    def __call__(self, step, total_steps):
        self.calls += 1
        return self.rate(step, total_steps)

    def rate(self, step, total_steps):
        return Rate(1e-4, 1)


class Decoder(nn.Module):
    Config = Options

    def __init__(self, config, condition_dim, grid):
        super().__init__()
        self.shape = (grid.tokens, grid.token_dim)
        self.linear = nn.Linear(condition_dim, grid.tokens * grid.token_dim)

    def forward(self, condition, mask):
        return self.linear(self.pool(condition, mask)).view(-1, *self.shape)

    def pool(self, condition, mask):
        kept = mask[..., None]
        return (condition * kept).sum((1, 2)) / kept.sum((1, 2))


class Encoder(nn.Module):
    Config = Options
    dim = 4
    fingerprint = "f"
    frozen = True

    def __init__(self, config):
        super().__init__()

    def forward(self, texts):
        values = [[[float(len(text)), 1.0, 2.0, 3.0]] for text in texts]
        return torch.tensor(values), torch.ones(len(texts), 1, dtype=torch.bool)


def variant(base, **attributes):
    return type(base.__name__, (base,), attributes)


class Undescribed(BaseModel, extra="forbid"):
    size: int = 4


class Lenient(BaseModel):
    size: int = Field(4, description="Values.")


def test_what_keeps_its_promises_passes():
    check_schedule(Schedule, size=2)
    check_decoder(Decoder)
    check_encoder(Encoder)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"Config": Undescribed}, "Config.size has no description"),
        ({"Config": Lenient}, "accepts unknown options"),
        ({"rate": lambda self, step, total: Rate(0.0, 1)}, "gives 0.0"),
        ({"rate": lambda self, step, total: Rate(float("nan"), 1)}, "gives nan"),
        ({"rate": lambda self, step, total: Rate(1e-4, 0)}, "counted from 1"),
        ({"rate": lambda self, step, total: Rate(1e-4, 2 - step // total)}, "goes back from"),
        ({"rate": lambda self, step, total: Rate(torch.tensor(1.0), 1)}, "plain numbers"),
        ({"rate": lambda self, step, total: Rate(1.0 / self.calls, 1)}, "differently the second"),
    ],
)
def test_schedule(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_schedule(variant(Schedule, **attributes))


def over_the_batch(self, condition, mask):
    return Decoder.pool(self, condition, mask) + condition.mean()


def initialise_with_unused(self, config, condition_dim, grid):
    Decoder.__init__(self, config, condition_dim, grid)
    self.unused = nn.Linear(1, 1)


def initialise_with_hidden_state(self, config, condition_dim, grid):
    Decoder.__init__(self, config, condition_dim, grid)
    self.hidden = torch.randn(grid.tokens, grid.token_dim)


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"pool": lambda self, c, mask: c.mean((1, 2))}, "masked values change the output"),
        ({"pool": lambda self, c, mask: (c * mask[..., None]).mean((1, 2))}, "appended"),
        ({"pool": over_the_batch}, "masked values|depends on its batch"),
        ({"pool": lambda self, c, mask: Decoder.pool(self, c, mask).detach()}, "the condition"),
        ({"pool": lambda self, c, mask: c[:, 0, 0] + torch.randn(1)}, "not deterministic"),
        ({"forward": lambda self, c, mask: self.linear(self.pool(c, mask))}, "3 prompts|1 prompts"),
        ({"__init__": initialise_with_unused}, "no gradient reaches unused.weight"),
        (
            {
                "__init__": initialise_with_hidden_state,
                "forward": lambda self, c, mask: Decoder.forward(self, c, mask) + self.hidden,
            },
            "something is not in it",
        ),
    ],
)
def test_decoder(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_decoder(variant(Decoder, **attributes))


def beside_others(self, texts):
    embeddings, mask = Encoder.forward(self, texts)
    return embeddings + len(texts), mask


def inference(self, texts):
    with torch.inference_mode():
        return Encoder.forward(self, texts)


def changed(part, change):
    def forward(self, texts):
        answer = list(Encoder.forward(self, texts))
        answer[part] = change(answer[part])
        return tuple(answer)

    return forward


@pytest.mark.parametrize(
    "attributes, message",
    [
        ({"forward": beside_others}, "differently beside others"),
        ({"forward": inference}, "inference tensors"),
        ({"forward": changed(0, lambda e: e[:, 0])}, "must give"),
        ({"forward": changed(0, torch.Tensor.long)}, "torch.int64 embeddings"),
        ({"forward": changed(1, torch.Tensor.float)}, "must be boolean"),
        ({"forward": changed(1, torch.zeros_like)}, "masks a whole text"),
        ({"dim": 5}, "dim is 5"),
        ({"fingerprint": 7}, "fingerprint must be"),
        ({"fingerprint": property(lambda self: str(id(self)))}, "equal fingerprints"),
        ({"frozen": "no"}, "frozen must be True or False"),
        ({"frozen": False}, "frozen is False, and 0 parameters require gradients"),
    ],
)
def test_encoder(attributes, message):
    with pytest.raises(AssertionError, match=message):
        check_encoder(variant(Encoder, **attributes))


class Logger:
    Config = Options
    run_id = None

    def __init__(self, config):
        pass

    def open(self, run):
        from lightning.pytorch.loggers import CSVLogger

        self.place = self.where(run)
        return CSVLogger(self.place, name="", version="")

    def where(self, run):
        return run.directory

    closed = None

    def close(self, status):
        self.closed = status


@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # a run that goes on
def test_logger_that_keeps_its_promises(tmp_path):
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
def test_logger(attributes, message, tmp_path):
    with pytest.raises(AssertionError, match=message):
        check_logger(variant(Logger, **attributes), tmp_path)


def test_the_grid_counts_from_zero_without_gaps():
    small = grid(layers=2, modules=3, positions=4, token_dim=5)
    assert (small.tokens, small.token_dim) == (48, 5)
    for axis, size in (("layer", 2), ("module", 3), ("matrix", 2), ("position", 4)):
        assert sorted(set(getattr(small, axis).tolist())) == list(range(size))
