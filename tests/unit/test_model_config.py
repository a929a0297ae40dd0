"""Configs as the hub has them, and everything that is refused rather than ignored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import CheckpointError, UnsupportedModel
from mesh.model_config import GroupedAttention, LatentAttention, ModelConfig, SwigluClamp

COMMON = {
    "architectures": ["ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
}
# The models' own files on the hub, less what COMMON has and what quantizes them.
HUB: dict[str, dict[str, Any]] = {
    "Mixtral-8x7B": {
        "model_type": "mixtral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen1.5-MoE-A2.7B": {
        "model_type": "qwen2_moe",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "max_position_embeddings": 8192,
        "max_window_layers": 21,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "num_key_value_heads": 16,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "norm_topk_prob": False,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe",
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe",
        "attention_bias": False,
        "clip_qkv": None,
        "hidden_size": 2048,
        "intermediate_size": 1024,
        "max_position_embeddings": 4096,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 16,
        "num_key_value_heads": 16,
        "output_router_logits": False,
        "pad_token_id": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False,
        "vocab_size": 50304,
    },
    "DeepSeek-V2-Lite": {
        "model_type": "deepseek_v2",
        "attention_bias": False,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
        "aux_loss_alpha": 0.001,
        "first_k_dense_replace": 1,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_group": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "norm_topk_prob": False,
        "num_attention_heads": 16,
        "num_experts_per_tok": 6,
        "num_hidden_layers": 27,
        "num_key_value_heads": 16,
        "pretraining_tp": 1,
        "q_lora_rank": None,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 1.0,
        "scoring_func": "softmax",
        "seq_aux": True,
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "greedy",
        "v_head_dim": 128,
        "vocab_size": 102400,
    },
    "DeepSeek-V3": {
        "model_type": "deepseek_v3",
        "attention_bias": False,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    "gpt-oss-20b": {
        "model_type": "gpt_oss",
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "pad_token_id": 199999,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
    # The papers' models, as `plain` ones. 16 layers x 16 experts, 32 heads x 128, bf16.
    "paper-16x16": {
        "model_type": "expert_mesh_plain",
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "hidden_act": "gelu",
        "torch_dtype": "bfloat16",
        "vocab_size": 32000,
    },
    "paper-61": {  # 61 layers, of which 3 are dense, 128 heads x 128, expert hidden 2048, bf16
        "model_type": "expert_mesh_plain",
        "hidden_size": 7168,
        "head_dim": 128,
        "intermediate_size": 2048,
        "dense_intermediate_size": 18432,
        "first_k_dense_replace": 3,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_local_experts": 256,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 4096,
        "hidden_act": "gelu",
        "torch_dtype": "bfloat16",
        "vocab_size": 129280,
    },
    "janus": {  # 4 layers x 16 experts, d 8192, MLP 32768, 16 heads x 512, fp16
        "model_type": "expert_mesh_plain",
        "hidden_size": 8192,
        "intermediate_size": 32768,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "hidden_act": "gelu",
        "torch_dtype": "float16",
        "vocab_size": 32000,
    },
}


def write(directory: Path, values: dict[str, Any], *drop: str) -> Path:
    """A directory with this config and an index; no weights are needed to read it."""
    kept = {key: value for key, value in values.items() if key not in drop}
    (directory / "config.json").write_text(json.dumps(kept))
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    return directory


def read(directory: Path, model: str, *drop: str, **changes: Any) -> ModelConfig:
    """The hub's config of a model, changed."""
    return ModelConfig.from_hf(write(directory, COMMON | HUB[model] | changes, *drop))


@pytest.mark.parametrize("model", HUB)
def test_the_hubs_configs_load(tmp_path, model):
    config = read(tmp_path, model)
    assert config.hidden_size == HUB[model]["hidden_size"]
    assert config.max_model_len == HUB[model]["max_position_embeddings"]
    assert config.eos_token_ids == (2,)
    assert len(config.windows) == config.num_layers
    assert config.dtype == HUB[model].get("torch_dtype", "bfloat16")


def test_mixtral_is_read(tmp_path):
    config = read(tmp_path, "Mixtral-8x7B")
    assert config.attention == GroupedAttention(32, 8, 128, scale=128**-0.5)
    assert (config.num_experts, config.experts_per_token) == (8, 2)
    assert config.moe_layers == tuple(range(32))
    assert config.router.normalize
    assert config.expert_bytes("bfloat16") == 3 * 4096 * 14336 * 2
    # By what it is served in, whatever the checkpoint's dtype is.
    assert [config.experts_grouped(itemsize) for itemsize in (2, 4)] == [True, False]


def test_deepseek_v3_is_read(tmp_path):
    config = read(tmp_path, "DeepSeek-V3")
    assert isinstance(config.attention, LatentAttention)
    assert config.attention.kv_width == 576
    # 192 ** -0.5 times the square of YaRN's temperature at a factor of 40.
    assert config.attention.scale == pytest.approx(0.1352337788608801)
    assert config.rope.attention_factor == 1.0
    assert config.moe_layers == tuple(range(3, 61))
    assert config.shared_hidden_size == 2048
    assert (config.router.num_groups, config.router.groups_per_token) == (8, 4)


