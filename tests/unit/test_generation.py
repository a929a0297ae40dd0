"""What a checkpoint's generation_config.json says of sampling, and what a request makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from gateway.generation import read_defaults
from gateway.validate import Limits, check_sampling
from mesh.errors import CheckpointError
from protos import inference_pb2 as pb


def written(directory: Path, **content: object) -> Path:
    (directory / "generation_config.json").write_text(json.dumps(content))
    return directory


def asked(defaults: pb.SamplingParams, **fields: object) -> pb.SamplingParams:
    limits = Limits("tiny", 100, 16, 64, defaults)
    return check_sampling(pb.SamplingParams(**fields), limits)


def test_what_a_request_leaves_out_is_the_checkpoints_and_then_ours(tmp_path: Path) -> None:
    qwen = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": [1]}
    defaults = read_defaults(written(tmp_path, **qwen))
    checked = asked(defaults)
    assert (checked.temperature, checked.top_p) == (pytest.approx(0.6), pytest.approx(0.95))
    assert (checked.top_k, checked.min_p, checked.n) == (20, 0.0, 1)
    checked = asked(defaults, temperature=0.0, top_k=0, stop_token_ids=[7])
    assert (checked.temperature, checked.top_k, list(checked.stop_token_ids)) == (0.0, 0, [7])
    assert checked.top_p == pytest.approx(0.95)


@pytest.mark.parametrize("content", [None, {}, {"temperature": None, "eos_token_id": 2}])
def test_without_a_word_ours_are_left(tmp_path: Path, content: dict[str, object] | None) -> None:
    if content is not None:
        written(tmp_path, **content)
    assert asked(read_defaults(tmp_path)) == asked(pb.SamplingParams())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"temperature": -1}, "temperature -1 must be 0"),
        ({"top_p": 1.5}, "top_p 1.5 must be above 0"),
        ({"top_k": "all"}, "top_k"),
        ({"repetition_penalty": [1.1]}, "repetition_penalty"),
        ({"temperature": True}, "temperature is True: it must be a number"),
        ({"temperature": 10**400}, "temperature is 1000"),
        ({"top_k": 1 << 40}, "top_k|range"),
    ],
)
def test_what_no_request_could_ask_is_refused(
    tmp_path: Path, content: dict[str, object], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as refused:
        read_defaults(written(tmp_path, **content))
    assert str(tmp_path) in str(refused.value)


def test_what_is_not_applied_is_named(tmp_path: Path) -> None:
    with capture_logs() as logs:
        read_defaults(written(tmp_path, suppress_tokens=[1], num_beams=4, transformers_version="5"))
    (told,) = logs
    assert (told["event"], told["log_level"]) == ("generation_config_not_applied", "warning")
    assert told["keys"] == ["num_beams", "suppress_tokens"]
