import json
import os
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors import safe_open

import loragen
from loragen.core.adapter.files import read_adapter
from loragen.core.errors import LoragenError, UsageError
from loragen.core.generator.generated import Merger, Origin, adapter_card
from loragen.core.run.checkpoints import load_adapter

PROMPTS = [f"Question {i} about red?" for i in range(6)]
FAR = Origin("g", 2, "owner/base-1", "sbert", "hyperconv", 3, "0" * 64, datasets=["a", "b"],
             nearest_dataset="a", distance=1.7, far=True)  # fmt: skip


@pytest.fixture
def generator(experiment):
    return loragen.Generator.load(str(experiment))


@pytest.fixture
def adapter(generator):
    return generator.generate(PROMPTS)


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def test_a_repr_is_a_line_without_tensors(generator, adapter):
    assert repr(generator).startswith(f"<Generator {generator.name}: adapters of 1,856 values")
    assert repr(adapter).startswith("<GeneratedAdapter: 1,856 values")
    assert max(map(len, (repr(generator), repr(adapter)))) < 400


def test_generator_is_the_public_api(experiment, tmp_path):
    path = loragen.Generator.load(experiment).generate(PROMPTS).save(tmp_path / "adapter")
    assert read_adapter(path).config["r"] == 2


@pytest.mark.parametrize("name", ["adapter", "v1.2", "a.safetensors", "a.pt"])
def test_every_form_holds_the_same_tensors(adapter, tmp_path, name):
    path = adapter.save(str(tmp_path / name))
    assert equal(load_adapter(path).tensors, adapter.tensors)
    (tmp_path / "other").touch()
    weights = path / "adapter_model.safetensors" if path.is_dir() else path
    if os.name != "nt":
        assert weights.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_files_say_where_they_come_from(adapter, tmp_path, experiment):
    with safe_open(adapter.save(tmp_path / "a.safetensors"), "pt") as file:
        metadata = file.metadata()
    document = torch.load(adapter.save(tmp_path / "a.pt"), weights_only=True)
    assert json.loads(metadata["generated"]) == document["generated"]
    assert json.loads(metadata["adapter_config"]) == document["adapter_config"] == adapter.config
    origin = document["generated"]
    assert (origin["generator"], origin["prompts"]) == (experiment.name, 6)
    assert origin["datasets"] == ["animals", "colors"]
    assert [plugin["kind"] for plugin in origin["plugins"]] == ["encoder", "decoder"]


@pytest.mark.parametrize("name", ["adapter", "a.safetensors", "a.pt"])
def test_nothing_is_overwritten_unless_asked(adapter, tmp_path, name):
    path = adapter.save(tmp_path / name)
    with pytest.raises(UsageError, match="exists already"):
        adapter.save(path)
    assert adapter.save(path, overwrite=True) == path


def test_other_endings_of_weights_are_refused(adapter, tmp_path):
    with pytest.raises(UsageError, match=r"a\.bin: .*\.safetensors"):
        adapter.save(tmp_path / "a.bin")


def test_draws_are_averaged_token_by_token(generator):
    mean = generator.generate(PROMPTS, draws=3, prompts_per_draw=2, seed=5)
    assert (mean.origin.draws, mean.origin.prompts_per_draw, mean.origin.seed) == (3, 2, 5)
    from loragen.core.generator.requests import draw_prompts

    each = [generator.generate(drawn) for drawn in draw_prompts(PROMPTS, 3, 2, 5, usual=6)]
    for key, value in mean.tensors.items():
        expected = torch.stack([one.tensors[key] for one in each]).mean(0)
        torch.testing.assert_close(value, expected)
    again = generator.generate(PROMPTS, draws=3, prompts_per_draw=2, seed=5)
    assert equal(again.tensors, mean.tensors)


def test_it_attaches_to_a_model(adapter, base_dir):
    from loragen.core.base.load import load_base

    model = adapter.attach(load_base(str(base_dir)).model)
    assert model.peft_config["default"].r == 2
    adapter.tensors.popitem()
    with pytest.raises(LoragenError, match="missing"):
        adapter.attach(load_base(str(base_dir)).model)


def test_merged_models_answer_as_the_base_with_the_adapter(generator, base_dir, tmp_path):
    from transformers import AutoModelForCausalLM

    from loragen.core.base.load import load_base

    merger, ids = Merger(str(base_dir)), torch.arange(8).view(1, 8)
    for name, prompts in (("one", PROMPTS[:2]), ("other", ["a cat and a dog"])):
        adapter = generator.generate(prompts)
        merger.save(adapter, tmp_path / name)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.inference_mode():
            attached = adapter.attach(load_base(str(base_dir)).model)
            torch.testing.assert_close(model(ids).logits, attached(ids).logits)
    card = (tmp_path / "one" / "README.md").read_text(encoding="utf-8")
    assert "library_name: transformers" in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ("out of distribution", "1.7", "'a'")),
        (
            {"far": False, "vague": True, "prompts_per_draw": 4},
            ("too few prompts", "(4)", "at least 64"),
        ),
    ],
)
def test_prompts_unlike_those_of_the_training_are_warned_of(changes, words):
    warning = replace(FAR, training_prompts=64, **changes).warning()
    assert [word for word in words if word not in warning] == []


class TestCard:
    def test_the_front_matter_is_yaml_for_the_hub(self):
        _, front, text = adapter_card(FAR).split("---\n", 2)
        assert yaml.safe_load(front) == {
            "base_model": "owner/base-1",
            "base_model_relation": "adapter",
            "library_name": "peft",
            "pipeline_tag": "text-generation",
            "tags": ["base_model:adapter:owner/base-1", "lora", "loragen", "generated"],
        }
        assert "**Warning**: prompts are out of distribution" in text
        assert "2 datasets: a, b" in text
        assert 'AutoModelForCausalLM.from_pretrained("owner/base-1")' in text

    def test_only_a_hub_id_is_linked(self, base_dir):
        for base in ("demo", str(base_dir)):
            card = adapter_card(replace(FAR, base_model=base))
            assert "base_model:" not in card.split("---\n")[1]
        assert "resolve_base" in adapter_card(replace(FAR, base_model="demo"))

    def test_an_unknown_distance_is_stated(self):
        assert "is not known" in adapter_card(replace(FAR, distance=None, far=False))
