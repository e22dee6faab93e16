"""LoRA adapters: their files, their tensors as tokens, the algebra of ΔW, merging and export."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
"""The two files of a PEFT adapter directory."""
MERGED_MARKER = "loragen_export.json"
"""The file by which a merged model that loragen wrote differs from any other model directory."""
