"""LoRA adapters: their files, their tensors as tokens, the algebra of ΔW, merging and export."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
"""The two files of a PEFT adapter directory."""
KEY_PREFIX = "base_model.model."
"""The prefix of PEFT's file keys; a module's path in the base model follows it."""
MERGED_MARKER = "loragen_export.json"
"""The file that only a merged model written by loragen has."""
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, "README.md")
"""The files of an adapter directory that loragen has written."""
MERGED_FILES = ("[!.]*",)
"""A pattern of those of a merged model, whose names the tokenizer decides; none of them is hidden,
as .git is."""
