"""One description of a model, whatever family it is from.

Everything in a config.json that changes the numbers is read here or refused by name: a key
that its family's reader did not ask for, and that is not known to be harmless, is an error.

The ``plain`` family, for the models of papers, is our own:

- ``model_type`` is ``expert_mesh_plain``; multi-head attention, RMSNorm, RoPE, a softmax top-k
  router, experts of two matrices with one activation between them.
- Keys: ``vocab_size``, ``hidden_size``, ``intermediate_size`` (of an expert),
  ``dense_intermediate_size`` (of the first dense layers; ``intermediate_size`` if absent),
  ``num_hidden_layers``, ``num_attention_heads``, ``num_key_value_heads`` (all heads if absent),
  ``head_dim`` (``hidden_size / num_attention_heads`` if absent), ``hidden_act`` (gelu if absent),
  ``max_position_embeddings``, ``rms_norm_eps`` (1e-5), ``rope_theta`` (10000) and
  ``rope_scaling`` or ``rope_parameters``, ``tie_word_embeddings`` (false),
  ``num_local_experts``, ``num_experts_per_tok``, ``norm_topk_prob`` (true),
  ``first_k_dense_replace`` (0), ``eos_token_id``, ``dtype``.
- Tensors, beside those of the embedding, attention and norms, which are named as Mixtral's:
  ``model.layers.L.mlp.gate.weight`` [experts, hidden],
  ``model.layers.L.mlp.experts.E.up_proj.weight`` [intermediate, hidden] and ``...down_proj.weight``
  [hidden, intermediate]; of a dense layer ``model.layers.L.mlp.up_proj.weight`` and
  ``...down_proj.weight``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mesh.checkpoint import GENERATION_FILE, layout_bytes, read_generation, read_json
from mesh.errors import CheckpointError, UnsupportedModel
from mesh.wire import MAX_EXPERTS, MAX_LAYERS

ROPE_KINDS = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
BYTES_PER_ELEMENT = {"float32": 4, "bfloat16": 2, "float16": 2}
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: one of :data:`ROPE_KINDS` and the numbers that it needs.

    Where frequencies depend on how long a sequence has become (dynamic, longrope), ``max_len``
    ends where they would change: no answer depends on how its prompt was cut into chunks.
    """

    kind: str
    theta: float
    dim: int
    """Elements of a head that turn."""
    max_len: int
    """Positions that the rotation is made for."""
    factor: float = 1.0
    original_max_len: int = 0
    attention_factor: float = 1.0
    """What cosine and sine are multiplied by."""
    softmax_factor: float = 1.0
    """What DeepSeek multiplies the scale of the attention scores by."""
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    short_factor: tuple[float, ...] = ()


@dataclass(frozen=True)
class GroupedAttention:
    """Multi-head attention, with fewer key and value heads where the model has fewer."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm over each head's, or over all heads', queries and keys."""
    clip_qkv: float | None = None
    sinks: bool = False
    """A learned logit per head that takes part in the softmax and has no value."""

    @property
    def kv_width(self) -> int:
        """Elements that one token leaves in the cache of one layer."""
        return 2 * self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class LatentAttention:
    """DeepSeek's multi-head latent attention: keys and values are made of one small latent."""

    num_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    scale: float
    bias: bool = False
    interleaved_rope: bool = True
    """Turning pairs lie side by side, not half a head apart."""

    @property
    def kv_width(self) -> int:
        """Elements that one token leaves in the cache of one layer."""
        return self.kv_lora_rank + self.rope_dim


@dataclass(frozen=True)
class RouterConfig:
    """How a token's experts are chosen and weighted."""

    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: bool = False
    """Weights of the chosen experts sum to one (for softmax: the softmax of their logits)."""
    scale: float = 1.0
    bias: bool = False
    correction_bias: bool = False
    """A bias that takes part in the choice and not in the weights."""
    num_groups: int = 1
    groups_per_token: int = 1
    group_score: Literal["best", "two_best"] = "best"


@dataclass(frozen=True)
class SwigluClamp:
    """gpt-oss: ``(up + 1) * gate * sigmoid(alpha * gate)``, both clamped to the limit."""

    alpha: float
    limit: float


