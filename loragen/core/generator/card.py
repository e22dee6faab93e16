"""The README.md of a generated adapter: what it is, where it comes from, and its limits."""

from loragen.core.generator.origin import Origin


def adapter_card(origin: Origin) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    name = origin.base_model
    return (
        f"---\nbase_model: {name}\nlibrary_name: peft\ntags: [lora, loragen, generated]\n---\n\n"
        f"# A generated LoRA adapter\n\n"
        f"Made by loragen from {origin.prompts} unlabelled prompts "
        f"(sha256 {origin.prompts_sha256[:16]}), without training.\n\n"
        f"- base model: {name}\n"
        f"- generator: {origin.encoder} -> {origin.decoder}, "
        f"trained on {len(origin.datasets)} datasets\n"
        f"- evaluate it before you rely on it: `loragen lora eval --adapter DIR --dataset FILE`\n"
    )
