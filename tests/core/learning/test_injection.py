import pytest
import torch

from loragen.core.adapter.files import file_keys, peft_config, plain_config
from loragen.core.adapter.layout import Layout
from loragen.core.config.schema import LoraSection
from loragen.core.errors import LoragenError
from loragen.core.learning.objectives.behaviour import Injection


@pytest.fixture
def adapted(base):
    """(PeftModel, its configuration, a layout of its adapter) of the tiny base."""
    from peft import get_peft_model

    model = get_peft_model(base.model, peft_config(LoraSection(rank=2, alpha=6))).eval()
    tensors = file_keys({n: p for n, p in model.named_parameters() if p.requires_grad})
    return model, plain_config(model.peft_config["default"]), Layout.of(tensors, 16)


def drawn(layout, several):
    generator = torch.Generator().manual_seed(0)
    tokens = 0.3 * torch.randn(several, layout.tokens, layout.token_dim, generator=generator)
    return tokens.requires_grad_()


def test_it_is_functional_call_with_each_adapter_in_turn(adapted):
    """Logits and gradients, of three adapters with two rows each."""
    model, config, layout = adapted
    ids = torch.randint(0, 200, (6, 5), generator=torch.Generator().manual_seed(1))
    tokens = drawn(layout, 3)
    plain = model.unload()
    injection = Injection(plain, layout, config)
    with injection.injected(layout.unpack_several(tokens)):
        together = plain(input_ids=ids).logits
    together.square().mean().backward()
    gradient, tokens.grad = tokens.grad, None
    assert injection.scaling == dict.fromkeys(injection.modules, 3.0)

    from peft import get_peft_model

    peft = get_peft_model(plain, peft_config(LoraSection(rank=2, alpha=6))).eval()
    alone = []
    for index, one in enumerate(tokens):
        live = {
            key.replace(".weight", ".default.weight"): value[0]
            for key, value in layout.unpack_several(one[None]).items()
        }
        rows = ids[2 * index : 2 * index + 2]
        alone.append(torch.func.functional_call(peft, live, (rows,)).logits)
    alone = torch.cat(alone)
    alone.square().mean().backward()
    assert torch.allclose(together, alone, atol=1e-5)
    assert not torch.allclose(together[:2], together[2:4], atol=1e-2)
    assert torch.allclose(gradient, tokens.grad, atol=1e-6)
    assert gradient.abs().max() > 1e-4


def test_nothing_stays_behind(adapted):
    model, config, layout = adapted
    plain, ids = model.unload(), torch.tensor([[1, 2, 3]])
    before = plain(input_ids=ids).logits
    injection = Injection(plain, layout, config)
    with (
        pytest.raises(LoragenError, match="2 adapters do not share equally"),
        injection.injected(layout.unpack_several(drawn(layout, 2))),
    ):
        plain(input_ids=torch.ones(3, 5, dtype=torch.long))  # 15 tokens do not part in two
    assert plain(input_ids=ids).logits.equal(before)


def test_a_base_without_the_modules_is_refused(base):
    layout = Layout.of({"base_model.model.model.gate.lora_A.weight": torch.ones(2, 32)}, 16)
    with pytest.raises(LoragenError, match=r"the base has no module model\.gate"):
        Injection(base.model, layout, {"r": 2, "lora_alpha": 4})


def test_a_module_that_does_not_see_the_whole_batch_is_refused(adapted):
    """As the routed experts of a mixture, and the output layer, which sees the answers alone."""
    model, config, layout = adapted
    injection = Injection(model.unload(), layout, config)
    path = next(iter(injection.modules))
    with (
        injection.injected(layout.unpack_several(drawn(layout, 2))),
        pytest.raises(LoragenError, match="2 adapters do not share equally"),
    ):
        injection.modules[path](torch.ones(1, 4, injection.modules[path].in_features))


def test_the_output_layer_is_refused(base):
    layout = Layout.of({"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}, 16)
    with pytest.raises(LoragenError, match="lm_head: adapters on the output layer"):
        Injection(base.model, layout, {"r": 2, "lora_alpha": 4})
