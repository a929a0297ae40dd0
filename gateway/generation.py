"""How a checkpoint wants its tokens chosen where a request does not say: generation_config.json."""

from __future__ import annotations

from pathlib import Path

import structlog

from gateway import validate
from mesh.checkpoint import GENERATION_FILE, read_generation
from mesh.errors import CheckpointError, InvalidInput
from protos import inference_pb2 as pb

log = structlog.get_logger()

_TAKEN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
_NO_CHOICE = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "do_sample",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "return_dict_in_generate",
    "transformers_version",
    "use_cache",
}
"""Keys that do not change which tokens are chosen here, or that :mod:`mesh.model_config` reads."""


def read_defaults(directory: Path) -> pb.SamplingParams:
    """Empty where the checkpoint has no such file. What else the file says is named in the log.

    Raises CheckpointError for a value that a request could not have.
    """
    path = directory / GENERATION_FILE
    said = {name: value for name, value in read_generation(directory).items() if value is not None}
    taken = {name: said.pop(name) for name in _TAKEN if name in said}
    defaults = pb.SamplingParams()
    for name, value in taken.items():
        try:
            if isinstance(value, bool):
                raise TypeError("it must be a number")
            setattr(defaults, name, value)
            validate.check_numbers(validate.filled(defaults))
        except (InvalidInput, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(
                f"{path}: {name} is {value!r}: {error}; mend it, or say --no-generation-config"
            ) from error
    if taken:
        log.info("generation_defaults", path=str(path), **taken)
    if ignored := sorted(said.keys() - _NO_CHOICE):
        log.warning("generation_config_not_applied", path=str(path), keys=ignored)
    return defaults
