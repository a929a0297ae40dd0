from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ExpertId(_message.Message):
    __slots__ = ("layer", "index")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    layer: int
    index: int
    def __init__(self, layer: _Optional[int] = ..., index: _Optional[int] = ...) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "grpc_address", "http_address", "host", "device", "device_name", "memory_bytes", "pid", "ucx_address", "model_fingerprint", "nics", "expert_bytes", "gpu", "links")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    UCX_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    NICS_FIELD_NUMBER: _ClassVar[int]
    EXPERT_BYTES_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    LINKS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    grpc_address: str
    http_address: str
    host: str
    device: str
    device_name: str
    memory_bytes: int
    pid: int
    ucx_address: bytes
    model_fingerprint: str
    nics: _containers.RepeatedScalarFieldContainer[str]
    expert_bytes: int
    gpu: GpuFacts
    links: _containers.RepeatedCompositeFieldContainer[NicFacts]
    def __init__(self, worker_id: _Optional[str] = ..., grpc_address: _Optional[str] = ..., http_address: _Optional[str] = ..., host: _Optional[str] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., pid: _Optional[int] = ..., ucx_address: _Optional[bytes] = ..., model_fingerprint: _Optional[str] = ..., nics: _Optional[_Iterable[str]] = ..., expert_bytes: _Optional[int] = ..., gpu: _Optional[_Union[GpuFacts, _Mapping]] = ..., links: _Optional[_Iterable[_Union[NicFacts, _Mapping]]] = ...) -> None: ...

class GpuFacts(_message.Message):
    __slots__ = ("uuid", "pci_bus_id", "nvlink", "nvlink_peers")
    UUID_FIELD_NUMBER: _ClassVar[int]
    PCI_BUS_ID_FIELD_NUMBER: _ClassVar[int]
    NVLINK_FIELD_NUMBER: _ClassVar[int]
    NVLINK_PEERS_FIELD_NUMBER: _ClassVar[int]
    uuid: str
    pci_bus_id: str
    nvlink: str
    nvlink_peers: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, uuid: _Optional[str] = ..., pci_bus_id: _Optional[str] = ..., nvlink: _Optional[str] = ..., nvlink_peers: _Optional[_Iterable[str]] = ...) -> None: ...

class NicFacts(_message.Message):
    __slots__ = ("name", "gbit_per_s", "rdma")
    NAME_FIELD_NUMBER: _ClassVar[int]
    GBIT_PER_S_FIELD_NUMBER: _ClassVar[int]
    RDMA_FIELD_NUMBER: _ClassVar[int]
    name: str
    gbit_per_s: float
    rdma: bool
    def __init__(self, name: _Optional[str] = ..., gbit_per_s: _Optional[float] = ..., rdma: _Optional[bool] = ...) -> None: ...

class RegisterRequest(_message.Message):
    __slots__ = ("worker", "resident", "last_epoch", "expert_shards")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    LAST_EPOCH_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARDS_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerInfo
    resident: _containers.RepeatedCompositeFieldContainer[ExpertId]
    last_epoch: int
    expert_shards: int
    def __init__(self, worker: _Optional[_Union[WorkerInfo, _Mapping]] = ..., resident: _Optional[_Iterable[_Union[ExpertId, _Mapping]]] = ..., last_epoch: _Optional[int] = ..., expert_shards: _Optional[int] = ...) -> None: ...

class RegisterReply(_message.Message):
    __slots__ = ("lease_id", "lease_s", "heartbeat_interval_s", "epoch")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_INTERVAL_S_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    lease_s: float
    heartbeat_interval_s: float
    epoch: int
    def __init__(self, lease_id: _Optional[str] = ..., lease_s: _Optional[float] = ..., heartbeat_interval_s: _Optional[float] = ..., epoch: _Optional[int] = ...) -> None: ...

class ExpertLoad(_message.Message):
    __slots__ = ("expert", "rows", "compute_s")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_S_FIELD_NUMBER: _ClassVar[int]
    expert: ExpertId
    rows: int
    compute_s: float
    def __init__(self, expert: _Optional[_Union[ExpertId, _Mapping]] = ..., rows: _Optional[int] = ..., compute_s: _Optional[float] = ...) -> None: ...

