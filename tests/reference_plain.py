"""The plain family, written a second time: slow, in float64, one token at a time.

It shares no code with the product and no trick of it: no cache, no batch, no fused weights, keys
with turning pairs half a head apart as they are stored. Shapes are those of one token: [D].
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor


class PlainReference:
    """``logits(token_ids)`` of a checkpoint directory of the plain family."""

    def __init__(self, directory: Path) -> None:
        self.config = json.loads((directory / "config.json").read_text())
        self.weights = {
            name: tensor.double()
            for file in sorted(directory.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }

    def logits(self, token_ids: list[int]) -> Tensor:
        """[T, V], float64: row t is what follows the first t + 1 tokens."""
        tokens = [self.weights["model.embed_tokens.weight"][token] for token in token_ids]
        for layer in range(self.config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}"
            attended = self._attend(prefix, tokens)
            tokens = [x + y for x, y in zip(tokens, attended, strict=True)]
            tokens = [x + self._mlp(layer, prefix, x) for x in tokens]
        tied = self.config["tie_word_embeddings"]
        head = self.weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
        return torch.stack([head @ self._norm("model.norm", x) for x in tokens])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        mean_square = sum(float(v) ** 2 for v in x) / len(x)
        return (
            x
            / math.sqrt(mean_square + self.config["rms_norm_eps"])
            * self.weights[name + ".weight"]
        )

    def _heads(self, prefix: str, part: str, x: Tensor, count: int) -> list[Tensor]:
        return list((self.weights[f"{prefix}.self_attn.{part}_proj.weight"] @ x).chunk(count))

    def _turn(self, head: Tensor, position: int) -> Tensor:
        half = len(head) // 2
        turned = head.clone()
        for pair in range(half):
            angle = position / self.config["rope_theta"] ** (pair / half)
            first, second = head[pair], head[pair + half]
            turned[pair] = first * math.cos(angle) - second * math.sin(angle)
            turned[pair + half] = second * math.cos(angle) + first * math.sin(angle)
        return turned

    def _attend(self, prefix: str, tokens: list[Tensor]) -> list[Tensor]:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        keys: list[list[Tensor]] = []
        values: list[list[Tensor]] = []
        out = []
        for position, token in enumerate(tokens):
            x = self._norm(f"{prefix}.input_layernorm", token)
            keys.append([self._turn(k, position) for k in self._heads(prefix, "k", x, kv_heads)])
            values.append(self._heads(prefix, "v", x, kv_heads))
            mixed = []
            for head, q in enumerate(self._heads(prefix, "q", x, heads)):
                shared = head * kv_heads // heads
                q = self._turn(q, position)
                scores = torch.stack([q @ k[shared] / math.sqrt(len(q)) for k in keys])
                weights = scores.softmax(0)
                mixed.append(sum(w * v[shared] for w, v in zip(weights, values, strict=True)))
            out.append(self.weights[f"{prefix}.self_attn.o_proj.weight"] @ torch.cat(mixed))
        return out

    def _mlp(self, layer: int, prefix: str, token: Tensor) -> Tensor:
        x = self._norm(f"{prefix}.post_attention_layernorm", token)
        if layer < self.config["first_k_dense_replace"]:
            return self._two_matrices(f"{prefix}.mlp", x)
        scores = (self.weights[f"{prefix}.mlp.gate.weight"] @ x).softmax(0)
        chosen = scores.argsort(descending=True)[: self.config["num_experts_per_tok"]].tolist()
        total = float(scores[chosen].sum()) if self.config.get("norm_topk_prob", True) else 1.0
        return sum(
            scores[expert] / total * self._two_matrices(f"{prefix}.mlp.experts.{expert}", x)
            for expert in chosen
        )

    def _two_matrices(self, prefix: str, x: Tensor) -> Tensor:
        inner = self.weights[f"{prefix}.up_proj.weight"] @ x
        if self.config["hidden_act"] == "gelu":
            inner = torch.tensor([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in inner.tolist()])
        elif self.config["hidden_act"] == "relu":
            inner = inner * (inner > 0)
        else:
            inner = torch.tensor([v / (1 + math.exp(-v)) for v in inner.tolist()])
        return self.weights[f"{prefix}.down_proj.weight"] @ inner.double()
