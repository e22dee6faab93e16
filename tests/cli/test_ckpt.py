import json
import shutil

import pytest
import torch


@pytest.fixture
def run(collection):
    return collection.runs["colors"]


def damaged(run, directory):
    """A copy of the run with a NaN in one checkpoint."""
    copy = shutil.copytree(run, directory / "damaged")
    file = copy / "checkpoints" / "checkpoint-step-006.ckpt"
    document = torch.load(file, weights_only=True)
    next(iter(document["state_dict"].values()))[0, 0] = float("nan")
    torch.save(document, file)
    return copy


def test_one_json_document(loragen, run):
    result = loragen("ckpt", "analyze", run, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["path"] == str(run)
    assert (report["checkpoints"], report["values"], report["scaling"]) == (4, 1856, 2.0)
    assert len(report["drift"]) == 4
    assert result.stderr == ""


def test_several_paths_are_a_list(loragen, run):
    result = loragen("ckpt", "analyze", run, run / "adapter", "--json")
    reports = json.loads(result.stdout)
    assert [report["checkpoints"] for report in reports] == [4, 1]


def test_a_table_shows_the_first_and_the_last(loragen, run):
    result = loragen("ckpt", "analyze", run)
    assert result.exit_code == 0, result.output
    assert "4 checkpoints, " in result.stdout
    assert "1,856 values in 28 tensors (float32); scaling 2" in result.stdout
    assert "... 2 more (--all shows them) ..." in result.stdout  # 14 modules
    assert "model.layers.1.mlp.up_proj" in result.stdout
    assert "checkpoint-step-008.ckpt" in result.stdout
    assert "NaN or infinity: none" in result.stdout
    every = loragen("ckpt", "analyze", run, "--all").stdout
    assert "more (--all" not in every
    assert every.count("_proj") == 14


def test_a_tensor_that_is_not_finite_is_exit_code_1(loragen, run, tmp_path):
    copy = damaged(run, tmp_path)
    result = loragen("ckpt", "analyze", copy)
    assert result.exit_code == 1
    assert "NaN or infinity: \n  checkpoint-step-006.ckpt: base_model.model" in result.stdout
    result = loragen("ckpt", "analyze", copy, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)  # NaN is no JSON
    assert len(report["not_finite"]) == 1
    assert report["drift"][1]["norm_delta"] is None


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_nothing_there_is_a_usage_error(fails, json_flag):
    error = fails(2, "ckpt", "analyze", "none", *json_flag)
    assert error == "none: no checkpoints or adapters there"


def test_a_broken_file_is_one_line(fails):
    (fails.loragen.work / "x.ckpt").write_bytes(b"broken")
    assert fails(1, "ckpt", "analyze", "x.ckpt").startswith("x.ckpt: not a checkpoint that loads")