def test_gpt_oss_is_read(tmp_path):
    config = read(tmp_path, "gpt-oss-20b")
    assert config.windows == (128, None) * 12
    assert config.clamp == SwigluClamp(alpha=1.702, limit=7.0)
    assert not config.experts_grouped(itemsize=2)
    assert config.router.bias
    assert config.expert_bytes("bfloat16") == 2 * (3 * 2880 * 2880 + 2 * 2880 + 2880)
    bare = read(tmp_path, "gpt-oss-20b", "layer_types", "rope_scaling", "swiglu_limit")
    assert (bare.windows, bare.clamp, bare.rope) == (config.windows, config.clamp, config.rope)
    with pytest.raises(UnsupportedModel, match="needs a sliding_window"):
        read(tmp_path, "gpt-oss-20b", sliding_window=None)


def test_qwens_dense_layers_and_windows_are_read(tmp_path):
    settings = {"mlp_only_layers": [3], "decoder_sparse_step": 2}
    config = read(tmp_path, "Qwen1.5-MoE-A2.7B", **settings)
    assert config.moe_layers[:3] == (1, 5, 7)
    assert set(config.windows) == {None}
    config = read(tmp_path, "Qwen1.5-MoE-A2.7B", use_sliding_window=True, max_window_layers=3)
    assert config.windows[:5] == (32768, None, 32768, None, None)


def test_the_plain_family_is_read(tmp_path):
    config = read(tmp_path, "janus", first_k_dense_replace=1, dense_intermediate_size=100)
    assert config.attention == GroupedAttention(16, 16, 512, scale=512**-0.5)
    assert (config.expert_kind, config.activation) == ("plain", "gelu")
    assert (config.moe_layers, config.dense_hidden_size) == ((1, 2, 3), 100)
    assert config.expert_bytes("float16") == 2 * 8192 * 32768 * 2


@pytest.mark.parametrize(
    ("model", "heads", "moe_layers", "matrix"),
    [
        ("paper-16x16", (32, 128), 16, 4096 * 16384),
        ("janus", (16, 512), 4, 8192 * 32768),
        ("paper-61", (128, 128), 58, 7168 * 2048),
    ],
)
def test_the_papers_shapes_are_read(tmp_path, model, heads, moe_layers, matrix):
    config = read(tmp_path, model)
    num_heads, head_dim = heads
    assert config.attention == GroupedAttention(num_heads, num_heads, head_dim, head_dim**-0.5)
    assert len(config.moe_layers) == moe_layers
    assert config.moe_layers[-1] == config.num_layers - 1
    assert config.expert_bytes(config.dtype) == 2 * matrix * 2


@pytest.mark.parametrize(
    ("key", "right", "wrong"), [("head_dim", 64, 99), ("qk_head_dim", 192, 64)]
)
def test_a_latent_head_whose_parts_do_not_add_up_is_refused(tmp_path, key, right, wrong):
    assert isinstance(read(tmp_path, "DeepSeek-V3", **{key: right}).attention, LatentAttention)
    with pytest.raises(UnsupportedModel, match=f"{key} = {wrong}"):
        read(tmp_path, "DeepSeek-V3", **{key: wrong})


def test_new_and_old_rope_styles_are_the_same(tmp_path):
    old = read(tmp_path, "DeepSeek-V2-Lite")
    scaling = HUB["DeepSeek-V2-Lite"]["rope_scaling"]
    new = {"rope_theta": 10000, "rope_type": "yarn"} | scaling
    del new["type"]
    fresh = read(tmp_path, "DeepSeek-V2-Lite", "rope_scaling", "rope_theta", rope_parameters=new)
    assert fresh.rope == old.rope


def test_a_rope_scaling_reaches_as_far_as_it_scales(tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert read(tmp_path, "Qwen3-30B-A3B", rope_scaling=yarn).max_model_len == 131072


def test_a_rope_that_changes_with_length_ends_where_it_would_change(tmp_path):
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert read(tmp_path, "OLMoE-1B-7B", rope_scaling=dynamic).max_model_len == 4096
    longrope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 64,
        "long_factor": [2.0] * 64,
        "original_max_position_embeddings": 1024,
    }
    assert read(tmp_path, "OLMoE-1B-7B", rope_scaling=longrope).max_model_len == 1024


def test_generation_config_overrules_the_end_of_text(tmp_path):
    read(tmp_path, "janus")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (7, 9)
    (tmp_path / "generation_config.json").write_text("{}")
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == (2,)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("wrong", ["32000", "-1", "[2, 32000]", "[[2]]", "true", '"</s>"'])
def test_an_end_of_text_outside_the_vocabulary_is_refused(tmp_path, file, wrong):
    config = write(tmp_path, COMMON | HUB["janus"]) / file
    values = json.loads(config.read_text()) if config.exists() else {}
    config.write_text(json.dumps(values | {"eos_token_id": json.loads(wrong)}))
    with pytest.raises(CheckpointError, match=rf"/{file}: eos_token_id is .*, 0 to 31999"):
        ModelConfig.from_hf(tmp_path)


