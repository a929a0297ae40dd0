from protos import placement_pb2 as _placement_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ConnectRequest(_message.Message):
    __slots__ = ("gateway_id", "ucx_address", "reply_session", "model_fingerprint", "hidden_size", "dtype", "expert_shards")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    UCX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    REPLY_SESSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARDS_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    ucx_address: bytes
    reply_session: int
    model_fingerprint: str
    hidden_size: int
    dtype: str
    expert_shards: int
    def __init__(self, gateway_id: _Optional[str] = ..., ucx_address: _Optional[bytes] = ..., reply_session: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[str] = ..., expert_shards: _Optional[int] = ...) -> None: ...

class ConnectReply(_message.Message):
    __slots__ = ("session", "ucx_address", "max_rows")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    UCX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    session: int
    ucx_address: bytes
    max_rows: int
    def __init__(self, session: _Optional[int] = ..., ucx_address: _Optional[bytes] = ..., max_rows: _Optional[int] = ...) -> None: ...

class DisconnectRequest(_message.Message):
    __slots__ = ("gateway_id", "session")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    session: int
    def __init__(self, gateway_id: _Optional[str] = ..., session: _Optional[int] = ...) -> None: ...

class DisconnectReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class LoadExpertsRequest(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertId]
    def __init__(self, experts: _Optional[_Iterable[_Union[_placement_pb2.ExpertId, _Mapping]]] = ...) -> None: ...

class LoadExpertsReply(_message.Message):
    __slots__ = ("resident",)
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    resident: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertId]
    def __init__(self, resident: _Optional[_Iterable[_Union[_placement_pb2.ExpertId, _Mapping]]] = ...) -> None: ...

class UnloadExpertsRequest(_message.Message):
    __slots__ = ("experts",)
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    experts: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertId]
    def __init__(self, experts: _Optional[_Iterable[_Union[_placement_pb2.ExpertId, _Mapping]]] = ...) -> None: ...

class UnloadExpertsReply(_message.Message):
    __slots__ = ("resident",)
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    resident: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertId]
    def __init__(self, resident: _Optional[_Iterable[_Union[_placement_pb2.ExpertId, _Mapping]]] = ...) -> None: ...

class SendExpertRequest(_message.Message):
    __slots__ = ("worker_id", "ucx_address", "session", "expert", "expert_shards", "model_fingerprint", "dtype")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    UCX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARDS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    ucx_address: bytes
    session: int
    expert: _placement_pb2.ExpertId
    expert_shards: int
    model_fingerprint: str
    dtype: str
    def __init__(self, worker_id: _Optional[str] = ..., ucx_address: _Optional[bytes] = ..., session: _Optional[int] = ..., expert: _Optional[_Union[_placement_pb2.ExpertId, _Mapping]] = ..., expert_shards: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., dtype: _Optional[str] = ...) -> None: ...

class ExpertOffer(_message.Message):
    __slots__ = ("session", "ucx_address", "chunk_bytes", "tensors")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    UCX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    CHUNK_BYTES_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    session: int
    ucx_address: bytes
    chunk_bytes: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorFacts]
    def __init__(self, session: _Optional[int] = ..., ucx_address: _Optional[bytes] = ..., chunk_bytes: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorFacts, _Mapping]]] = ...) -> None: ...

class TensorFacts(_message.Message):
    __slots__ = ("name", "shape")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ...) -> None: ...

class WorkerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerInfoReply(_message.Message):
    __slots__ = ("worker", "resident", "load", "sessions", "refused", "memory_used_bytes")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    WORKER_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    MEMORY_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    worker: _placement_pb2.WorkerInfo
    resident: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertId]
    load: _containers.RepeatedCompositeFieldContainer[_placement_pb2.ExpertLoad]
    sessions: int
    refused: _containers.ScalarMap[str, int]
    memory_used_bytes: int
    def __init__(self, worker: _Optional[_Union[_placement_pb2.WorkerInfo, _Mapping]] = ..., resident: _Optional[_Iterable[_Union[_placement_pb2.ExpertId, _Mapping]]] = ..., load: _Optional[_Iterable[_Union[_placement_pb2.ExpertLoad, _Mapping]]] = ..., sessions: _Optional[int] = ..., refused: _Optional[_Mapping[str, int]] = ..., memory_used_bytes: _Optional[int] = ...) -> None: ...

class WorkerDrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerDrainReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
