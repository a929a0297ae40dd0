"""A tokenizer whose token of a byte is the byte itself; token 256 is special."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

EOS = 256
VOCAB_SIZE = 257


def byte_tokenizer() -> Tokenizer:
    """Made anew: tests may change its settings."""
    tokenizer = Tokenizer(models.BPE({_char(byte): byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def _char(byte: int) -> str:
    """The printable character that stands for a byte in byte-level vocabularies."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(256 + sum(1 for lower in range(byte) if lower not in printable))
