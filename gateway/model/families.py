"""Where each family keeps its weights, and how they become ours.

Legend: D hidden size, E experts, H heads, R rank of the latent, U size of the unturned part of a
key, V size of a value, X and Y widths of projections.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from gateway.model.attention import (
    AttentionBlock,
    GroupedBlock,
    GroupedWeights,
    LatentBlock,
    LatentWeights,
)
from gateway.model.norm import RmsNorm
from gateway.model.rope import pair_up
from gateway.model.router import Router
from mesh.checkpoint import Checkpoint
from mesh.errors import CheckpointError
from mesh.linear import Linear
from mesh.mlp import Mlp, load_gated, load_plain
from mesh.model_config import GroupedAttention, LatentAttention, ModelConfig

# DeepSeek's norms of latents have this epsilon whatever rms_norm_eps says.
_LATENT_EPS = 1e-6
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERTS = (".mlp.experts.", ".block_sparse_moe.experts.")


class Weights:
    """Reads a checkpoint's tensors onto a device and remembers which it has read."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self._checkpoint = checkpoint
        self._read: set[str] = set()

    def __call__(self, name: str, *shape: int) -> Tensor:
        """A tensor of exactly this shape, on the device, in the model's dtype."""
        self._read.add(name)
        return self._checkpoint.tensor(name, shape, device=self.device, dtype=self.dtype)

    def exact(self, name: str, *shape: int) -> Tensor:
        """The same in float32."""
        self._read.add(name)
        return self._checkpoint.tensor(name, shape, device=self.device, dtype=torch.float32)

    def has(self, name: str) -> bool:
        """Whether the checkpoint has such a tensor."""
        return name in self._checkpoint

    def norm(self, name: str, size: int, eps: float) -> RmsNorm:
        """The RMSNorm whose weight has this name."""
        return RmsNorm(self(name, size), eps)

    def mlp(self, prefix: str, hidden_size: int) -> Mlp:
        """A dense MLP or a shared expert, of the same kind as the routed experts."""
        config = self.config
        parts = ["up_proj", "down_proj"]
        if config.expert_kind == "gated":
            parts.insert(0, "gate_proj")
        names = [f"{prefix}.{part}.weight" for part in parts]
        self._read.update(names)
        sizes = (config.hidden_size, hidden_size, config.activation, self.device, self.dtype)
        if config.expert_kind == "plain":
            return load_plain(self._checkpoint, (names[0], names[1]), *sizes)
        return load_gated(self._checkpoint, (names[0], names[1], names[2]), *sizes)

    def refuse_unread(self) -> None:
        """Refuse tensors that no one reads: the config does not describe the model they are of.

        Experts are read by the workers; layers past the last predict several tokens at once;
        old checkpoints carry RoPE's frequencies, which follow from the config.
        """

        def known(name: str) -> bool:
            layer = _LAYER.match(name)
            return (
                name in self._read
                or (layer is not None and int(layer[1]) >= self.config.num_layers)
                or any(part in name for part in _EXPERTS)
                or name.endswith("rotary_emb.inv_freq")
                or (name == "lm_head.weight" and self.config.tie_word_embeddings)
            )

        unread = sorted(name for name in self._checkpoint if not known(name))
        if unread:
            raise CheckpointError(
                f"{self._checkpoint.directory}: {len(unread)} tensors are of no layer that "
                f"config.json describes, {unread[0]} first: config and weights are of different "
                "models"
            )


def load_attention(weights: Weights, layer: int) -> AttentionBlock:
    """The attention of a layer, projections fused."""
    prefix = f"model.layers.{layer}.self_attn"
    config = weights.config
    if isinstance(config.attention, LatentAttention):
        return _load_latent(weights, prefix, config.attention)
    return _load_grouped(weights, prefix, config.attention, config.windows[layer])


def _load_grouped(
    weights: Weights, prefix: str, config: GroupedAttention, window: int | None
) -> GroupedBlock:
    width, dim = weights.config.hidden_size, config.head_dim
    q_width, kv_width = config.num_heads * dim, config.num_kv_heads * dim
    sizes = {"q_proj": q_width, "k_proj": kv_width, "v_proj": kv_width}

    def turning(name: str, tensor: Tensor) -> Tensor:
        return tensor if name == "v_proj" else pair_up(tensor, dim)

    qkv_XD = torch.cat(
        [turning(n, weights(f"{prefix}.{n}.weight", size, width)) for n, size in sizes.items()]
    )
    qkv_bias_X = output_bias_D = None
    if config.qkv_bias:
        qkv_bias_X = torch.cat(
            [turning(n, weights(f"{prefix}.{n}.bias", size)) for n, size in sizes.items()]
        )
    if config.output_bias:
        output_bias_D = weights(f"{prefix}.o_proj.bias", width)
    output = Linear(weights(f"{prefix}.o_proj.weight", width, q_width), output_bias_D)
    eps = weights.config.norm_eps
    head_norm = q_norm = k_norm = None
    if config.qk_norm == "head":
        q_dim, k_dim = (
            pair_up(weights(f"{prefix}.{name}.weight", dim), dim) for name in ("q_norm", "k_norm")
        )
        head_norm = RmsNorm(
            torch.cat([q_dim.expand(config.num_heads, -1), k_dim.expand(config.num_kv_heads, -1)]),
            eps,
        )
    elif config.qk_norm == "full":
        q_norm = RmsNorm(pair_up(weights(f"{prefix}.q_norm.weight", q_width), dim), eps)
        k_norm = RmsNorm(pair_up(weights(f"{prefix}.k_norm.weight", kv_width), dim), eps)
    sinks_H = weights(f"{prefix}.sinks", config.num_heads) if config.sinks else None
    return GroupedBlock(
        config,
        window,
        GroupedWeights(Linear(qkv_XD, qkv_bias_X), output, head_norm, q_norm, k_norm, sinks_H),
    )