class WorkerReport(_message.Message):
    __slots__ = ("lease_id", "resident", "load", "queue_rows", "error", "draining")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    QUEUE_ROWS_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    resident: _containers.RepeatedCompositeFieldContainer[ExpertId]
    load: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    queue_rows: int
    error: str
    draining: bool
    def __init__(self, lease_id: _Optional[str] = ..., resident: _Optional[_Iterable[_Union[ExpertId, _Mapping]]] = ..., load: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., queue_rows: _Optional[int] = ..., error: _Optional[str] = ..., draining: _Optional[bool] = ...) -> None: ...

class WorkerOrder(_message.Message):
    __slots__ = ("load", "unload", "epoch", "leave", "expert_shards", "sources")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    UNLOAD_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LEAVE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARDS_FIELD_NUMBER: _ClassVar[int]
    SOURCES_FIELD_NUMBER: _ClassVar[int]
    load: _containers.RepeatedCompositeFieldContainer[ExpertId]
    unload: _containers.RepeatedCompositeFieldContainer[ExpertId]
    epoch: int
    leave: bool
    expert_shards: int
    sources: _containers.RepeatedCompositeFieldContainer[ExpertSource]
    def __init__(self, load: _Optional[_Iterable[_Union[ExpertId, _Mapping]]] = ..., unload: _Optional[_Iterable[_Union[ExpertId, _Mapping]]] = ..., epoch: _Optional[int] = ..., leave: _Optional[bool] = ..., expert_shards: _Optional[int] = ..., sources: _Optional[_Iterable[_Union[ExpertSource, _Mapping]]] = ...) -> None: ...

class ExpertSource(_message.Message):
    __slots__ = ("expert", "grpc_address")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    expert: ExpertId
    grpc_address: str
    def __init__(self, expert: _Optional[_Union[ExpertId, _Mapping]] = ..., grpc_address: _Optional[str] = ...) -> None: ...

class WatchPlanRequest(_message.Message):
    __slots__ = ("gateway_id",)
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    def __init__(self, gateway_id: _Optional[str] = ...) -> None: ...

class GetPlanRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ExpertPlacement(_message.Message):
    __slots__ = ("expert", "worker_ids")
    EXPERT_FIELD_NUMBER: _ClassVar[int]
    WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    expert: ExpertId
    worker_ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, expert: _Optional[_Union[ExpertId, _Mapping]] = ..., worker_ids: _Optional[_Iterable[str]] = ...) -> None: ...

class Plan(_message.Message):
    __slots__ = ("epoch", "model_fingerprint", "workers", "experts", "experts_per_worker", "note", "complete", "expert_shards", "pending", "strict")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_FIELD_NUMBER: _ClassVar[int]
    EXPERTS_PER_WORKER_FIELD_NUMBER: _ClassVar[int]
    NOTE_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    EXPERT_SHARDS_FIELD_NUMBER: _ClassVar[int]
    PENDING_FIELD_NUMBER: _ClassVar[int]
    STRICT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    model_fingerprint: str
    workers: _containers.RepeatedCompositeFieldContainer[WorkerInfo]
    experts: _containers.RepeatedCompositeFieldContainer[ExpertPlacement]
    experts_per_worker: int
    note: str
    complete: bool
    expert_shards: int
    pending: _containers.RepeatedCompositeFieldContainer[ExpertId]
    strict: bool
    def __init__(self, epoch: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., workers: _Optional[_Iterable[_Union[WorkerInfo, _Mapping]]] = ..., experts: _Optional[_Iterable[_Union[ExpertPlacement, _Mapping]]] = ..., experts_per_worker: _Optional[int] = ..., note: _Optional[str] = ..., complete: _Optional[bool] = ..., expert_shards: _Optional[int] = ..., pending: _Optional[_Iterable[_Union[ExpertId, _Mapping]]] = ..., strict: _Optional[bool] = ...) -> None: ...

