"""Chosen tensors of a Hugging Face checkpoint's safetensors, and nothing else of them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mesh.errors import CheckpointError

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GENERATION_FILE = "generation_config.json"

_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; CheckpointError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}; download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object; download it again")
    return content


def read_generation(directory: Path) -> dict[str, Any]:
    """What a checkpoint's generation_config.json says; empty where it has none."""
    path = directory / GENERATION_FILE
    return read_json(path) if path.is_file() else {}


def layout_bytes(directory: Path) -> bytes:
    """What names the weights of a directory: the index, or the single file's header."""
    single = directory / SINGLE_FILE
    if not single.is_file():
        return _index_path(directory).read_bytes()
    with single.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > single.stat().st_size:
            raise CheckpointError(f"{single} is truncated or no safetensors; download it again")
        return file.read(length)


def has_weights(directory: Path) -> bool:
    """Whether any file of a checkpoint's tensors is there.

    A host may have config.json and the index alone, and get its weights from other hosts.
    """
    if (directory / SINGLE_FILE).is_file():
        return True
    return any((directory / f).is_file() for f in _weight_map(_index_path(directory)).values())


def _index_path(directory: Path) -> Path:
    index = directory / INDEX_FILE
    if not index.is_file():
        raise CheckpointError(
            f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
            "give the directory of a checkpoint in safetensors format"
        )
    return index


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not all(
        isinstance(file, str) and file == os.path.basename(file) for file in found.values()
    ):
        raise CheckpointError(
            f"{index} has no weight_map of tensor names to file names; download it again"
        )
    return found


def _shared_parts(name: str, other: str) -> int:
    pairs = zip(name.split("."), other.split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class Checkpoint:
    """The tensors of a directory by name, whichever file they are in.

    Opening reads every file's header and no data, and finds truncated files, files that the
    index promises but that are absent, and tensors that two files hold. One thread at a time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        promised: dict[str, str] = {}
        if (directory / SINGLE_FILE).is_file():
            files = [SINGLE_FILE]
        else:
            promised = _weight_map(_index_path(directory))
            files = sorted(set(promised.values()))
        self._handles: dict[str, Any] = {}
        self._file_by_name: dict[str, str] = {}
        for file in files:
            self._open(file)
        for name, file in promised.items():
            if self._file_by_name.get(name) != file:
                raise CheckpointError(
                    f"{INDEX_FILE} says that {name} is in {file}, where it is not; "
                    "download the checkpoint again"
                )

    def _open(self, file: str) -> None:
        path = self.directory / file
        if not path.is_file():
            raise CheckpointError(f"{INDEX_FILE} names {path}, which is absent; download it again")
        try:
            handle: Any = safe_open(path, framework="pt")
            names = handle.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is truncated or no safetensors ({error}); download it again"
            ) from error
        self._handles[file] = handle
        for name in names:
            if name in self._file_by_name:
                raise CheckpointError(
                    f"tensor {name} is in both {self._file_by_name[name]} and {file}; "
                    "remove the file that does not belong to the checkpoint"
                )
            self._file_by_name[name] = file

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files. Tensors that were read stay valid."""
        self._handles.clear()
        self._file_by_name.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_by_name

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_by_name)

    @property
    def names(self) -> frozenset[str]:
        """Every tensor of every file."""
        return frozenset(self._file_by_name)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in the header, without reading data."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """float32, bfloat16 or float16; CheckpointError for what is stored in fewer bits."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise CheckpointError(
                f"tensor {name} is stored as {stored}; quantized weights are not served, "
                "convert the checkpoint to bfloat16"
            )
        return _DTYPES[stored]

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        """A tensor in memory of its own; CheckpointError if absent or not of ``shape``."""
        import torch

        from mesh.upload import fill

        self._check(name, shape)
        stored: torch.Tensor = self._handles[self._file_by_name[name]].get_tensor(name)
        own = torch.empty(stored.shape, device=device, dtype=dtype or stored.dtype)
        fill(own, stored)
        return own

    def slice(self, name: str, shape: tuple[int, ...] | None = None) -> Any:
        """What reads only the part that it is indexed with, e.g. ``[3]`` or ``[:, 8:16]``.

        The part may share the file's memory: copy what is to be kept.
        """
        self._check(name, shape)
        return self._slice(name)

    def _slice(self, name: str) -> Any:
        if name not in self._file_by_name:
            raise CheckpointError(f"{self.directory} lacks tensor {name}{self._hint(name)}")
        return self._handles[self._file_by_name[name]].get_slice(name)

    def _hint(self, name: str) -> str:
        if not self._file_by_name:
            return "; it holds no tensors at all"
        nearest = max(self._file_by_name, key=lambda other: _shared_parts(name, other))
        return f"; the nearest is {nearest} in {self._file_by_name[nearest]}: download that again"

    def _check(self, name: str, shape: tuple[int, ...] | None) -> None:
        self.dtype(name)
        found = self.shape(name)
        if shape is not None and found != shape:
            raise CheckpointError(
                f"tensor {name} in {self._file_by_name[name]} has shape {list(found)}, "
                f"config.json asks for {list(shape)}: they are of different models"
            )
