import json

import pytest


@pytest.fixture
def run(collection):
    return collection.runs["colors"]


def test_the_layout_of_a_runs_newest_checkpoint(loragen, run):
    result = loragen("ckpt", "test", run, "--token-dim", "16")
    assert result.exit_code == 0, result.output
    assert "checkpoint-step-008.ckpt" in result.stdout
    assert "self_attn.q_proj" in result.stdout
    assert "1,856 values in 28 tensors" in result.stdout
    assert "116 tokens of 16, 100.0% filled" in result.stdout
    assert "round trip: exact, bit for bit (0 values changed, largest error 0)" in result.stdout


def test_the_original_spelling_as_json(loragen, run):
    file = run / "checkpoints" / "checkpoint-step-005.ckpt"
    sizes = ("--max_tokens", "512", "--token_dim", "16")
    result = loragen("ckpt", "test", "--checkpoint_file", file, *sizes, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["file"] == str(file)
    assert (report["tokens"], report["max_tokens"], report["fits"]) == (116, 512, True)
    assert sum(kind["tensors"] * kind["tokens_each"] for kind in report["kinds"]) == 116
    assert (report["bits_changed"], report["largest_error"]) == (0, 0.0)


def test_too_few_tokens_name_the_size_that_fits(loragen, run):
    given = ("ckpt", "test", run / "adapter", "--token-dim", "16")
    result = loragen(*given, "--max-tokens", "115")
    assert result.exit_code == 1
    assert "116 tokens of 16" in result.stdout  # shown all the same
    assert "--max-tokens is 115 and it needs 116 tokens of 16 values" in result.stderr
    assert "give 116 or auto" in result.stderr
    assert json.loads(loragen(*given, "--max-tokens", "115", "--json").stdout)["fits"] is False
    assert loragen(*given, "--max-tokens", "116").exit_code == 0


@pytest.mark.parametrize("most", ["0", "-1", "many", "1.5"])
def test_max_tokens_is_a_count_or_auto(fails, run, most):
    error = fails(2, "ckpt", "test", run, "--max-tokens", most)
    assert error == f"--max-tokens: a whole number above 0, or auto (got {most})"


def test_one_file_is_asked_for(fails, run):
    assert "which checkpoint?" in fails(2, "ckpt", "test")
    assert "which checkpoint?" in fails(2, "ckpt", "test", run, "--checkpoint-file", run)
    assert fails(2, "ckpt", "test", "none") == "none: no such checkpoint"