def _load_latent(weights: Weights, prefix: str, config: LatentAttention) -> LatentBlock:
    width, heads, rank = weights.config.hidden_size, config.num_heads, config.kv_lora_rank
    q_width = heads * (config.nope_dim + config.rope_dim)
    kv_name, kv_width = f"{prefix}.kv_a_proj_with_mqa", rank + config.rope_dim

    def turning(rows: Tensor, head_dim: int) -> Tensor:
        """Pair up the turning end of each head."""
        if config.interleaved_rope:
            return rows
        heads_rows = rows.view(-1, head_dim, *rows.shape[1:])
        plain, turned = heads_rows[:, : -config.rope_dim], heads_rows[:, -config.rope_dim :]
        turned = pair_up(turned.flatten(0, 1), config.rope_dim).view(turned.shape)
        return torch.cat([plain, turned], dim=1).flatten(0, 1)

    kv_XD = turning(weights(f"{kv_name}.weight", kv_width, width), kv_width)
    q_norm = q_up = bias_X = output_bias_D = None
    q_head = config.nope_dim + config.rope_dim
    if config.q_lora_rank is None:
        q_XD = turning(weights(f"{prefix}.q_proj.weight", q_width, width), q_head)
        q_bias_X = torch.zeros(q_width, device=weights.device, dtype=weights.dtype)
    else:
        q_rank = config.q_lora_rank
        q_XD = weights(f"{prefix}.q_a_proj.weight", q_rank, width)
        q_norm = weights.norm(f"{prefix}.q_a_layernorm.weight", q_rank, _LATENT_EPS)
        q_up = Linear(turning(weights(f"{prefix}.q_b_proj.weight", q_width, q_rank), q_head))
        if config.bias:
            q_bias_X = weights(f"{prefix}.q_a_proj.bias", q_rank)
    if config.bias:
        bias_X = torch.cat([q_bias_X, turning(weights(f"{kv_name}.bias", kv_width), kv_width)])
        output_bias_D = weights(f"{prefix}.o_proj.bias", width)
    up_HYR = weights(
        f"{prefix}.kv_b_proj.weight", heads * (config.nope_dim + config.value_dim), rank
    ).view(heads, -1, rank)
    output_DX = weights(f"{prefix}.o_proj.weight", width, heads * config.value_dim)
    return LatentBlock(
        config,
        LatentWeights(
            down=Linear(torch.cat([q_XD, kv_XD]), bias_X),
            q_norm=q_norm,
            q_up=q_up,
            kv_norm=weights.norm(f"{prefix}.kv_a_layernorm.weight", rank, _LATENT_EPS),
            key_up_HUR=up_HYR[:, : config.nope_dim].contiguous(),
            value_up_HRV=up_HYR[:, config.nope_dim :].transpose(1, 2).contiguous(),
            output=Linear(output_DX, output_bias_D),
        ),
    )


def load_router(weights: Weights, layer: int) -> Router:
    """The router of a layer that has routed experts."""
    config = weights.config
    name = f"model.layers.{layer}.mlp.gate"
    if config.family == "gpt_oss":
        name = f"model.layers.{layer}.mlp.router"
    elif config.family == "mixtral" and not weights.has(f"{name}.weight"):
        name = f"model.layers.{layer}.block_sparse_moe.gate"
    experts = config.num_experts
    bias_E = correction_E = None
    if config.router.bias:
        bias_E = weights.exact(f"{name}.bias", experts)
    if config.router.correction_bias:
        correction_E = weights.exact(f"{name}.e_score_correction_bias", experts)
    weight_ED = weights.exact(f"{name}.weight", experts, config.hidden_size)
    return Router(config.router, config.experts_per_token, weight_ED, bias_E, correction_E)


def load_shared_expert(weights: Weights, layer: int) -> tuple[Mlp, Tensor | None]:
    """The expert that every token goes to, and the weight of its gate where it has one."""
    config = weights.config
    prefix = f"model.layers.{layer}.mlp"
    if not config.shared_gate:
        return weights.mlp(f"{prefix}.shared_experts", config.shared_hidden_size), None
    gate_1D = weights(f"{prefix}.shared_expert_gate.weight", 1, config.hidden_size)
    return weights.mlp(f"{prefix}.shared_expert", config.shared_hidden_size), gate_1D
