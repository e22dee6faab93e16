from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loragen.core.adapter.files import peft_config
from loragen.core.base.checkpointing import gradient_checkpointing, transformer_layers
from loragen.core.config.schema import LoraSection
from loragen.core.errors import LoragenError

IDS = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])


@pytest.fixture
def model(base):
    """The frozen base with a LoRA that drops a half of its input."""
    from peft import get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(base.model, peft_config(LoraSection(rank=2, alpha=4, dropout=0.5)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def saved_values(model):
    """The loss, the gradients, and the number of values that were kept for the backward pass."""
    kept = 0

    def count(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = model(input_ids=IDS, use_cache=False).logits.square().mean()
    return loss, kept


def gradients(model, loss):
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_results_are_equal_and_less_is_kept(model):
    """With dropout, which draws the same values again, and although no input needs a gradient."""
    loss, kept = saved_values(model)
    wanted = gradients(model, loss)
    with gradient_checkpointing(model):
        checkpointed, kept_now = saved_values(model)
    found = gradients(model, checkpointed)
    assert checkpointed.equal(loss)
    assert found.keys() == wanted.keys()
    assert all(found[name].equal(gradient) for name, gradient in wanted.items())
    assert any(gradient.abs().max() > 0 for gradient in wanted.values())
    assert kept_now < kept / 2


def test_the_model_is_as_before(model):
    forward = type(transformer_layers(model)[0]).forward
    with pytest.raises(KeyError), gradient_checkpointing(model):
        assert "forward" in vars(transformer_layers(model)[0])
        raise KeyError
    assert all(layer.forward.__func__ is forward for layer in transformer_layers(model))


def test_a_layer_keeps_a_forward_of_its_own(model):
    """accelerate sets one on the layers of a quantised base, which moves their inputs."""
    layer = transformer_layers(model)[0]
    layer.forward = own = layer.forward
    with gradient_checkpointing(model):
        assert layer.forward is not own
    assert vars(layer)["forward"] is own


def test_a_model_without_a_list_of_layers_is_refused():
    model = nn.Linear(2, 2)
    text = SimpleNamespace(num_hidden_layers=3)
    model.config = SimpleNamespace(get_text_config=lambda: text)
    with pytest.raises(LoragenError, match="Linear has no list of its 3 layers"):
        gradient_checkpointing(model).__enter__()
