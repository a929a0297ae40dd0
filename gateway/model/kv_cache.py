"""What attention remembers, in blocks.

Legend: S slots (tokens' places in the cache), W elements that a token leaves in a layer.
"""

from __future__ import annotations

import torch

from mesh.model_config import ModelConfig


class KvCache:
    """Memory for ``num_blocks`` blocks of ``block_size`` tokens each, in every layer.

    ``rows[layer]`` is ``[S, W]``: keys of all heads, then values of all heads; of latent
    attention the latent and the turned part of the key. Token t of block b is in row
    ``b * block_size + t``. ``pages[layer]`` is the same memory, a block in a row. There is one
    block more, which stays zero: what is padded is read from there, so that no request ever
    reads, and multiplies with zero, what another left behind.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.zero_block = num_blocks
        width = config.attention.kv_width
        memory = torch.zeros(
            config.num_layers, num_blocks + 1, block_size * width, device=device, dtype=dtype
        )
        self.pages = memory.unbind(0)
        self.rows = memory.view(config.num_layers, -1, width).unbind(0)

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Memory that one block takes in all layers together."""
        return config.num_layers * block_size * config.attention.kv_width * dtype.itemsize
