"""A checkpoint whose routing can be told without running it: token t needs expert t alone.

Embeddings are one-hot, attention and experts add nothing, the router and the head read the
one that is hot: in every layer a token goes to the expert of its own number, and the likeliest
next token is itself. So a prompt of threes says three for ever, and needs expert 3 alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

NUM_LAYERS = 2


def make_token_is_expert(directory: Path, num_experts: int = 4) -> Path:
    """A Mixtral with a vocabulary of one token for each expert, and no tokenizer."""
    width, heads, expert_hidden = 16, 2, 8
    config = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": num_experts,
        "hidden_size": width,
        "intermediate_size": expert_hidden,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_local_experts": num_experts,
        "num_experts_per_tok": 1,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": None,
    }
    one_hot = torch.eye(num_experts, width)
    tensors = {
        "model.embed_tokens.weight": one_hot.clone(),
        "model.norm.weight": torch.ones(width),
        "lm_head.weight": one_hot.clone(),
    }
    for layer in range(NUM_LAYERS):
        block = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{block}{norm}.weight"] = torch.ones(width)
        for projection in "qkvo":
            tensors[f"{block}self_attn.{projection}_proj.weight"] = torch.zeros(width, width)
        tensors[f"{block}block_sparse_moe.gate.weight"] = one_hot.clone()
        for index in range(num_experts):
            expert = f"{block}block_sparse_moe.experts.{index}."
            tensors[f"{expert}w1.weight"] = torch.zeros(expert_hidden, width)
            tensors[f"{expert}w2.weight"] = torch.zeros(width, expert_hidden)
            tensors[f"{expert}w3.weight"] = torch.zeros(expert_hidden, width)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    return directory