@dataclass(frozen=True)
class ModelConfig:
    """What the services need to know of a checkpoint. Made by :meth:`from_hf`, never mutated."""

    family: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_model_len: int
    num_experts: int
    experts_per_token: int
    moe_layers: tuple[int, ...]
    """Decoder layers that have routed experts, ascending."""
    expert_hidden_size: int
    expert_kind: Literal["gated", "plain"]
    dtype: str
    """Of the checkpoint: float32, bfloat16 or float16."""
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    """Hash of the config and of the weights' index: two processes with different ones don't mix."""
    attention: GroupedAttention | LatentAttention
    windows: tuple[int | None, ...]
    """Of each layer: how many positions a token sees, itself included; None: all before it."""
    rope: RopeConfig
    router: RouterConfig
    norm_eps: float
    activation: str
    clamp: SwigluClamp | None = None
    expert_bias: bool = False
    dense_hidden_size: int = 0
    """Of the layers that have no routed experts."""
    shared_hidden_size: int = 0
    """Of the expert that every token goes to, on the gateway; 0: none."""
    shared_gate: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_hf(cls, directory: Path) -> ModelConfig:
        """Read config.json, generation_config.json and the names of the weights.

        Raises CheckpointError for a directory that is no checkpoint, UnsupportedModel for a
        model or a setting that this version would compute wrongly.
        """
        path = directory / "config.json"
        if not path.is_file():
            raise CheckpointError(
                f"{directory} is no checkpoint: it has no config.json; "
                "give the directory that holds config.json and the safetensors files"
            )
        values = read_json(path)
        family = values.get("model_type")
        if not isinstance(family, str) or family not in _FAMILIES:
            raise UnsupportedModel(
                f"{path}: model_type {family!r} is not supported; supported are "
                + ", ".join(sorted(_FAMILIES))
            )
        keys = _Keys(values, path)
        if keys.integer("num_hidden_layers") > MAX_LAYERS:
            raise keys.unsupported("num_hidden_layers", f"the most are {MAX_LAYERS} layers")
        fields = _FAMILIES[family](keys)
        fields.setdefault("activation", keys.choice("hidden_act", ACTIVATIONS, "silu"))
        fields.setdefault("windows", (None,) * keys.integer("num_hidden_layers"))
        digest = hashlib.sha256(path.read_bytes() + layout_bytes(directory)).hexdigest()
        config = cls(
            family=family,
            hidden_size=keys.integer("hidden_size"),
            num_layers=keys.integer("num_hidden_layers"),
            vocab_size=keys.integer("vocab_size"),
            dtype=_dtype(keys),
            eos_token_ids=_eos_token_ids(keys, directory),
            fingerprint=digest[:16],
            tie_word_embeddings=keys.flag("tie_word_embeddings", False),
            max_model_len=fields["rope"].max_len,
            **fields,
        )
        keys.refuse_unread()
        _check(config, path)
        return config

    def experts_grouped(self, itemsize: int) -> bool:
        """Whether a GPU that serves them in so many bytes a number computes those of a layer that
        it holds together; see :class:`mesh.mlp.StackedMlps`."""
        return self.clamp is None and itemsize == 2

    def expert_bytes(self, dtype: str) -> int:
        """Bytes of one routed expert's parameters on a device, in float32, bfloat16 or float16."""
        matrices = 3 if self.expert_kind == "gated" else 2
        elements = matrices * self.hidden_size * self.expert_hidden_size
        if self.expert_bias:
            elements += (matrices - 1) * self.expert_hidden_size + self.hidden_size
        return elements * BYTES_PER_ELEMENT[dtype]


# What these keys say has no bearing on the logits of inference, or is read by the front.
_HARMLESS = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "attn_implementation",
        "auto_map",
        "aux_loss_alpha",
        "bos_token_id",
        "ep_size",
        "id2label",
        "initializer_range",
        "label2id",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "pad_token_id",
        "pretraining_tp",
        "return_dict",
        "router_aux_loss_coef",
        "router_jitter_noise",
        "seq_aux",
        "tokenizer_class",
        "transformers_version",
        "use_cache",
    }
)