def test_a_null_end_of_text_is_none(tmp_path):
    read(tmp_path, "janus")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert ModelConfig.from_hf(tmp_path).eos_token_ids == ()


def test_the_fingerprint_follows_config_and_weights(tmp_path):
    first = read(tmp_path, "janus").fingerprint
    assert len(first) == 16
    assert read(tmp_path, "janus").fingerprint == first
    assert read(tmp_path, "janus", norm_topk_prob=False).fingerprint != first
    read(tmp_path, "janus")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b"}}')
    assert ModelConfig.from_hf(tmp_path).fingerprint != first


@pytest.mark.parametrize(
    ("model", "changes", "match"),
    [
        ("Mixtral-8x7B", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("Mixtral-8x7B", {"attention_bias": True}, "attention_bias"),
        ("Mixtral-8x7B", {"model_type": "llama"}, "model_type 'llama' is not supported"),
        ("Mixtral-8x7B", {"model_type": None}, "model_type None"),
        ("Mixtral-8x7B", {"model_type": ["mixtral"]}, "model_type"),
        ("Mixtral-8x7B", {"hidden_act": "mish"}, "hidden_act = 'mish'"),
        ("Mixtral-8x7B", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ("Mixtral-8x7B", {"quantization_config": {"quant_method": "awq"}}, "bfloat16 weights"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4.*bfloat16"),
        ("gpt-oss-20b", {"hidden_act": "gelu"}, "hidden_act"),
        ("gpt-oss-20b", {"layer_types": ["linear_attention"] * 24}, "layer_types"),
        (
            "Mixtral-8x7B",
            {"rope_scaling": {"type": "su", "factor": 2}},
            r"rope_parameters\.type = 'su'",
        ),
        ("Mixtral-8x7B", {"rope_scaling": {"rope_type": "default", "factor": 2}}, "factor"),
        ("Mixtral-8x7B", {"rope_scaling": {"type": "linear", "factor": 2, "mrope": 1}}, "mrope"),
        ("Mixtral-8x7B", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("Mixtral-8x7B", {"num_local_experts": 2000}, "more than 1023 experts"),
        ("Mixtral-8x7B", {"num_hidden_layers": 1025}, "num_hidden_layers = 1025"),
        ("Mixtral-8x7B", {"num_experts_per_tok": 9}, "more experts per token"),
        ("Mixtral-8x7B", {"num_key_value_heads": 5}, "multiple of num_key_value_heads"),
        ("Mixtral-8x7B", {"is_encoder_decoder": True}, "is_encoder_decoder"),
        ("Qwen1.5-MoE-A2.7B", {"layer_types": ["sliding_attention"] * 24}, "sliding_window"),
        ("Qwen3-30B-A3B", {"use_sliding_window": True, "sliding_window": 9}, "max_window_layers"),
        ("Qwen3-30B-A3B", {"mlp_only_layers": list(range(48))}, "no layer has routed experts"),
        ("DeepSeek-V2-Lite", {"norm_topk_prob": True}, "norm_topk_prob"),
        ("DeepSeek-V2-Lite", {"topk_method": "noaux_tc"}, "topk_method"),
        ("DeepSeek-V2-Lite", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("DeepSeek-V3", {"scoring_func": "softmax"}, "scoring_func"),
        ("DeepSeek-V3", {"topk_method": "greedy"}, "topk_method"),
        ("DeepSeek-V3", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("DeepSeek-V3", {"n_group": 3}, "equal in size"),
        ("DeepSeek-V3", {"topk_group": 9}, "topk_group"),
        ("DeepSeek-V3", {"n_group": 256, "topk_group": 8}, "two best"),
    ],
)
def test_what_would_change_the_numbers_is_refused_by_name(tmp_path, model, changes, match):
    with pytest.raises(UnsupportedModel, match=match):
        read(tmp_path, model, **changes)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"hidden_size": "large"}, "hidden_size is 'large', must be an integer"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rope_theta": -1}, "rope_theta"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1, must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"rope_scaling": [1]}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, r"lacks rope_parameters\.factor"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
            "short_factor",
        ),
    ],
)
def test_malformed_values_are_named(tmp_path, changes, match):
    with pytest.raises(CheckpointError, match=match):
        read(tmp_path, "Mixtral-8x7B", **changes)


def test_a_directory_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no config\.json"):
        ModelConfig.from_hf(tmp_path)
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        ModelConfig.from_hf(tmp_path / "absent")
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="JSON object"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.from_hf(tmp_path)


def test_a_config_without_weights_is_refused(tmp_path):
    write(tmp_path, COMMON | HUB["janus"])
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match="holds neither"):
        ModelConfig.from_hf(tmp_path)
