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
    document = json.loads(result.stdout)
    assert document.keys() == {"collections", "comparisons", "not_compared", "twins"}
    (report,) = document["collections"]
    assert report["path"] == str(run)
    assert (report["checkpoints"], report["values"], report["scaling"]) == (4, 1856, 2.0)
    assert len(report["drift"]) == len(report["sample"]["cosine"]) == 4
    assert 1 <= report["modules"][0]["effective_rank"] <= 2
    assert report["detour"] >= 1
    assert result.stderr == ""


def test_the_original_spelling_works_and_nothing_named_is_told(loragen, run):
    result = loragen("ckpt", "analyze", "--checkpoint_dir", run / "checkpoints", "--json")
    assert json.loads(result.stdout)["collections"][0]["checkpoints"] == 4
    result = loragen("ckpt", "analyze")
    assert result.exit_code == 2
    assert "nothing to analyse: name a run" in result.stderr


def test_several_collections_are_compared(loragen, collection):
    result = loragen("ckpt", "analyze", *collection.runs.values(), "--json")
    document = json.loads(result.stdout)
    assert [report["checkpoints"] for report in document["collections"]] == [4, 4]
    (comparison,) = document["comparisons"]
    assert comparison["collections"] == [run.name for run in collection.runs.values()]
    text = loragen("ckpt", "analyze", *collection.runs.values()).stdout
    assert "mean ‖ΔW‖" in text
    assert "cosine of the last ΔW" in text
    assert "1.000" in text


def test_a_folder_of_runs_is_all_of_them(loragen, collection):
    folder = next(iter(collection.runs.values())).parent
    document = json.loads(loragen("ckpt", "analyze", folder, "--json").stdout)
    assert len(document["collections"]) == 2


def test_a_table_shows_the_first_and_the_last(loragen, run):
    result = loragen("ckpt", "analyze", run)
    assert result.exit_code == 0, result.output
    assert "4 checkpoints, " in result.stdout
    assert "1,856 values in 28 tensors (float32); scaling 2" in result.stdout
    assert "... 2 more (--all shows them) ..." in result.stdout  # 14 modules
    assert "model.layers.1.mlp.up_proj" in result.stdout
    assert "checkpoint-step-008.ckpt" in result.stdout
    assert "times the straight line" in result.stdout
    assert "NaN or infinity: none" in result.stdout
    every = loragen("ckpt", "analyze", run, "--all").stdout
    assert "more (--all" not in every
    assert every.count("_proj") == 14


def test_many_collections_are_not_shown_module_by_module(loragen, run):
    files = sorted((run / "checkpoints").glob("checkpoint*"))
    text = loragen("ckpt", "analyze", *files).stdout
    assert "_proj" not in text
    assert "cosine of the last ΔW" in text
    assert "model.layers.0.self_attn.q_proj" in loragen("ckpt", "analyze", *files, "--all").stdout


def test_a_tensor_that_is_not_finite_is_exit_code_1(loragen, run, tmp_path):
    copy = damaged(run, tmp_path)
    result = loragen("ckpt", "analyze", copy)
    assert result.exit_code == 1
    assert "NaN or infinity: \n  checkpoint-step-006.ckpt: base_model.model" in result.stdout
    result = loragen("ckpt", "analyze", copy, "--json")
    assert result.exit_code == 1
    (report,) = json.loads(result.stdout)["collections"]  # NaN is no JSON
    assert len(report["not_finite"]) == 1
    assert report["drift"][1]["norm_delta"] is None
    assert len(report["sample"]["checkpoints"]) == 3  # the others are still compared


def test_the_page_is_written_beside_the_answer(loragen, run):
    result = loragen("ckpt", "analyze", run / "adapter", "--html", "out/page.html", "--json")
    assert result.exit_code == 0, result.output
    json.loads(result.stdout)
    assert result.stderr == "wrote out/page.html\n"
    assert (loragen.work / "out" / "page.html").read_text(encoding="utf-8").startswith("<!doctype")


def test_a_page_is_replaced_only_with_force(fails, run):
    page = fails.loragen.work / "page.html"
    page.write_text("mine", encoding="utf-8")
    error = fails(2, "ckpt", "analyze", run, "--html", "page.html")
    assert error == "page.html exists already; choose another place or add --force"
    assert page.read_text(encoding="utf-8") == "mine"
    forced = fails.loragen("ckpt", "analyze", run / "adapter", "--html", page, "--force")
    assert forced.exit_code == 0, forced.output
    assert page.read_text(encoding="utf-8") != "mine"
    assert "is a directory" in fails(2, "ckpt", "analyze", run, "--html", ".", "--force")


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_nothing_there_is_a_usage_error(fails, json_flag):
    error = fails(2, "ckpt", "analyze", "none", *json_flag)
    assert error == "none: no checkpoints or adapters there"
    (fails.loragen.work / "empty").mkdir()
    error = fails(2, "ckpt", "analyze", "empty", *json_flag)
    assert error == "empty: no checkpoints or adapters there"


def test_a_broken_file_is_one_line(fails):
    (fails.loragen.work / "x.ckpt").write_bytes(b"broken")
    assert fails(1, "ckpt", "analyze", "x.ckpt").startswith("x.ckpt: not a checkpoint that loads")
