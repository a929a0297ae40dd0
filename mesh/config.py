"""Configuration of each process: frozen, validated once at start, said by flags, environment
variables (``EXPERT_MESH_<FIELD>``) or a TOML file, in that order of precedence.

The command line is made from these fields (:mod:`cli.options`): ``help`` in the metadata is
what a person reads, the type is what is accepted.
"""

from __future__ import annotations

import math
import os
import socket
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mesh import wire
from mesh.errors import ConfigError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
PlacementRule = Literal["per-layer", "strict"]


def option(default: Any, help: str) -> Any:
    """A field with the sentence that the command line shows for it."""
    return field(default=default, metadata={"help": help})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def read_lines(path: Path, flag: str) -> list[str]:
    """The lines of a file that are not blank. ConfigError names the flag when there is no text."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{flag} {path}: {error}; it must be UTF-8 text") from error
    return [line for line in text.splitlines() if line.strip()]


def default_name(kind: str) -> str:
    """A name that no other process of this or another host has."""
    return f"{kind}-{socket.gethostname()}-{os.getpid()}"


def resolve_dtype(choice: Dtype, device: str, checkpoint_dtype: str) -> str:
    """The dtype of weights and rows; the same answer for the gateway and for its workers."""
    if choice != "auto":
        return choice
    return checkpoint_dtype if device.startswith("cuda") else "float32"


@dataclass(frozen=True)
class ServerConfig:
    """What every process of the mesh has: where it listens, whom it trusts, how it logs."""

    host: str = option("127.0.0.1", "Address to listen on; loopback unless you say otherwise.")
    port: int = option(0, "gRPC port; 0 takes a free one.")
    preferred_port: int = option(0, "Where port is 0: the one to take if nobody has it.")
    http_port: int = option(0, "Port of /healthz, /readyz and /metrics; 0 takes a free one.")
    advertise_host: str | None = option(
        None, "Address that others reach this process by, where it is not the one listened on."
    )
    tls_cert: Path | None = option(None, "PEM certificate of this process; turns TLS on.")
    tls_key: Path | None = option(None, "PEM key of the certificate.")
    tls_ca: Path | None = option(
        None, "PEM authority that both sides' certificates must come from; turns mTLS on."
    )
    log_level: str = option("info", "debug, info, warning or error.")
    ready_fd: int | None = option(
        None, "Descriptor to write one JSON line to once the ports are bound (for supervisors)."
    )

    def __post_init__(self) -> None:
        for name in ("port", "preferred_port", "http_port"):
            _require(0 <= getattr(self, name) <= 65535, f"{name} must be 0 to 65535")
        _require(
            (self.tls_cert is None) == (self.tls_key is None),
            "tls_cert and tls_key belong together: give both or neither",
        )
        _require(
            self.tls_ca is None or self.tls_cert is not None,
            "tls_ca turns on mutual TLS, which needs tls_cert and tls_key too",
        )
        for path in (self.tls_cert, self.tls_key, self.tls_ca):
            _require(path is None or path.is_file(), f"{path} is not a file")
        _require(
            self.log_level in ("debug", "info", "warning", "error"),
            f"log_level {self.log_level!r} is none of debug, info, warning, error",
        )


@dataclass(frozen=True)
class PlacementConfig(ServerConfig):
    """The placement service."""

    port: int = option(50050, "gRPC port; 0 takes a free one.")
    model: Path = option(Path("."), "Checkpoint directory; only its config.json is read.")
    rule: PlacementRule = option(
        "per-layer", "per-layer: one expert of a layer on a worker. strict: one expert in all."
    )
    experts_per_worker: int = option(
        1, "Experts of one layer that a worker may hold; more than 1 is colocation."
    )
    min_workers: int = option(
        0, "Wait for this many workers before the first plan; 0: as many as the rules need."
    )
    settle_s: float = option(
        2.0, "After a start, how long to wait for workers of an earlier life before planning."
    )
    lease_s: float = option(5.0, "Silence after which a worker counts as dead.")
    max_replicas: int = option(
        0, "Workers that may hold one expert; 0: as many as there are seats, 1: no replicas."
    )
    expert_shards: int = option(
        0, "Slices that each expert is cut into; 0: none, unless no worker holds one whole."
    )
    rebalance_below: float = option(
        0.8, "Rebalance once mean/max of the workers' load is below this; 0: only when asked."
    )
    rebalance_after_s: float = option(
        30.0, "How long balance must have been bad, and the pause between two rebalances."
    )
    rebalance_moves: int = option(16, "Experts that one rebalance may load, unless asked for.")
    rebalance_price: float = option(
        0.05, "What a move must gain, in units of an average expert's rows."
    )
    topology: Path | None = option(
        None, "TOML file of the links between hosts; if absent, what hosts say of themselves."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.experts_per_worker >= 1, "experts_per_worker must be 1 or more")
        for name in ("max_replicas", "expert_shards", "rebalance_price"):
            _require(0 <= getattr(self, name) < math.inf, f"{name} must not be negative")
        _require(0 <= self.rebalance_below <= 1, "rebalance_below must be 0 to 1")
        _require(1 <= self.rebalance_after_s < math.inf, "rebalance_after_s must be 1 or more")
        _require(self.rebalance_moves >= 1, "rebalance_moves must be 1 or more")
        _require(self.min_workers >= 0, "min_workers must not be negative")
        _require(
            self.rule != "strict" or self.experts_per_worker == 1,
            "strict means one expert in all on a worker; drop experts_per_worker",
        )
        _require(0.3 <= self.lease_s < math.inf, "lease_s must be 0.3 or more")


_MAX_ROWS = 4096
_MAX_ROWS_ON_GPU = 16_000
"""With the counts ahead of them, no more than a buffer of the power of two above."""
_MESSAGE_BYTES_ON_GPU = 64 << 20
_MERGE_ROWS = 8192


@dataclass(frozen=True)
class WorkerConfig(ServerConfig):
    """An expert worker."""

    model: Path = option(Path("."), "Checkpoint directory.")
    placement: str = option("127.0.0.1:50050", "host:port of the placement service.")
    worker_id: str | None = option(
        None, "Name in plans and logs; made from host and pid if absent."
    )
    device: str = option("cpu", "cpu, cuda or cuda:N.")
    dtype: Dtype = option("auto", "auto: the checkpoint's on a GPU, float32 on a CPU.")
    memory_bytes: int = option(0, "What experts may take on the device; 0: what is free.")
    max_rows: int = option(
        0,
        "Rows of one message; larger ones are split by the gateway. 0: 4096, on a GPU 64 MiB of "
        "them, but not over 16000.",
    )
    merge_rows: int = option(
        0, "Rows that waiting messages for one expert are merged up to; 0: 8192, or max_rows."
    )
    threads: int = option(1, "CPU threads for compute.")
    drain_s: float = option(
        60.0, "How long it waits, once told to end, for others to take its experts over."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(0 <= self.drain_s < math.inf, "drain_s must not be negative")
        _require(
            0 <= self.max_rows <= wire.MAX_ROWS, f"max_rows must be 1 to {wire.MAX_ROWS}, or 0"
        )
        _require(
            self.merge_rows >= self.max_rows or not self.merge_rows,
            "merge_rows must not be below max_rows",
        )
        _require(self.threads >= 1, "threads must be 1 or more")
        _require(self.memory_bytes >= 0, "memory_bytes must not be negative")

    def for_rows(self, row_bytes: int) -> WorkerConfig:
        """The same where rows take so many bytes, with ``max_rows`` and ``merge_rows`` said."""
        # Of longer ones, receiving, computing and sending on a GPU hide less of each other.
        on_gpu = min(_MAX_ROWS_ON_GPU, _MESSAGE_BYTES_ON_GPU // row_bytes)
        max_rows = self.max_rows or (_MAX_ROWS if self.device == "cpu" else on_gpu)
        merge_rows = self.merge_rows or max(_MERGE_ROWS, max_rows)
        return replace(self, max_rows=max_rows, merge_rows=merge_rows)


@dataclass(frozen=True)
class GatewayConfig(ServerConfig):
    """A gateway: front and engine."""

    port: int = option(50051, "gRPC port; 0 takes a free one.")
    model: Path = option(Path("."), "Checkpoint directory.")
    placement: str = option("127.0.0.1:50050", "host:port of the placement service.")
    gateway_id: str | None = option(
        None, "Name in plans and logs; made from host and pid if absent."
    )
    served_model_name: str | None = option(None, "Name clients use; the directory's if absent.")
    device: str = option("cpu", "cpu, cuda or cuda:N.")
    dtype: Dtype = option("auto", "auto: the checkpoint's on a GPU, float32 on a CPU.")
    threads: int = option(1, "CPU threads for compute.")
    kv_memory_bytes: int = option(
        0, "Memory for KV blocks; 0: 256 MiB on a CPU, what is free on a GPU."
    )
    reserved_bytes: int = option(
        0, "Memory of this GPU that other processes will take; `up` says it of the workers there."
    )
    gateways_on_device: int = option(1, "Gateways that share this one's GPU; `up` says it.")
    kv_block_size: int = option(16, "Tokens of one KV block.")
    max_model_len: int = option(0, "Longest prompt + output in tokens; 0: the checkpoint's.")
    max_batch_tokens: int = option(
        0, "Tokens of one step: decode rows and prefill chunks; 0: 512, on a GPU 8192."
    )
    max_running: int = option(0, "Requests that decode at once; 0: 64, on a GPU 256.")
    max_waiting: int = option(1024, "Requests that may queue; past it, RESOURCE_EXHAUSTED.")
    overlap_tokens: int = option(
        -1,
        "Tokens from which a step's halves hide each other's transfers; 0: never halve it; "
        "-1: 256, on a GPU 4096.",
    )
    generation_config: bool = option(
        True,
        "Defaults of temperature, top_p, top_k, min_p and repetition_penalty are the checkpoint's.",
    )
    prefix_cache: bool = option(True, "Reuse KV blocks of equal prompt prefixes.")
    expert_patience_s: float = option(
        0.4, "How long a request waits for an expert that nobody serves and nobody will."
    )
    expert_loading_patience_s: float = option(
        60.0, "How long it waits while a worker loads the expert, or placement looks for one."
    )
    reply_timeout_s: float = option(
        10.0, "How long a worker may take over one dispatch; one that is hung is noticed sooner."
    )
    rehearsal_s: float = option(
        -1,
        "How long it may ask its own engine, at every size of step, before it is ready; 0: not at "
        "all; -1: 60 on a GPU, where what is new is compiled first, else 0.",
    )
    api_key_file: Path | None = option(None, "File of bearer tokens, one a line; turns them on.")

    def __post_init__(self) -> None:
        super().__post_init__()
        on_gpu = self.device != "cpu"
        for name, unset, value in (
            ("max_batch_tokens", 0, 8192 if on_gpu else 512),
            ("max_running", 0, 256 if on_gpu else 64),
            # Halves of fewer read an expert's weights twice and hide less than that takes.
            ("overlap_tokens", -1, 4096 if on_gpu else 256),
            ("rehearsal_s", -1, 60.0 if on_gpu else 0.0),
        ):
            if getattr(self, name) == unset:
                object.__setattr__(self, name, value)
        for name in (
            "kv_block_size",
            "max_batch_tokens",
            "max_running",
            "threads",
            "gateways_on_device",
        ):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more")
        for name in (
            "kv_memory_bytes",
            "reserved_bytes",
            "max_model_len",
            "max_waiting",
            "expert_patience_s",
        ):
            _require(getattr(self, name) >= 0, f"{name} must not be negative")
        _require(
            self.expert_loading_patience_s >= self.expert_patience_s,
            "expert_loading_patience_s must not be below expert_patience_s",
        )
        _require(self.overlap_tokens >= 0, "overlap_tokens must be -1 or more")
        _require(0 <= self.rehearsal_s < math.inf, "rehearsal_s must be -1, or not negative")
        _require(
            self.max_batch_tokens >= self.max_running,
            "max_batch_tokens must not be below max_running: every running request decodes",
        )
        _require(
            self.api_key_file is None or self.api_key_file.is_file(),
            f"api_key_file {self.api_key_file} is not a file",
        )