class GatewayReport(_message.Message):
    __slots__ = ("gateway_id", "grpc_address", "http_address", "host", "device", "pid", "epoch", "load", "running", "waiting", "kv_usage", "unreachable_worker_ids", "faults")
    GATEWAY_ID_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    KV_USAGE_FIELD_NUMBER: _ClassVar[int]
    UNREACHABLE_WORKER_IDS_FIELD_NUMBER: _ClassVar[int]
    FAULTS_FIELD_NUMBER: _ClassVar[int]
    gateway_id: str
    grpc_address: str
    http_address: str
    host: str
    device: str
    pid: int
    epoch: int
    load: _containers.RepeatedCompositeFieldContainer[ExpertLoad]
    running: int
    waiting: int
    kv_usage: float
    unreachable_worker_ids: _containers.RepeatedScalarFieldContainer[str]
    faults: _containers.RepeatedCompositeFieldContainer[ExpertPlacement]
    def __init__(self, gateway_id: _Optional[str] = ..., grpc_address: _Optional[str] = ..., http_address: _Optional[str] = ..., host: _Optional[str] = ..., device: _Optional[str] = ..., pid: _Optional[int] = ..., epoch: _Optional[int] = ..., load: _Optional[_Iterable[_Union[ExpertLoad, _Mapping]]] = ..., running: _Optional[int] = ..., waiting: _Optional[int] = ..., kv_usage: _Optional[float] = ..., unreachable_worker_ids: _Optional[_Iterable[str]] = ..., faults: _Optional[_Iterable[_Union[ExpertPlacement, _Mapping]]] = ...) -> None: ...

class ReportLoadReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ("worker_id",)
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    def __init__(self, worker_id: _Optional[str] = ...) -> None: ...

class DrainReply(_message.Message):
    __slots__ = ("epoch",)
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    def __init__(self, epoch: _Optional[int] = ...) -> None: ...

class RebalanceRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RebalanceReply(_message.Message):
    __slots__ = ("epoch", "moves")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    moves: int
    def __init__(self, epoch: _Optional[int] = ..., moves: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("worker", "state", "resident", "rows_per_s", "queue_rows", "age_s", "error", "faulty")
    WORKER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_FIELD_NUMBER: _ClassVar[int]
    ROWS_PER_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_ROWS_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    FAULTY_FIELD_NUMBER: _ClassVar[int]
    worker: WorkerInfo
    state: str
    resident: _containers.RepeatedCompositeFieldContainer[ExpertId]
    rows_per_s: float
    queue_rows: int
    age_s: float
    error: str
    faulty: _containers.RepeatedCompositeFieldContainer[ExpertId]
    def __init__(self, worker: _Optional[_Union[WorkerInfo, _Mapping]] = ..., state: _Optional[str] = ..., resident: _Optional[_Iterable[_Union[ExpertId, _Mapping]]] = ..., rows_per_s: _Optional[float] = ..., queue_rows: _Optional[int] = ..., age_s: _Optional[float] = ..., error: _Optional[str] = ..., faulty: _Optional[_Iterable[_Union[ExpertId, _Mapping]]] = ...) -> None: ...

class GatewayStatus(_message.Message):
    __slots__ = ("gateway", "age_s")
    GATEWAY_FIELD_NUMBER: _ClassVar[int]
    AGE_S_FIELD_NUMBER: _ClassVar[int]
    gateway: GatewayReport
    age_s: float
    def __init__(self, gateway: _Optional[_Union[GatewayReport, _Mapping]] = ..., age_s: _Optional[float] = ...) -> None: ...

class MeshStatus(_message.Message):
    __slots__ = ("plan", "workers", "gateways", "balancedness", "events", "balancedness_before", "rebalanced_at_unix_s", "moves", "replicas")
    PLAN_FIELD_NUMBER: _ClassVar[int]
    WORKERS_FIELD_NUMBER: _ClassVar[int]
    GATEWAYS_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_FIELD_NUMBER: _ClassVar[int]
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    BALANCEDNESS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    REBALANCED_AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    REPLICAS_FIELD_NUMBER: _ClassVar[int]
    plan: Plan
    workers: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    gateways: _containers.RepeatedCompositeFieldContainer[GatewayStatus]
    balancedness: float
    events: _containers.RepeatedCompositeFieldContainer[MeshEvent]
    balancedness_before: float
    rebalanced_at_unix_s: float
    moves: int
    replicas: int
    def __init__(self, plan: _Optional[_Union[Plan, _Mapping]] = ..., workers: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., gateways: _Optional[_Iterable[_Union[GatewayStatus, _Mapping]]] = ..., balancedness: _Optional[float] = ..., events: _Optional[_Iterable[_Union[MeshEvent, _Mapping]]] = ..., balancedness_before: _Optional[float] = ..., rebalanced_at_unix_s: _Optional[float] = ..., moves: _Optional[int] = ..., replicas: _Optional[int] = ...) -> None: ...

class MeshEvent(_message.Message):
    __slots__ = ("at_unix_s", "kind", "text")
    AT_UNIX_S_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    at_unix_s: float
    kind: str
    text: str
    def __init__(self, at_unix_s: _Optional[float] = ..., kind: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...