class _Keys:
    """The keys of a config.json, each asked for by name; null is the same as absent, unless
    :meth:`is_null` is asked."""

    def __init__(self, values: Mapping[str, Any], path: Path, prefix: str = "") -> None:
        self.path = path
        self._values = {key: value for key, value in values.items() if value is not None}
        self._nulls = values.keys() - self._values.keys()
        self._prefix = prefix
        self._read: set[str] = set()

    def has(self, key: str) -> bool:
        """Whether the key is there with a value; counts as asking for it."""
        self._read.add(key)
        return key in self._values

    def is_null(self, key: str) -> bool:
        """Whether the key is there without a value; counts as asking for it."""
        self._read.add(key)
        return key in self._nulls

    def raw(self, key: str) -> Any:
        """The value as it is, None if absent."""
        self._read.add(key)
        return self._values.get(key)

    def _typed(self, key: str, kinds: tuple[type, ...], default: Any, wanted: str) -> Any:
        value = self.raw(key)
        if value is None:
            if default is None:
                raise CheckpointError(f"{self.path} lacks {self._prefix}{key}, {wanted}")
            return default
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise self.malformed(key, wanted)
        return value

    def malformed(self, key: str, wanted: str) -> CheckpointError:
        """The error for a value that is not ``wanted``."""
        return CheckpointError(
            f"{self.path}: {self._prefix}{key} is {self._values.get(key)!r}, must be {wanted}"
        )

    def unsupported(self, key: str, remedy: str) -> UnsupportedModel:
        """The error for a value that this version would compute wrongly."""
        return UnsupportedModel(
            f"{self.path}: {self._prefix}{key} = {self._values.get(key)!r} is not supported; "
            + remedy
        )

    def integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """An integer; required without a default."""
        value = self._typed(key, (int,), default, f"an integer of {minimum} or more")
        if value < minimum:
            raise self.malformed(key, f"{minimum} or more")
        return int(value)

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above zero; required without a default."""
        value = float(self._typed(key, (int, float), default, "a number"))
        if not (math.isfinite(value) and value > 0):
            raise self.malformed(key, "a finite number above 0")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        return bool(self._typed(key, (bool,), default, "true or false"))

    def choice(self, key: str, allowed: tuple[str, ...], default: str) -> str:
        """One of the strings that this version implements."""
        value = self._typed(key, (str,), default, "a string")
        if value not in allowed:
            raise self.unsupported(key, "supported are " + ", ".join(allowed))
        return str(value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of ``length`` numbers."""
        value = self._typed(key, (list,), None, "a list of numbers")
        if len(value) != length or not all(isinstance(n, int | float) for n in value):
            raise self.malformed(key, f"a list of {length} numbers")
        return tuple(float(n) for n in value)

    def only(self, key: str, *allowed: Any, because: str) -> None:
        """Refuse a value that is not one of ``allowed``; absent is allowed."""
        value = self.raw(key)
        if value is not None and value not in allowed:
            raise self.unsupported(key, because)

    def refuse_unread(self) -> None:
        """Refuse by name what nobody asked for and what is not known to be harmless."""
        self.only("is_encoder_decoder", False, because="only decoders are served")
        self.only("add_cross_attention", False, because="only decoders are served")
        self.only(
            "quantization_config",
            because="bfloat16 weights are needed: convert the checkpoint to bfloat16",
        )
        unknown = sorted(self._values.keys() - self._read - _HARMLESS)
        if unknown:
            raise UnsupportedModel(
                f"{self.path}: {', '.join(self._prefix + key for key in unknown)}: not known to "
                "this version for this model; remove what does not change the model's numbers"
            )


def _dtype(keys: _Keys) -> str:
    old_name = keys.choice("torch_dtype", tuple(BYTES_PER_ELEMENT), "float32")
    return keys.choice("dtype", tuple(BYTES_PER_ELEMENT), old_name)


