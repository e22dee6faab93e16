"""Run directories as the original scripts and other training loops leave them."""

import json

import torch

from loragen.legacy.experiments import find_runs
from tests.conftest import write_lines

STEPS = [5, 6, 7, 8]
"""Of the four checkpoints in a run."""
CONTAINERS = ["torch", "full", "safetensors", "peft", "peft-bin", "plain"]


def only_run(path):
    (run,) = find_runs(path)
    return run


def write_legacy_run(
    collection, home, container="torch", dataset="colors", stamp="20250720_143052", yaml=True
):
    """Writes the collection's colours as home/experiments/old/<dataset>/old_<stamp>_lora.

    `yaml`: with a YAML file that records alpha and the base model.
    """
    run = home / "experiments" / "old" / dataset / f"old_{stamp}_lora"
    for part in ("models", "checkpoints", "logs"):
        (run / part).mkdir(parents=True)
    for file in sorted((collection.runs["colors"] / "checkpoints").iterdir()):
        document = torch.load(file, weights_only=True)
        write_checkpoint(container, run / "checkpoints", document, collection.base)
    write_lines(run / "logs" / f"batch_tracking_{dataset}.jsonl", [{"step": 5}])
    (run / "logs" / f"checkpoint_mapping_{dataset}.json").write_text("{}", encoding="utf-8")
    if yaml:
        text = f"model:\n  name: '{collection.base}'\nlora: {{lora_alpha: 4}}\n"
        (run / "training_config.yaml").write_text(text, encoding="utf-8")
    return run


def write_checkpoint(container, folder, document, base):
    """Writes one of loragen's checkpoints in another container."""
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    from loragen.core.adapter.checks import file_keys

    step, weights = document["global_step"], file_keys(document["state_dict"], "x")
    live = {k.replace(".weight", ".default.weight"): v for k, v in weights.items()}
    if container == "torch":
        whole = {"step": step, "lora_state_dict": live}
        whole["optimizer_state_dict"] = document["optimizer_states"][0]
        torch.save(whole, folder / f"step_{step:03d}.pt")
    elif container == "full":
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base),
            LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"),
        )
        model.load_state_dict(live, strict=False)
        whole = {f"module.{k}": v for k, v in model.state_dict().items()}
        torch.save({"model_state_dict": whole, "global_step": step}, folder / f"{step}.pth")
    elif container == "safetensors":
        save_file(live, folder / f"lora-step-{step}.safetensors")
    elif container in {"peft", "peft-bin"}:
        directory = folder / f"checkpoint-{step}"
        directory.mkdir()
        if container == "peft":
            save_file(weights, directory / "adapter_model.safetensors")
        else:
            torch.save(weights, directory / "adapter_model.bin")
        torch.save({"rng": torch.zeros(1)}, directory / "rng_state.pth")
        torch.save(document["optimizer_states"][0], directory / "optimizer.pt")
        config = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none",
            "base_model_name_or_path": str(base), "target_modules": ["q_proj"],
        }  # fmt: skip
        (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    else:  # the base model's own keys, without `.weight`
        plain = {
            k.removeprefix("base_model.model.").removesuffix(".weight"): v
            for k, v in weights.items()
        }
        torch.save(plain, folder / f"ckpt_step{step}.bin")
