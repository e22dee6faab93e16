import pytest

from loragen.core.data.tokenize import Example
from loragen.core.errors import UsageError
from loragen.core.lora.data import LoraDataModule, Rows, load_rows
from loragen.core.lora.train import new_adapter


class FakeTrainer:
    """What a data module asks of one."""

    global_step, global_rank = 0, 0

    def __init__(self, parts=1, ranks=1):
        self.accumulate_grad_batches, self.world_size = parts, ranks


@pytest.fixture
def module():
    def make(trainer, **settings):
        examples = [Example([5, 6, 7], 1)] * 6
        rows = Rows(examples, [], [], record=None)
        made = LoraDataModule(
            rows, **{"batch_size": 4, "max_steps": 8, "seed": 0, "pad_id": 0, "packing": False}
            | settings
        )  # fmt: skip
        made.trainer = trainer
        return made

    return make


@pytest.mark.parametrize("parts, ranks", [(3, 1), (1, 3), (2, 4)])
def test_a_step_that_does_not_divide_among_the_devices_is_refused(module, parts, ranks):
    """How many there are is known only now: `devices: auto`."""
    with pytest.raises(UsageError, match=f"multiple of {ranks} devices x {parts}"):
        module(None).check_shared(ranks, parts)


@pytest.mark.parametrize("limit, steps", [(None, 8), (5, 2), (6, 3), (0.5, 4), (99, 8)])
def test_a_limit_ends_after_whole_steps(module, limit, steps):
    loader = module(FakeTrainer(parts=2), limit=limit).train_dataloader()
    assert len(list(loader)) == steps * 2


@pytest.mark.parametrize("limit", [1, 0.01])
def test_a_limit_below_one_step_is_refused(module, limit):
    with pytest.raises(UsageError, match="leaves no whole step"):
        module(None, limit=limit).check_shared(1, 2)


def test_rows_that_lose_a_part_of_their_prompt_are_counted(lora_config, base, dataset, caplog):
    file = dataset([{"prompt": "q" * n, "response": "red"} for n in (3, 90, 3, 91)])
    load_rows(lora_config(), "colors", file, base.tokenizer)
    (record,) = caplog.records
    assert "2 of 4 rows are longer than data.max_length 64" in record.getMessage()


def test_one_misspelt_module_of_several_is_refused(lora_config, base):
    config = lora_config({"lora.target_modules": ["q_proj", "v_porj"]})
    before = list(base.model.state_dict())
    with pytest.raises(UsageError, match="v_porj not found in the base, only q_proj"):
        new_adapter(base, config)
    assert list(base.model.state_dict()) == before