def _eos_token_ids(keys: _Keys, directory: Path) -> tuple[int, ...]:
    """The ids that end a text: generation_config.json overrules config.json."""
    found, source = keys.raw("eos_token_id"), keys.path
    generation = read_generation(directory)
    if "eos_token_id" in generation:
        found, source = generation["eos_token_id"], directory / GENERATION_FILE
    ids = [] if found is None else found if isinstance(found, list) else [found]
    last = keys.integer("vocab_size") - 1
    if not all(type(token) is int and 0 <= token <= last for token in ids):
        raise CheckpointError(
            f"{source}: eos_token_id is {found!r}, must be an id of the vocabulary, 0 to {last}, "
            "or a list of them; null: no id ends a text"
        )
    return tuple(ids)


def _mscale(factor: float, weight: float) -> float:
    """YaRN's attention temperature, https://arxiv.org/abs/2309.00071, section 3.4."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _rope(
    keys: _Keys, dim: int, *, theta: float = 10000.0, default: Mapping[str, Any] | None = None
) -> RopeConfig:
    """Read the new (``rope_parameters``) and the old (``rope_theta``, ``rope_scaling``) style."""
    new, old = keys.raw("rope_parameters"), keys.raw("rope_scaling")
    if new and old and new != old:
        raise keys.unsupported("rope_scaling", "it contradicts rope_parameters: remove one")
    values = old or new or default or {}
    if not isinstance(values, Mapping):
        raise keys.malformed("rope_scaling" if old else "rope_parameters", "an object")
    rope = _Keys(values, keys.path, "rope_parameters.")
    keys.only("partial_rotary_factor", 1, because="heads must turn whole")
    rope.only("partial_rotary_factor", 1, because="heads must turn whole")
    rope.raw("type")  # the older name of rope_type; some files have both
    kind = rope.choice("rope_type" if rope.has("rope_type") else "type", ROPE_KINDS, "default")
    max_len = keys.integer("max_position_embeddings")
    fields: dict[str, Any] = {
        "kind": kind,
        "theta": rope.number("rope_theta", keys.number("rope_theta", theta)),
        "dim": dim,
        "max_len": max_len,
    }
    if kind in ("linear", "dynamic", "llama3"):
        fields["factor"] = rope.number("factor")
    if kind in ("yarn", "llama3", "longrope"):
        inner = rope.integer("original_max_position_embeddings", max_len)
        original = keys.integer("original_max_position_embeddings", inner)
        fields["original_max_len"] = original
    if kind == "llama3":
        fields["low_freq_factor"] = rope.number("low_freq_factor")
        fields["high_freq_factor"] = rope.number("high_freq_factor")
    if kind == "longrope":
        factor = rope.number("factor", max_len / original)
        natural = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        fields["attention_factor"] = rope.number("attention_factor", natural)
        fields["short_factor"] = rope.numbers("short_factor", dim // 2)
        rope.numbers("long_factor", dim // 2)
        fields["max_len"] = min(max_len, original)
    if kind == "yarn":
        factor = rope.number("factor", max_len / original)
        weight = rope.number("mscale") if rope.raw("mscale") else 0.0
        weight_all = rope.number("mscale_all_dim") if rope.raw("mscale_all_dim") else 0.0
        natural = _mscale(factor, 1)
        if weight and weight_all:
            natural = _mscale(factor, weight) / _mscale(factor, weight_all)
        fields["factor"] = factor
        fields["attention_factor"] = rope.number("attention_factor", natural)
        fields["softmax_factor"] = _mscale(factor, weight_all) ** 2
        fields["beta_fast"] = rope.number("beta_fast", 32.0)
        fields["beta_slow"] = rope.number("beta_slow", 1.0)
        fields["truncate"] = rope.flag("truncate", True)
        fields["max_len"] = max(max_len, int(factor * original))
    rope.refuse_unread()
    return RopeConfig(**fields)


def _grouped(keys: _Keys, **settings: Any) -> GroupedAttention:
    heads = keys.integer("num_attention_heads")
    head_dim = keys.integer("head_dim", max(1, keys.integer("hidden_size") // heads))
    return GroupedAttention(
        num_heads=heads,
        num_kv_heads=keys.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        scale=head_dim**-0.5,
        **settings,
    )


def _all_layers(keys: _Keys) -> tuple[int, ...]:
    return tuple(range(keys.integer("num_hidden_layers")))


def _every_layer(keys: _Keys, window: int | None) -> tuple[int | None, ...]:
    return (window,) * keys.integer("num_hidden_layers")


def _windows_by_type(keys: _Keys, types: list[str], window: int | None) -> tuple[int | None, ...]:
    """``layer_types`` of the config, or ``types``, as windows."""
    given = keys.raw("layer_types") or types
    if not isinstance(given, list) or len(given) != keys.integer("num_hidden_layers"):
        raise keys.malformed("layer_types", "a list with an entry for each layer")
    if not set(given) <= {"sliding_attention", "full_attention"}:
        raise keys.unsupported("layer_types", "known are sliding_attention and full_attention")
    if window is None and "sliding_attention" in given:
        raise keys.unsupported("layer_types", "sliding_attention needs a sliding_window in use")
    return tuple(window if kind == "sliding_attention" else None for kind in given)


def _mixtral(keys: _Keys) -> dict[str, Any]:
    attention = _grouped(keys)
    rope = _rope(keys, attention.head_dim, theta=1e6)
    window = keys.integer("sliding_window") if keys.has("sliding_window") else None
    return {
        "attention": attention,
        "rope": rope,
        "windows": _every_layer(keys, window),
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "num_experts": _aliased(keys, "num_local_experts", "num_experts"),
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "router": RouterConfig(normalize=True),
        "moe_layers": _all_layers(keys),
        "expert_kind": "gated",
        "expert_hidden_size": keys.integer("intermediate_size"),
    }


def _aliased(keys: _Keys, name: str, other: str) -> int:
    """A number that ``transformers`` writes under either name."""
    if keys.has(name) and keys.has(other) and keys.raw(name) != keys.raw(other):
        raise keys.malformed(other, f"the same as {name}")
    return keys.integer(name if keys.has(name) else other)


def _qwen_moe(keys: _Keys) -> dict[str, Any]:
    """What Qwen2-MoE and Qwen3-MoE have in common."""
    layers = keys.integer("num_hidden_layers")
    step = keys.integer("decoder_sparse_step", 1)
    dense = keys.raw("mlp_only_layers") or []
    if not isinstance(dense, list):
        raise keys.malformed("mlp_only_layers", "a list of layers")
    moe_layers = tuple(n for n in range(layers) if n not in dense and (n + 1) % step == 0)
    return {
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "num_experts": _aliased(keys, "num_experts", "num_local_experts"),
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "router": RouterConfig(normalize=keys.flag("norm_topk_prob", False)),
        "moe_layers": moe_layers,
        "expert_kind": "gated",
        "expert_hidden_size": keys.integer("moe_intermediate_size"),
        "dense_hidden_size": keys.integer("intermediate_size"),
    }


def _qwen2_moe(keys: _Keys) -> dict[str, Any]:
    attention = _grouped(keys, qkv_bias=keys.flag("qkv_bias", True))
    rope = _rope(keys, attention.head_dim)
    sliding = keys.flag("use_sliding_window", False)
    window = keys.integer("sliding_window", 0 if not sliding else None, minimum=int(sliding))
    first_full = keys.integer("max_window_layers", 28, minimum=0)
    types = [
        "sliding_attention" if sliding and layer % 2 == 0 and layer < first_full
        else "full_attention"
        for layer in _all_layers(keys)
    ]  # fmt: skip
    return _qwen_moe(keys) | {
        "attention": attention,
        "rope": rope,
        "windows": _windows_by_type(keys, types, window if sliding else None),
        "shared_hidden_size": keys.integer("shared_expert_intermediate_size"),
        "shared_gate": True,
    }


def _qwen3_moe(keys: _Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias", False)
    attention = _grouped(keys, qk_norm="head", qkv_bias=bias, output_bias=bias)
    rope = _rope(keys, attention.head_dim)
    sliding = keys.flag("use_sliding_window", False)
    window = keys.integer("sliding_window", 0 if not sliding else None, minimum=int(sliding))
    first_windowed = keys.integer("max_window_layers", 0, minimum=0)
    if sliding and first_windowed:
        raise keys.unsupported("max_window_layers", "with use_sliding_window it must be absent")
    return _qwen_moe(keys) | {
        "attention": attention,
        "rope": rope,
        "windows": _every_layer(keys, window if sliding else None),
    }


def _olmoe(keys: _Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias", False)
    attention = _grouped(
        keys,
        qk_norm="full",
        qkv_bias=bias,
        output_bias=bias,
        clip_qkv=keys.number("clip_qkv") if keys.has("clip_qkv") else None,
    )
    rope = _rope(keys, attention.head_dim)
    return {
        "attention": attention,
        "rope": rope,
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "num_experts": _aliased(keys, "num_experts", "num_local_experts"),
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "router": RouterConfig(normalize=keys.flag("norm_topk_prob", False)),
        "moe_layers": _all_layers(keys),
        "expert_kind": "gated",
        "expert_hidden_size": keys.integer("intermediate_size"),
    }


def _deepseek(keys: _Keys) -> dict[str, Any]:
    """What DeepSeek-V2 and -V3 have in common. Layers past the last, for predicting several
    tokens at once (``num_nextn_predict_layers``), are not part of the decoder."""
    keys.raw("num_nextn_predict_layers")
    keys.only("moe_layer_freq", 1, because="every layer past the dense ones must have experts")
    keys.only("mlp_bias", False, because="MLPs must have no biases")
    heads = keys.integer("num_attention_heads")
    keys.only("num_key_value_heads", heads, because="it must be num_attention_heads")
    nope, rope_dim = keys.integer("qk_nope_head_dim"), keys.integer("qk_rope_head_dim")
    keys.only("head_dim", rope_dim, nope + rope_dim, because="the parts of a head must add up")
    keys.only("qk_head_dim", nope + rope_dim, because="the parts of a head must add up")
    rope = _rope(keys, rope_dim)
    attention = LatentAttention(
        num_heads=heads,
        q_lora_rank=keys.integer("q_lora_rank") if keys.has("q_lora_rank") else None,
        kv_lora_rank=keys.integer("kv_lora_rank"),
        nope_dim=nope,
        rope_dim=rope_dim,
        value_dim=keys.integer("v_head_dim"),
        scale=(nope + rope_dim) ** -0.5 * rope.softmax_factor,
        bias=keys.flag("attention_bias", False),
        interleaved_rope=keys.flag("rope_interleave", True),
    )
    dense = keys.integer("first_k_dense_replace", minimum=0)
    expert_hidden_size = keys.integer("moe_intermediate_size")
    return {
        "attention": attention,
        "rope": rope,
        "norm_eps": keys.number("rms_norm_eps", 1e-6),
        "num_experts": _aliased(keys, "n_routed_experts", "num_experts"),
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "moe_layers": _all_layers(keys)[dense:],
        "expert_kind": "gated",
        "expert_hidden_size": expert_hidden_size,
        "dense_hidden_size": keys.integer("intermediate_size"),
        "shared_hidden_size": expert_hidden_size * keys.integer("n_shared_experts", 0, minimum=0),
    }


def _deepseek_v2(keys: _Keys) -> dict[str, Any]:
    keys.only("scoring_func", "softmax", because="DeepSeek-V2 routes by softmax")
    keys.only("norm_topk_prob", False, because="implementations of DeepSeek-V2 disagree on it")
    keys.only("rope_interleave", True, because="DeepSeek-V2 turns neighbours")
    groups, chosen = keys.integer("n_group", 1), keys.integer("topk_group", 1)
    if keys.choice("topk_method", ("greedy", "group_limited_greedy"), "greedy") == "greedy":
        groups = chosen = 1
    return _deepseek(keys) | {
        "router": RouterConfig(
            scale=keys.number("routed_scaling_factor", 1.0),
            num_groups=groups,
            groups_per_token=chosen,
        ),
    }


def _deepseek_v3(keys: _Keys) -> dict[str, Any]:
    keys.only("scoring_func", "sigmoid", because="DeepSeek-V3 routes by sigmoid")
    keys.only("topk_method", "noaux_tc", because="DeepSeek-V3 routes by noaux_tc")
    return _deepseek(keys) | {
        "router": RouterConfig(
            scoring="sigmoid",
            normalize=keys.flag("norm_topk_prob", True),
            scale=keys.number("routed_scaling_factor", 2.5),
            correction_bias=True,
            num_groups=keys.integer("n_group", 8),
            groups_per_token=keys.integer("topk_group", 4),
            group_score="two_best",
        ),
    }


def _gpt_oss(keys: _Keys) -> dict[str, Any]:
    bias = keys.flag("attention_bias", True)
    attention = _grouped(keys, qkv_bias=bias, output_bias=bias, sinks=True)
    keys.raw("initial_context_length")  # repeats what the RoPE parameters say
    yarn = {
        "rope_type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
    rope = _rope(keys, attention.head_dim, theta=150000.0, default=yarn)
    keys.choice("hidden_act", ("silu",), "silu")
    types = ["sliding_attention", "full_attention"] * keys.integer("num_hidden_layers")
    no_window = keys.is_null("sliding_window")
    window = None if no_window else keys.integer("sliding_window", 128)
    return {
        "attention": attention,
        "rope": rope,
        "windows": _windows_by_type(keys, types[: keys.integer("num_hidden_layers")], window),
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "num_experts": _aliased(keys, "num_local_experts", "num_experts"),
        "experts_per_token": _aliased(keys, "num_experts_per_tok", "experts_per_token"),
        "router": RouterConfig(normalize=True, bias=True),
        "moe_layers": _all_layers(keys),
        "expert_kind": "gated",
        "expert_hidden_size": keys.integer("intermediate_size"),
        "expert_bias": True,
        "clamp": SwigluClamp(
            alpha=keys.number("swiglu_alpha", 1.702), limit=keys.number("swiglu_limit", 7.0)
        ),
    }


def _plain(keys: _Keys) -> dict[str, Any]:
    attention = _grouped(keys)
    rope = _rope(keys, attention.head_dim)
    hidden = keys.integer("intermediate_size")
    return {
        "attention": attention,
        "rope": rope,
        "norm_eps": keys.number("rms_norm_eps", 1e-5),
        "activation": keys.choice("hidden_act", ACTIVATIONS, "gelu"),
        "num_experts": keys.integer("num_local_experts"),
        "experts_per_token": keys.integer("num_experts_per_tok"),
        "router": RouterConfig(normalize=keys.flag("norm_topk_prob", True)),
        "moe_layers": _all_layers(keys)[keys.integer("first_k_dense_replace", 0, minimum=0) :],
        "expert_kind": "plain",
        "expert_hidden_size": hidden,
        "dense_hidden_size": keys.integer("dense_intermediate_size", hidden),
    }


_FAMILIES: dict[str, Callable[[_Keys], dict[str, Any]]] = {
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "qwen3_moe": _qwen3_moe,
    "olmoe": _olmoe,
    "deepseek_v2": _deepseek_v2,
    "deepseek_v3": _deepseek_v3,
    "gpt_oss": _gpt_oss,
    "expert_mesh_plain": _plain,
}


def _check(config: ModelConfig, path: Path) -> None:
    """What has to hold between the numbers of a config, and the limits of the wire."""

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise UnsupportedModel(f"{path}: {message}")

    require(config.num_experts <= MAX_EXPERTS, f"more than {MAX_EXPERTS} experts of a layer")
    require(bool(config.moe_layers), "no layer has routed experts")
    require(config.experts_per_token <= config.num_experts, "more experts per token than experts")
    require(config.rope.dim % 2 == 0, "RoPE turns pairs: an odd number of elements of a head")
    router, attention = config.router, config.attention
    require(config.num_experts % router.num_groups == 0, "groups of experts must be equal in size")
    require(router.groups_per_token <= router.num_groups, "topk_group is above n_group")
    group_size = config.num_experts // router.num_groups
    require(
        config.experts_per_token <= router.groups_per_token * group_size,
        "the groups of a token have fewer experts than it needs",
    )
    require(
        router.num_groups == 1 or router.group_score == "best" or group_size >= 2,
        "groups of one expert have no two best",
    )
    if isinstance(attention, GroupedAttention):
        require(
            attention.num_heads % attention.num_kv_heads == 0,
            "num_attention_heads must be a multiple of num_key_value_heads",
        )
