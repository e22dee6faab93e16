import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragen.core.errors import DataError, LoragenError
from loragen.core.generator.model import Generator
from loragen.core.run.directory import checkpoint_files, generator_file

PROMPTS = ["Question 1 about red?", "Question 2 about red?", "What is it?"]


@pytest.fixture
def file(experiment):
    return generator_file(experiment)


@pytest.fixture
def generator(file):
    return Generator.load(file)


def equal(one, other):
    return one.keys() == other.keys() and all(one[key].equal(other[key]) for key in one)


def test_what_is_saved_generates_the_same_after_loading(generator, tmp_path):
    first = generator.generate(PROMPTS)
    generator.save(tmp_path / "again" / "generator_model.pt")
    again = Generator.load(tmp_path / "again" / "generator_model.pt")
    second = again.generate(PROMPTS)
    assert equal(first.tensors, second.tensors)
    assert first.config == second.config


def test_the_file_is_plain_data_and_tensors(file):
    document = torch.load(file, weights_only=True)
    assert document["format_version"] == 4
    assert document["encoder"]["name"] == "sbert"
    assert document["decoder"]["name"] == "hyperconv"
    assert document["layout"]["token_dim"] == 16
    assert document["samples_per_prompt"] == 2
    assert document["provenance"]["kind"] == "generator"


def test_the_adapter_has_the_shapes_and_the_configuration_of_the_collection(generator, collection):
    from loragen.core.adapter.files import read_adapter

    trained = read_adapter(collection.runs["colors"] / "adapter")
    adapter = generator.generate(PROMPTS)
    assert adapter.config == trained.config
    shapes = {key: (t.shape, t.dtype) for key, t in trained.tensors.items()}
    assert {key: (t.shape, t.dtype) for key, t in adapter.tensors.items()} == shapes
    assert all(t.isfinite().all() for t in adapter.tensors.values())


@pytest.mark.parametrize("count", [1, 2, 5, 40])
def test_any_number_of_prompts_is_accepted(generator, count):
    prompts = [f"prompt {i}" for i in range(count)]
    adapter = generator.generate(prompts)
    assert len(adapter.tensors) == 28


def test_the_adapter_depends_on_the_prompts(generator):
    one = generator.generate(["red green blue"] * 2).tensors
    assert equal(one, generator.generate(["red green blue"] * 2).tensors)
    assert not equal(one, generator.generate(["a cat and a dog"] * 2).tensors)


def test_an_encoder_with_other_weights_is_refused(generator, sbert_dir, tmp_path):
    other = shutil.copytree(sbert_dir, tmp_path / "sbert")
    weights = next(other.rglob("model.safetensors"))
    tensors = load_file(weights)
    next(iter(tensors.values())).add_(1.0)
    save_file(tensors, weights, metadata={"format": "pt"})
    generator.encoder.options["model"] = str(other)
    with pytest.raises(LoragenError, match=r"encoder sbert .*other weights") as error:
        _ = generator.text_encoder
    assert "\n" not in str(error.value)


def test_a_moved_encoder_with_the_same_weights_is_accepted(generator, sbert_dir, tmp_path):
    other = shutil.copytree(sbert_dir, tmp_path / "sbert")
    generator.encoder.options["model"] = str(other)
    assert generator.text_encoder.fingerprint == generator.encoder_fingerprint


def test_a_newer_format_is_refused(file, tmp_path):
    document = {**torch.load(file, weights_only=True), "format_version": 99}
    torch.save(document, tmp_path / "new.pt")
    with pytest.raises(DataError, match=r"new\.pt: format 99.*upgrade"):
        Generator.load(tmp_path / "new.pt")


def test_a_file_without_familiarity_still_generates(generator, file, tmp_path):
    document = {**torch.load(file, weights_only=True), "familiarity": None}
    torch.save(document, tmp_path / "one-text.pt")
    adapter = Generator.load(tmp_path / "one-text.pt").generate(PROMPTS)
    assert equal(adapter.tensors, generator.generate(PROMPTS).tensors)
    assert adapter.origin.distance is adapter.origin.warning() is None


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_an_older_format_is_refused(file, tmp_path, version):
    document = {**torch.load(file, weights_only=True), "format_version": version}
    torch.save(document, tmp_path / "old.pt")
    with pytest.raises(DataError, match=rf"old\.pt: format {version}.*train it again"):
        Generator.load(tmp_path / "old.pt")


