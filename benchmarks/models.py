"""The models that are compared: settings of a config.json, and how many workers serve each."""

from __future__ import annotations

from typing import Any

import torch

_PAPERS = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
_PLAIN = {
    "model_type": "expert_mesh_plain",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 16384,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "num_local_experts": 1,
    "num_experts_per_tok": 1,
    "torch_dtype": "bfloat16",
}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": (_PLAIN, 1),
    "wide": (
        _PLAIN
        | {
            "hidden_size": 8192,
            "intermediate_size": 32768,
            "num_hidden_layers": 4,
            "num_attention_heads": 16,
            "head_dim": 512,
            "torch_dtype": "float16",
        },
        1,
    ),
    "deep": (
        _PLAIN
        | {
            "hidden_size": 7168,
            "intermediate_size": 2048,
            "dense_intermediate_size": 18432,
            "num_hidden_layers": 61,
            "first_k_dense_replace": 3,
            "num_attention_heads": 128,
        },
        1,
    ),
    "one": (_PAPERS | {"num_local_experts": 1, "num_experts_per_tok": 1}, 1),
    "many": (_PAPERS | {"num_local_experts": 16, "num_experts_per_tok": 2}, 16),
    "shared": (_PAPERS | {"num_local_experts": 16, "num_experts_per_tok": 2}, 1),
    "colocated": (
        _PAPERS
        | {
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "hidden_size": 2048,
            "intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
        },
        1,
    ),
    "tiny": (
        _PAPERS
        | {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "vocab_size": 256,
        },
        2,
    ),
}


_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "head_dim": 8,
    "vocab_size": 256,
}
_AT_MOST = (("dense_intermediate_size", 192), ("num_key_value_heads", 8))


def model_of(name: str, device: str, layers: int = 0) -> tuple[dict[str, Any], int]:
    """Its settings and number of workers: with several GPUs one each, and of models of one expert
    an expert each. On a CPU it is narrow and shallow, its experts as many. ``layers``: fewer."""
    settings, workers = MODELS[name]
    if device == "cpu":
        dense = settings.get("first_k_dense_replace", 0)
        at_most = {key: min(most, settings[key]) for key, most in _AT_MOST if key in settings}
        settings = settings | _SMALL | at_most
        settings["num_hidden_layers"] += dense
    else:
        gpus = torch.cuda.device_count()
        if settings["num_local_experts"] == 1:
            settings = settings | {"num_local_experts": max(1, gpus)}
        workers = max(workers, gpus)
    return settings | ({"num_hidden_layers": layers} if layers else {}), workers
