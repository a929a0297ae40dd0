from protos import inference_pb2 as _inference_pb2
from protos import placement_pb2 as _placement_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Submit(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "deadline_s", "arrival_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    ARRIVAL_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _inference_pb2.SamplingParams
    deadline_s: float
    arrival_s: float
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., deadline_s: _Optional[float] = ..., arrival_s: _Optional[float] = ...) -> None: ...

class CancelRequests(_message.Message):
    __slots__ = ("request_ids",)
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    request_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, request_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Peer(_message.Message):
    __slots__ = ("worker_id", "ucx_address", "session", "reply_session", "max_rows")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    UCX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    REPLY_SESSION_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    ucx_address: bytes
    session: int
    reply_session: int
    max_rows: int
    def __init__(self, worker_id: _Optional[str] = ..., ucx_address: _Optional[bytes] = ..., session: _Optional[int] = ..., reply_session: _Optional[int] = ..., max_rows: _Optional[int] = ...) -> None: ...

class Routing(_message.Message):
    __slots__ = ("epoch", "peers", "experts", "expert_shards", "pending", "transport_number")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARDS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_NUMBER_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    peers: _containers.RepeatedCompositeFieldContainer[Peer]
    experts: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertPlacement]
    expert_shards: int
    pending: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertId]
    transport_number: int
    def __init__(self, epoch: _Optional[int] = ..., peers: _Optional[_Iterable[_Union[Peer, _Mapping]]] = ..., experts: _Optional[_Iterable[_Union[_placement_pb2.ExpertPlacement, _Mapping]]] = ..., expert_shards: _Optional[int] = ..., pending: _Optional[_Iterable[_Union[_placement_pb2.ExpertId, _Mapping]]] = ..., transport_number: _Optional[int] = ...) -> None: ...