def test_options_that_the_installed_decoder_lacks_are_one_line_with_the_file(file, tmp_path):
    document = torch.load(file, weights_only=True)
    document["decoder"]["options"]["threshold"] = 0.4
    torch.save(document, tmp_path / "generator_model.pt")
    with pytest.raises(DataError, match=r"generator_model.pt.*threshold") as caught:
        Generator.load(tmp_path / "generator_model.pt")
    assert "\n" not in str(caught.value)


def test_weights_of_another_decoder_are_refused_with_what_to_do(file, tmp_path):
    document = dict(torch.load(file, weights_only=True))
    document["state_dict"] = {f"old.{k}": v for k, v in document["state_dict"].items()}
    torch.save(document, tmp_path / "old.pt")
    with pytest.raises(DataError, match=r"old\.pt: .*decoder hyperconv.*\(loragen "):
        Generator.load(tmp_path / "old.pt")


def broken(file, collection, kind, path):
    if kind == "text":
        path.write_text("not a generator", encoding="utf-8")
    elif kind == "empty":
        path.touch()
    elif kind == "cut off":
        path.write_bytes(file.read_bytes()[:5000])
    elif kind == "a LoRA checkpoint":
        shutil.copy(checkpoint_files(collection.runs["colors"])[0], path)
    elif kind == "a tensor":
        torch.save(torch.zeros(3), path)
    elif kind == "a list":
        torch.save([1, 2], path)
    elif kind in ("state_dict", "condition_dim", "base_model", "encoder_fingerprint"):
        document = torch.load(file, weights_only=True)
        del document[kind]
        torch.save(document, path)
    elif kind == "other weights":
        document = torch.load(file, weights_only=True)
        document["state_dict"].popitem()
        torch.save(document, path)


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "empty",
        "cut off",
        "a LoRA checkpoint",
        "a tensor",
        "a list",
        "state_dict",
        "condition_dim",
        "base_model",
        "encoder_fingerprint",
        "other weights",
    ],
)
def test_what_is_not_a_generator_is_one_line(file, collection, kind, tmp_path):
    path = tmp_path / "bad.pt"
    broken(file, collection, kind, path)
    with pytest.raises(
        DataError, match=r"bad\.pt: (not a |expected |truncated|it is empty)"
    ) as error:
        Generator.load(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("provenance.plugins", None, "provenance.plugins: Input should be a valid list"),
        ("provenance.plugins", [{"kind": "decoder"}], "provenance.plugins.0.name: Field required"),
        ("provenance.sources", [1], "provenance.sources.0: Input should be a valid string"),
        (
            "familiarity.datasets",
            ["one"],
            r"familiarity.centres is \[2, 16\] .* expected \[1, 16\]",
        ),
        ("familiarity.noise", torch.ones(1), "familiarity.noise is"),
        ("normalization.mean", torch.ones(3, 4), "normalization.mean is"),
        ("normalization.scale", [1.0], "normalization.scale: "),
        ("adapter_config.r", "x", "adapter_config: r must be a whole number"),
        ("adapter_config", [], "adapter_config: Input should be a valid dictionary"),
        ("layout.token_dim", 0, "layout.token_dim: Input should be greater than 0"),
        ("layout.tensors", [], "layout.tensors: "),
        ("layout.tensors", [["x.lora_A.weight", [1, 2], "load"]], "must be torch.dtype"),
        ("condition_dim", 2**40, r"expected \[2, 1099511627776\]"),
        ("samples_per_prompt", -1, "samples_per_prompt: Input should be greater than 0"),
        ("format_version", "4", "not a generator file: TypeError"),
        ("format_version", None, "not a generator file: TypeError"),
        ("state_dict", None, "state_dict: Input should be a valid dictionary"),
        ("encoder", "sbert", "encoder: "),
        ("decoder.options", {"hidden_dim": []}, "decoder hyperconv: hidden_dim: Input should be"),
    ],
)
def test_a_value_that_cannot_be_is_named(file, tmp_path, place, value, said):
    document = holder = torch.load(file, weights_only=True)
    *path, last = place.split(".")
    for key in path:
        holder = holder[key]
    holder[last] = value
    torch.save(document, tmp_path / "bad.pt")
    with pytest.raises(LoragenError, match=said) as error:
        Generator.load(tmp_path / "bad.pt")
    assert "\n" not in str(error.value)


def test_loading_runs_no_code(tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    torch.save({"format_version": 1, "x": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(DataError, match="loads safely"):
        Generator.load(tmp_path / "bad.pt")
    assert not (tmp_path / "mark").exists()
