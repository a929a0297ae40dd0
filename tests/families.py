"""Tiny random checkpoints of every family, as ``transformers`` saves them and as the hub has them.

``make_checkpoint("mixtral", tmp_path)`` makes one and returns its directory. Every option that
changes a family's numbers is on, and weights are scaled so that attention, routing and logits
are all far from uniform: an error anywhere shows in the logits.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

VOCAB_SIZE = 256
PLAIN = "expert_mesh_plain"

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 32,
    "beta_slow": 1,
}
_LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 1.0},
}

_SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "num_local_experts": 16,
        "sliding_window": 24,
    },
    "qwen2_moe": {
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 80,
        "num_experts": 16,
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "norm_topk_prob": False,
        "use_sliding_window": True,
        "sliding_window": 20,
        "max_window_layers": 3,
    },
    "qwen3_moe": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 16,
        "num_hidden_layers": 4,
        "decoder_sparse_step": 2,
        "norm_topk_prob": True,
        "attention_bias": True,
    },
    "olmoe": {
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "num_experts": 16,
        "clip_qkv": 1.5,
    },
    "deepseek_v2": _LATENT | {"topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0},
    "deepseek_v3": _LATENT | {"routed_scaling_factor": 2.5},
    "gpt_oss": {
        "num_key_value_heads": 2,
        "head_dim": 32,
        "intermediate_size": 48,
        "num_local_experts": 16,
        "sliding_window": 16,
        "num_experts_per_tok": 4,
        "rope_parameters": _YARN | {"truncate": False},
    },
    PLAIN: {
        "num_key_value_heads": 4,
        "intermediate_size": 96,
        "dense_intermediate_size": 80,
        "num_local_experts": 16,
        "first_k_dense_replace": 1,
        "hidden_act": "gelu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    },
}
FAMILIES = tuple(_SETTINGS)


def make_checkpoint(
    family: str,
    directory: Path,
    *,
    fused: bool = False,
    sharded: bool = False,
    seed: int = 0,
    **overrides: Any,
) -> Path:
    """Write a checkpoint of 16 experts a layer and return its directory.

    ``overrides`` are keys of config.json. ``fused`` stores all experts of a layer in one tensor,
    as ``transformers`` holds them in memory; ``sharded`` writes several files and an index.
    """
    settings = _COMMON | _SETTINGS[family] | overrides
    generator = torch.Generator().manual_seed(seed)
    directory.mkdir(parents=True, exist_ok=True)
    shard_size = "150KB" if sharded else "50GB"
    if family == PLAIN:
        _save_plain(settings, generator, directory, sharded)
        return directory
    import transformers

    config = transformers.AutoConfig.for_model(family, **settings)
    config.dtype = "float32"
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in name:
                tensor.copy_(_random(name, tuple(tensor.shape), generator))
    model.save_pretrained(directory, max_shard_size=shard_size, save_original_format=not fused)
    return directory


def _random(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("embed_tokens.weight"):
        return noise * 0.25  # small, or a model whose head is tied to it repeats its input
    if name.endswith(("gate.weight", "router.weight")):
        return noise * 2 * shape[-1] ** -0.5
    if len(shape) == 1 or name.endswith("bias"):
        return 0.3 * noise
    if name.endswith(("q_proj.weight", "k_proj.weight", "q_b_proj.weight", "lm_head.weight")):
        noise = 2 * noise
    fan_in = shape[-2] if "gate_up_proj" in name and shape[-1] > shape[-2] else shape[-1]
    return noise * fan_in**-0.5


def _save_plain(
    settings: dict[str, Any], generator: torch.Generator, directory: Path, sharded: bool
) -> None:
    width, vocab = settings["hidden_size"], settings["vocab_size"]
    heads, kv_heads = settings["num_attention_heads"], settings["num_key_value_heads"]
    head_dim = settings.get("head_dim") or width // heads
    shapes = {"model.embed_tokens.weight": (vocab, width), "model.norm.weight": (width,)}
    if not settings["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (vocab, width)
    for layer in range(settings["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (width,)
        for name, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows * head_dim, width)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (width, heads * head_dim)
        hidden = settings["intermediate_size"]
        blocks = [f"{prefix}mlp.experts.{e}" for e in range(settings["num_local_experts"])]
        if layer < settings["first_k_dense_replace"]:
            hidden, blocks = settings["dense_intermediate_size"], [f"{prefix}mlp"]
        else:
            shapes[f"{prefix}mlp.gate.weight"] = (settings["num_local_experts"], width)
        for block in blocks:
            shapes[f"{block}.up_proj.weight"] = (hidden, width)
            shapes[f"{block}.down_proj.weight"] = (width, hidden)
    tensors = {name: _random(name, shape, generator) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    config = settings | {
        "architectures": ["ExpertMeshPlainForCausalLM"],
        "model_type": PLAIN,
        "dtype": "float32",
    }
    (directory / "config.json").write_text(json.dumps(config))
    if sharded:
        shard(directory, 3)


def shard(directory: Path, count: int) -> None:
    """Split a single-file checkpoint into ``count`` files and an index."""
    single = directory / "model.safetensors"
    tensors = load_file(single)
    weight_map = {}
    for part in range(count):
        file = f"model-{part + 1:05d}-of-{count:05d}.safetensors"
        names = sorted(tensors)[part::count]
        save_file({name: tensors[name] for name in names}, directory / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    single.unlink()


def edit_config(directory: Path, *remove: str, **values: Any) -> None:
    """Change keys of a checkpoint's config.json."""
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for key in remove:
        config.pop(key, None)
    path.write_text(json.dumps(config | values))


def as_old_config(directory: Path) -> None:
    """Rewrite config.json in the style from before ``rope_parameters`` and ``dtype``."""
    config = json.loads((directory / "config.json").read_text())
    rope = config["rope_parameters"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "rope_type")}
    if rope["rope_type"] != "default":
        scaling["type"] = rope["rope_type"]
    edit_config(
        directory,
        "rope_parameters",
        "dtype",
        rope_theta=rope["rope_theta"],
        rope_scaling=scaling or None,
        torch_dtype=config["dtype"],
    )
