"""Series of checkpoints, one by one and compared."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

from loragen.core.adapter.files import read_adapter, write_adapter
from loragen.core.analysis import series as series_module
from loragen.core.analysis.report import ModuleReport
from loragen.core.analysis.series import analyze_checkpoints, damage, dead
from loragen.core.errors import DataError, UsageError
from loragen.core.files import natural_key
from loragen.core.run.checkpoints import load_adapter
from loragen.core.run.directory import checkpoint_files

A = "base_model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.layers.0.q_proj.lora_B.weight"


def analyze(path):
    """The report of the one series at a path."""
    (report,) = analyze_checkpoints([path]).series
    return report


def deltas(tensors, scaling):
    names = [key for key in tensors if "lora_A" in key]
    return [
        scaling * tensors[key.replace("lora_A", "lora_B")].double() @ tensors[key].double()
        for key in names
    ]


def apart(one, other):
    return sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True)) ** 0.5


def test_a_run_is_described_as_its_dense_matrices_are(collection):
    run = collection.runs["colors"]
    report = analyze(run)
    files = checkpoint_files(run)
    assert (report.checkpoints, report.tensors, report.values) == (4, 28, 1856)
    assert report.bytes == sum(file.stat().st_size for file in files)
    assert report.dtypes == ["float32"]
    assert report.scaling == 2.0  # alpha 4, rank 2
    assert (report.not_finite, report.zero) == ([], [])
    dense = [deltas(load_adapter(file).tensors, 2.0) for file in files]
    zero = [torch.zeros_like(delta) for delta in dense[0]]
    assert [d.checkpoint for d in report.drift] == [file.name for file in files]
    for index, drift in enumerate(report.drift):
        assert drift.norm_delta == pytest.approx(apart(dense[index], zero))
        assert drift.from_first == pytest.approx(apart(dense[index], dense[0]), abs=1e-12)
        before = dense[max(0, index - 1)]
        assert drift.from_previous == pytest.approx(apart(dense[index], before), abs=1e-12)
    norms = {module.module: module for module in report.modules}
    assert len(norms) == 14
    last = load_adapter(files[-1]).tensors
    first = norms["model.layers.0.self_attn.q_proj"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert first.rank == 2
    assert first.norm_a == pytest.approx(float(last[key.format("A")].norm()), rel=1e-6)
    assert first.norm_b == pytest.approx(float(last[key.format("B")].norm()), rel=1e-6)
    product = last[key.format("B")].double() @ last[key.format("A")].double()
    assert first.norm_delta == pytest.approx(2 * float(product.norm()), rel=1e-6)


def test_a_report_is_plain_data(collection):
    document = analyze_checkpoints(list(collection.runs.values())).as_dict()
    assert json.loads(json.dumps(document)) == document
    assert document["collections"][0]["modules"][0]["rank"] == 2


def test_path_and_spectrum(collection):
    run = collection.runs["colors"]
    report = analyze(run)
    assert report.path_length == pytest.approx(sum(d.from_previous for d in report.drift))
    assert report.displacement == report.drift[-1].from_first
    assert report.path_ratio == pytest.approx(report.path_length / report.displacement)
    for module, delta in zip(report.modules, deltas_in_order(run), strict=True):
        values = torch.linalg.svdvals(delta)[:2]
        assert module.sigma_1 == pytest.approx(float(values[0]))
        assert module.norm_delta == pytest.approx(float(values.norm()))
        assert module.stable_rank == pytest.approx(float((values.norm() / values[0]) ** 2))
        shares = values / values.sum()
        assert module.effective_rank == pytest.approx(float((-shares * shares.log()).sum().exp()))


def deltas_in_order(run):
    """Of the last checkpoint, as the report has its modules."""
    tensors = load_adapter(checkpoint_files(run)[-1]).tensors
    return deltas(dict(sorted(tensors.items(), key=lambda item: natural_key(item[0]))), 2.0)


def reports(norms):
    """Modules of so large a ΔW each: `{(layer, kind): ‖ΔW‖}`."""
    return [
        ModuleReport(f"layers.{layer}.{kind}", layer, kind, 2, 2.0, 1.0, 1.0, norm, norm, 1.0, 1.0)
        for (layer, kind), norm in norms.items()
    ]


def test_modules_with_almost_no_update_are_dead():
    alive = {(layer, kind): 1.0 for layer in range(4) for kind in "qv"}
    assert dead(reports(alive)) == ([], [])
    assert dead(reports({**alive, (0, "q"): 1e-4})) == ([], ["layers.0.q"])
    layer = {(2, "q"): 1e-4, (2, "v"): 0.0}
    assert dead(reports({**alive, **layer})) == ([2], ["layers.2.q", "layers.2.v"])
    assert dead(reports({**alive, (0, "q"): 50.0})) == ([], [])  # one that is large kills no other
    assert dead(reports({**alive, (0, "q"): float("nan"), (1, "q"): 0.0})) == ([], ["layers.1.q"])
    assert dead(reports(dict.fromkeys(alive, 0.0)))[0] == [0, 1, 2, 3]  # B is zero before training


def test_dead_modules_of_a_dead_layer_are_not_named_twice(folder, drifting):
    (tensors,) = drifting(1)
    for key in tensors:
        if "layers.1" in key or "layers.0.q_proj.lora_B" in key:
            tensors[key] *= 1e-6
    report = analyze(folder([tensors]))
    assert report.dead == ["layer 1", "layers.0.q_proj"]
    assert report.dead_modules == ["layers.0.q_proj", "layers.1.q_proj", "layers.1.up_proj"]


def test_a_single_file_and_an_adapter_are_reported(collection, tmp_path):
    run = collection.runs["colors"]
    file = checkpoint_files(run)[-1]
    one, adapter = analyze(file), analyze(run / "adapter")
    assert one.modules == adapter.modules
    assert one.scaling == adapter.scaling == 2.0
    assert [d.from_first for d in one.drift] == [0.0]
    lone = analyze(shutil.copy(file, tmp_path / "lone.ckpt"))
    assert lone.scaling is None  # ΔW is then B A
    assert lone.modules[0].norm_delta == pytest.approx(one.modules[0].norm_delta / 2)
    assert (one.sample, one.path_ratio) == (None, None)


def test_rank_stabilised_scaling_is_understood(collection, tmp_path):
    adapter = read_adapter(collection.runs["colors"] / "adapter")
    adapter.config["use_rslora"] = True
    write_adapter(tmp_path / "adapter", adapter, "")
    assert analyze(tmp_path / "adapter").scaling == pytest.approx(4 / 2**0.5)


def test_damage_is_reported(folder):
    good = {A: torch.ones(2, 3), B: torch.ones(4, 2)}
    holed, infinite = good[A].clone(), good[B].clone()
    holed[0, 0], infinite[1, 1] = float("nan"), float("-inf")
    adapters = [good, {A: holed, B: good[B]}, {A: good[A], B: infinite}]
    adapters += [{A: good[A], B: torch.zeros(4, 2)}]
    report = analyze(folder(adapters))
    assert report.not_finite == [f"checkpoint-step-002.ckpt: {A}", f"checkpoint-step-003.ckpt: {B}"]
    assert report.zero == [f"checkpoint-step-004.ckpt: {B}"]
    assert damage(good) == ([], [])


GOOD = {A: torch.ones(2, 3), B: torch.ones(4, 2)}


@pytest.mark.parametrize(
    "odd",
    [
        {**GOOD, A: torch.ones(2, 9)},
        {**GOOD, A: torch.ones(2, 1)},  # which would broadcast
        {key.replace("q_proj", "v_proj"): tensor for key, tensor in GOOD.items()},
        {**GOOD, **{key.replace(".0.", ".1."): tensor for key, tensor in GOOD.items()}},
    ],
    ids=["shape", "one column", "module", "more modules"],
)
@pytest.mark.parametrize("position", [0, 1])
def test_checkpoints_of_another_adapter_are_refused(folder, odd, position):
    adapters = [GOOD, GOOD]
    adapters.insert(position, odd)
    with pytest.raises(DataError, match=r"checkpoint-step-00\d.ckpt: other modules or shapes"):
        analyze(folder(adapters))


def test_every_container_is_reported_alike(tmp_path, folder):
    tensors = {A: torch.randn(2, 3), B: torch.randn(4, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    path = folder([tensors]) / "checkpoint-step-001.ckpt"
    assert analyze(tmp_path / "x.safetensors").modules == analyze(path).modules


def test_nothing_there_is_a_usage_error(tmp_path):
    with pytest.raises(UsageError, match="no checkpoints or adapters there"):
        analyze(tmp_path)


def test_of_many_checkpoints_only_a_sample_is_compared(folder, drifting, monkeypatch):
    monkeypatch.setattr(series_module, "MOST_CHECKPOINTS", 4)
    sample = analyze(folder(drifting(7))).sample
    assert sample.checkpoints == [f"checkpoint-step-00{step}.ckpt" for step in (1, 3, 5, 7)]


def between(one, other):
    return float(torch.nn.functional.cosine_similarity(one, other, dim=0))


def test_series_are_compared_whatever_their_rank(folder, drifting, flat):
    """ΔW has the same size whether its factors have two components or three."""
    series = drifting(4), drifting(6, rank=3, seed=1)
    paths = [folder(steps, name) for steps, name in zip(series, "ab", strict=True)]
    (found,) = analyze_checkpoints(paths).comparisons
    dense = [torch.stack([flat(tensors) for tensors in steps]) for steps in series]
    assert found.series == ["a", "b"]
    assert found.cosine_last[0][1] == pytest.approx(between(dense[0][-1], dense[1][-1]))
    assert found.cosine_mean[0][1] == pytest.approx(between(dense[0].mean(0), dense[1].mean(0)))
    assert [len(files) for files in found.checkpoints] == [4, 6]
    assert len(found.pca.coordinates) == 10


def test_series_of_other_modules_are_not_compared(folder, drifting):
    nan = {key: torch.full_like(t, float("nan")) for key, t in drifting(1)[0].items()}
    series = {"a": drifting(2), "b": drifting(2, seed=1), "odd": drifting(2, kinds=("k_proj",))}
    paths = [folder(steps, name) for name, steps in {**series, "broken": [nan]}.items()]
    analysis = analyze_checkpoints(paths)
    assert [found.series for found in analysis.comparisons] == [["a", "b"]]
    assert analysis.not_compared == [
        "broken: no checkpoint is finite",
        "odd: other modules or sizes than the others",
    ]


def test_duplicates_are_reported(folder, drifting):
    first, second = drifting(2)
    one, other = folder([first, second, first], "a"), folder([second], "b")
    duplicates = [found.files for found in analyze_checkpoints([one, other]).duplicates]
    assert duplicates == [
        [str(one / f"checkpoint-step-00{step}.ckpt") for step in (1, 3)],
        [str(one / "checkpoint-step-002.ckpt"), str(other / "checkpoint-step-001.ckpt")],
    ]


def test_equal_values_of_another_dtype_are_no_duplicates(folder, drifting):
    (tensors,) = drifting(1)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    assert analyze_checkpoints([folder([tensors, wide])]).duplicates == []
