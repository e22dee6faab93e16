"""Writes small GGUF files, as llama.cpp's converter would."""

import json

from transformers import AutoModelForCausalLM, AutoTokenizer


def write_gguf(base_dir, file, architecture="qwen2", leave_out=(), quantized=(), **general):
    """Writes the Qwen2 of `base_dir` to `file`, in float32, but for `quantized` tensors in Q8_0.

    `leave_out` are names of tensors, as in the file; `general` are further metadata.
    """
    import gguf

    model = AutoModelForCausalLM.from_pretrained(base_dir)
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    config = model.config
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_name("Tiny")
    writer.add_organization("The makers")
    for key, value in general.items():
        writer.add_string(f"general.{key}", value)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    tokens = tokenizer.convert_ids_to_tokens(list(range(config.vocab_size)))
    special = set(tokenizer.added_tokens_decoder)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_token_list(tokens)
    writer.add_token_types([control if i in special else normal for i in range(len(tokens))])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for key, weight in model.state_dict().items():
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if key == "lm_head.weight" or name in leave_out:  # the output layer is tied
            continue
        values = weight.numpy()
        if name in quantized:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
