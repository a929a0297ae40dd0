"""Text comes out whole, however its bytes are cut into tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.text import REPLACEMENT, ChoiceText, Detokenizer, StopStrings, load_tokenizer
from mesh.errors import CheckpointError
from protos import inference_pb2 as pb
from tests.byte_tokenizer import byte_tokenizer


def sentence_piece() -> Tokenizer:
    """A few words and a byte fallback, decoded as Llama's tokenizers are."""
    words = ["<unk>", "\u2581", "\u2581hello", "\u2581world", "s", "<eos>"]
    vocab = words + [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(
        models.BPE({t: i for i, t in enumerate(vocab)}, [], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


BYTES = byte_tokenizer()
WORDS = sentence_piece()
FIRST_BYTE = 6


def pieces(
    tokenizer: Tokenizer, token_ids: list[int], prompt: list[int] | None = None
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt or [], skip_special_tokens=True)
    return [detokenizer.add(token_id) for token_id in token_ids] + [detokenizer.finish()]


def test_an_emoji_comes_out_with_its_last_byte() -> None:
    assert pieces(BYTES, list("a😀b".encode())) == ["a", "", "", "", "😀", "b", ""]


def test_cjk_over_byte_fallback_comes_out_character_by_character() -> None:
    token_ids = [FIRST_BYTE + byte for byte in "你好".encode()]
    assert pieces(WORDS, token_ids) == ["", "", "你", "", "", "好", ""]


def test_bytes_that_never_became_a_character_come_last_as_a_replacement() -> None:
    assert pieces(BYTES, list(b"ok\xf0\x9f")) == ["o", "k", "", "", REPLACEMENT]


def test_an_invalid_byte_within_a_byte_fallback_run_does_not_eat_what_follows() -> None:
    token_ids = [FIRST_BYTE + byte for byte in "你".encode() + b"\xff"] + [2]
    assert "".join(pieces(WORDS, token_ids)) == f"你{REPLACEMENT} hello"


def test_a_word_keeps_its_space_behind_a_prompt() -> None:
    assert "".join(pieces(WORDS, [3, 4], prompt=[2])) == " worlds"
    assert "".join(pieces(WORDS, [3, 4])) == "worlds"


def test_a_word_keeps_its_space_behind_a_skipped_special_token() -> None:
    eos = WORDS.token_to_id("<eos>")
    assert "".join(pieces(WORDS, [2, eos, 3])) == "hello world"


def test_a_character_begun_by_the_prompt_is_finished_by_the_output() -> None:
    data = "a😀".encode()
    assert "".join(pieces(BYTES, list(data[3:]), prompt=list(data[:3]))) == "😀"


@given(st.text(max_size=40))
@settings(max_examples=300)
def test_joined_pieces_are_the_whole_text(text: str) -> None:
    token_ids = list(text.encode())
    out = pieces(BYTES, token_ids)
    assert "".join(out) == text
    assert all(REPLACEMENT not in piece for piece in out) or REPLACEMENT in text


@given(st.binary(max_size=15))
@settings(max_examples=300)
def test_joined_pieces_are_what_the_tokenizer_decodes_from_any_bytes(data: bytes) -> None:
    token_ids = list(data)
    assert "".join(pieces(BYTES, token_ids)) == BYTES.decode(token_ids)


def test_a_million_bytes_of_rubbish_are_never_held_as_one_run() -> None:
    detokenizer = Detokenizer(BYTES, [], skip_special_tokens=True)
    out = [detokenizer.add(token_id) for token_id in list(b"\x80") * 1000]
    longest_wait = max(len(run) for run in "".join("x" if p else "." for p in out).split("x"))
    assert longest_wait < 20
    assert "".join(out) + detokenizer.finish() == REPLACEMENT * 1000


def stop_pieces(stop: list[str], texts: list[str], include: bool = False) -> tuple[list[str], str]:
    matcher = StopStrings(stop, include)
    out = []
    for text in texts:
        emitted, found = matcher.add(text)
        out.append(emitted)
        if found:
            return out, found
    return [*out, matcher.finish()], ""


def test_a_stop_string_is_found_across_pieces_and_its_beginning_held_back() -> None:
    assert stop_pieces(["\n\nQ:"], ["one\n", "\n", "Q", ": two"]) == (["one", "", "", ""], "\n\nQ:")


def test_what_only_looked_like_a_stop_string_comes_out() -> None:
    assert stop_pieces(["STOP"], ["a ST", "Oh ", "S"]) == (["a ", "STOh ", "", "S"], "")


def test_a_stop_string_is_kept_where_asked_for() -> None:
    assert stop_pieces(["END"], ["go EN", "D."], include=True) == (["go ", "END"], "END")


def test_the_stop_string_that_completes_first_wins() -> None:
    assert stop_pieces(["abcd", "bc"], ["xabcd"]) == (["xa"], "bc")


@given(
    st.text(alphabet="ab", max_size=12),
    st.lists(st.text(alphabet="ab", min_size=1, max_size=4), max_size=3),
    st.booleans(),
)
def test_how_a_text_is_cut_does_not_change_where_it_stops(
    text: str, stop: list[str], include: bool
) -> None:
    whole = "".join(stop_pieces(stop, [text], include)[0])
    assert "".join(stop_pieces(stop, list(text), include)[0]) == whole


def test_tokens_behind_the_one_that_completed_a_stop_string_do_not_count() -> None:
    choice = ChoiceText(BYTES, [], pb.SamplingParams(stop=["!"], skip_special_tokens=True))
    assert choice.add(list(b"hi!more")) == ("hi", 3, "!")


def test_stop_strings_within_min_tokens_are_let_through() -> None:
    choice = ChoiceText(BYTES, [], pb.SamplingParams(stop=["a"], min_tokens=3))
    assert choice.add(list(b"aaba")) == ("aab", 4, "a")


def test_a_stop_token_is_hidden_unless_asked_for() -> None:
    for include, text in ((False, "ab"), (True, "ab.")):
        sampling = pb.SamplingParams(include_stop_str_in_output=include)
        piece = ChoiceText(BYTES, [], sampling).add(list(b"ab."), last=True, stopped_by_token=True)
        assert piece == (text, 3, "")


def test_the_last_tokens_let_go_of_what_was_held_back() -> None:
    choice = ChoiceText(BYTES, [], pb.SamplingParams(stop=["STOP"]))
    assert choice.add(list(b"ST")) == ("", 2, "")
    assert choice.add(list(b"O\xf0"), last=True) == (f"STO{REPLACEMENT}", 2, "")


def test_without_a_tokenizer_there_are_only_ids() -> None:
    assert ChoiceText(None, [1], pb.SamplingParams()).add([5, 6], last=True) == ("", 2, "")


def test_a_directory_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_a_tokenizer_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_a_saved_truncation_never_cuts_a_prompt(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.enable_truncation(4)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None
    assert len(loaded.encode("twelve bytes").ids) == 12
