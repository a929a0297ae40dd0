"""A rank's part of a model: layers of its stage, of each its share of heads and hidden units.

The part is a model by itself, with fewer layers and narrower ones, so that the decoder that
serves the whole takes it as it is; only its sums are of a part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from mesh.checkpoint import Checkpoint
from mesh.errors import ConfigError
from mesh.model_config import GroupedAttention, ModelConfig

_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Split:
    """``tp`` ranks share a layer, ``pp`` stages of ``tp`` ranks share the model."""

    tp: int
    pp: int

    @property
    def num_ranks(self) -> int:
        return self.tp * self.pp

    @property
    def name(self) -> str:
        return f"tp{self.tp}pp{self.pp}"

    @classmethod
    def parse(cls, name: str) -> Split:
        """Of ``tp2pp2``."""
        found = re.fullmatch(r"tp([1-9]\d*)pp([1-9]\d*)", name)
        if found is None:
            raise ConfigError(f"baseline {name!r}: say tp2pp2 for two ranks a layer, two stages")
        return cls(int(found[1]), int(found[2]))

    @classmethod
    def all_of(cls, num_ranks: int) -> list[Split]:
        """Every split of so many ranks, most tensor parallel first."""
        tps = [tp for tp in range(num_ranks, 0, -1) if num_ranks % tp == 0]
        return [cls(tp, num_ranks // tp) for tp in tps]


def part_of(config: ModelConfig, split: Split, tp_rank: int, stage: int) -> ModelConfig:
    """The model that one rank has. Raises ConfigError where heads or layers cannot be shared."""
    attention, tp = config.attention, split.tp
    if not isinstance(attention, GroupedAttention) or config.shared_hidden_size:
        raise ConfigError("the baseline takes grouped attention and no shared experts")
    if config.num_layers < split.pp:
        raise ConfigError(f"{config.num_layers} layers are not to be shared by {split.pp} stages")
    if config.dense_hidden_size % tp:
        raise ConfigError(f"a dense layer of {config.dense_hidden_size} is not to be cut in {tp}")
    heads, kv_heads = attention.num_heads, attention.num_kv_heads
    if heads % tp or (kv_heads % tp and tp % kv_heads):
        raise ConfigError(f"{heads} heads over {kv_heads} of keys are not to be shared by {tp}")
    layers = layers_of(config, split, stage)
    return replace(
        config,
        num_layers=len(layers),
        moe_layers=tuple(n - layers.start for n in layers if n in config.moe_layers),
        dense_hidden_size=config.dense_hidden_size // tp,
        windows=config.windows[layers.start : layers.stop],
        attention=replace(attention, num_heads=heads // tp, num_kv_heads=max(1, kv_heads // tp)),
    )


def layers_of(config: ModelConfig, split: Split, stage: int) -> range:
    """Of a stage: as equally many as whole numbers can be."""
    total = config.num_layers
    return range(total * stage // split.pp, total * (stage + 1) // split.pp)


class PartOfCheckpoint:
    """What a rank reads of a checkpoint, under the names that its part has."""

    directory = Path("part")

    def __init__(
        self, whole: Checkpoint, config: ModelConfig, split: Split, tp_rank: int, stage: int
    ) -> None:
        self._whole = whole
        self._config = config
        self._tp, self._rank = split.tp, tp_rank
        self._first = layers_of(config, split, stage).start

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """The part; ``shape`` is of the part but for the head's, which is of the whole."""
        last = name.rpartition("_proj")[0].rpartition(".")[2]
        whole, stored, dim = list(shape), self._stored(name), 0
        if name == "lm_head.weight":
            rows = shape[0]
            begin, end = rows * self._rank // self._tp, rows * (self._rank + 1) // self._tp
        elif last in ("q", "k", "v", "o", "gate", "up", "down"):
            dim = 1 if last in ("o", "down") else 0
            begin, end, whole[dim] = self._share(last, shape[dim])
        else:
            return self._whole.tensor(stored, shape, device=device, dtype=dtype)
        read = self._whole.tensor(stored, tuple(whole), device=device, dtype=dtype)
        return read.narrow(dim, begin, end - begin).clone()

    def _share(self, projection: str, size: int) -> tuple[int, int, int]:
        """From where to where, and of how many rows: of keys' heads, a rank may have one that
        others have too."""
        if projection not in ("k", "v"):
            return self._rank * size, (self._rank + 1) * size, self._tp * size
        attention = self._config.attention
        assert isinstance(attention, GroupedAttention)
        heads = attention.num_kv_heads
        first = heads * self._rank // self._tp * attention.head_dim
        return first, first + size, heads * attention.head_dim

    def slice(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of an expert, of which its reader takes a part."""
        return self._whole.slice(self._stored(name), shape)

    def _stored(self, name: str) -> str:
        layer = _LAYER.match(name)
        if layer is None:
            return name
        return f"model.layers.{self._first + int(layer[1])}.{name[layer.end() :]}"

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self._whole

    def __iter__(self) -> Iterator[str]:
        return iter(())


def checkpoint_part(
    whole: Checkpoint, config: ModelConfig, split: Split, tp_rank: int, stage: int
) -> Checkpoint:
    """To be taken for a checkpoint."""
    return cast(Checkpoint, PartOfCheckpoint(whole, config, split, tp_rank, stage))