class DropPeer(_message.Message):
    __slots__ = ("worker_id", "reply_session", "reason")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_SESSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    reply_session: int
    reason: str
    def __init__(self, worker_id: _Optional[str] = ..., reply_session: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class Shutdown(_message.Message):
    __slots__ = ("drain",)
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    drain: bool
    def __init__(self, drain: _Optional[bool] = ...) -> None: ...

class Ping(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class ToEngine(_message.Message):
    __slots__ = ("submit", "cancel", "routing", "shutdown", "ping", "drop_peer")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    ROUTING_FIELD_NUMBER: _ClassVar[int]
    SHUTDOWN_FIELD_NUMBER: _ClassVar[int]
    PING_FIELD_NUMBER: _ClassVar[int]
    DROP_PEER_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    cancel: CancelRequests
    routing: Routing
    shutdown: Shutdown
    ping: Ping
    drop_peer: DropPeer
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[CancelRequests, _Mapping]] = ..., routing: _Optional[_Union[Routing, _Mapping]] = ..., shutdown: _Optional[_Union[Shutdown, _Mapping]] = ..., ping: _Optional[_Union[Ping, _Mapping]] = ..., drop_peer: _Optional[_Union[DropPeer, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("ucx_address", "kv_blocks", "kv_block_size", "max_model_len", "dtype")
    UCX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    ucx_address: bytes
    kv_blocks: int
    kv_block_size: int
    max_model_len: int
    dtype: str
    def __init__(self, ucx_address: _Optional[bytes] = ..., kv_blocks: _Optional[int] = ..., kv_block_size: _Optional[int] = ..., max_model_len: _Optional[int] = ..., dtype: _Optional[str] = ...) -> None: ...

class Output(_message.Message):
    __slots__ = ("request_id", "token_ids", "logprobs", "finish_reason", "stop_reason", "error_code", "error_message", "cached_tokens", "scheduled_s")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_REASON_FIELD_NUMBER: _ClassVar[int]
    ERROR_CODE_FIELD_NUMBER: _ClassVar[int]
    ERROR_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SCHEDULED_S_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[_inference_pb2.PositionLogprobs]
    finish_reason: str
    stop_reason: str
    error_code: str
    error_message: str
    cached_tokens: int
    scheduled_s: float
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[_inference_pb2.PositionLogprobs, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stop_reason: _Optional[str] = ..., error_code: _Optional[str] = ..., error_message: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., scheduled_s: _Optional[float] = ...) -> None: ...

class Outputs(_message.Message):
    __slots__ = ("outputs",)
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[Output]
    def __init__(self, outputs: _Optional[_Iterable[_Union[Output, _Mapping]]] = ...) -> None: ...

class EngineStats(_message.Message):
    __slots__ = ("running", "waiting", "kv_usage", "steps", "prompt_tokens", "generation_tokens", "preemptions", "prefix_queries", "prefix_hits", "load", "step_s", "expert_wait_s", "pong", "epoch", "refused", "replayed_rows", "failovers", "pause_s", "paces", "stalled_s", "transport_number", "host_s")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GENERATION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERIES_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HITS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    EXPERT_WAIT_S_FIELD_NUMBER: _ClassVar[int]
    PONG_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    REPLAYED_ROWS_FIELD_NUMBER: _ClassVar[int]
    FAILOVERS_FIELD_NUMBER: _ClassVar[int]
    PAUSE_S_FIELD_NUMBER: _ClassVar[int]
    PACES_FIELD_NUMBER: _ClassVar[int]
    STALLED_S_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_NUMBER_FIELD_NUMBER: _ClassVar[int]
    HOST_S_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    kv_usage: float
    steps: int
    prompt_tokens: int
    generation_tokens: int
    preemptions: int
    prefix_queries: int
    prefix_hits: int
    load: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertLoad]
    step_s: float
    expert_wait_s: float
    pong: int
    epoch: int
    refused: int
    replayed_rows: int
    failovers: int
    pause_s: float
    paces: _containers.RepeatedCompositeFieldContainer[_inference_pb2.WorkerPace]
    stalled_s: float
    transport_number: int
    host_s: float
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_usage: _Optional[float] = ..., steps: _Optional[int] = ..., prompt_tokens: _Optional[int] = ..., generation_tokens: _Optional[int] = ..., preemptions: _Optional[int] = ..., prefix_queries: _Optional[int] = ..., prefix_hits: _Optional[int] = ..., load: _Optional[_Iterable[_Union[_placement_pb2.ExpertLoad, _Mapping]]] = ..., step_s: _Optional[float] = ..., expert_wait_s: _Optional[float] = ..., pong: _Optional[int] = ..., epoch: _Optional[int] = ..., refused: _Optional[int] = ..., replayed_rows: _Optional[int] = ..., failovers: _Optional[int] = ..., pause_s: _Optional[float] = ..., paces: _Optional[_Iterable[_Union[_inference_pb2.WorkerPace, _Mapping]]] = ..., stalled_s: _Optional[float] = ..., transport_number: _Optional[int] = ..., host_s: _Optional[float] = ...) -> None: ...

class PeerLost(_message.Message):
    __slots__ = ("worker_id", "reason", "reply_session")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    REPLY_SESSION_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    reason: str
    reply_session: int
    def __init__(self, worker_id: _Optional[str] = ..., reason: _Optional[str] = ..., reply_session: _Optional[int] = ...) -> None: ...

class PeerLate(_message.Message):
    __slots__ = ("worker_id", "reply_session", "reason")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    REPLY_SESSION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    reply_session: int
    reason: str
    def __init__(self, worker_id: _Optional[str] = ..., reply_session: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ExpertFault(_message.Message):
    __slots__ = ("worker_id", "expert", "reason")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    expert: _placement_pb2.ExpertId
    reason: str
    def __init__(self, worker_id: _Optional[str] = ..., expert: _Optional[_Union[_placement_pb2.ExpertId, _Mapping]] = ..., reason: _Optional[str] = ...) -> None: ...

class TransportReopened(_message.Message):
    __slots__ = ("ucx_address", "transport_number")
    UCX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_NUMBER_FIELD_NUMBER: _ClassVar[int]
    ucx_address: bytes
    transport_number: int
    def __init__(self, ucx_address: _Optional[bytes] = ..., transport_number: _Optional[int] = ...) -> None: ...

class FromEngine(_message.Message):
    __slots__ = ("started", "outputs", "stats", "peer_lost", "peer_late", "expert_fault", "transport_reopened")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    PEER_LOST_FIELD_NUMBER: _ClassVar[int]
    PEER_LATE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FAULT_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_REOPENED_FIELD_NUMBER: _ClassVar[int]
    started: Started
    outputs: Outputs
    stats: EngineStats
    peer_lost: PeerLost
    peer_late: PeerLate
    expert_fault: ExpertFault
    transport_reopened: TransportReopened
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., outputs: _Optional[_Union[Outputs, _Mapping]] = ..., stats: _Optional[_Union[EngineStats, _Mapping]] = ..., peer_lost: _Optional[_Union[PeerLost, _Mapping]] = ..., peer_late: _Optional[_Union[PeerLate, _Mapping]] = ..., expert_fault: _Optional[_Union[ExpertFault, _Mapping]] = ..., transport_reopened: _Optional[_Union[TransportReopened, _Mapping]] = ...) -> None: ...
