/* Captured graphs on a GPU: launched, asked about, timed; and memory that another process lends. The
 * driver is found at run time, so that this library builds and loads where there is none.
 */
#include "native.h"

#include "copy_rows.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

enum { NOT_READY = 600 };                   /* of CUresult, whose 0 is success */
enum { LAZY_ENABLE_PEER_ACCESS = 1 };       /* of CUipcMem_flags */
enum { NON_BLOCKING = 1 };                  /* of CUstream_flags */
enum { DISABLE_TIMING = 2 };                /* of CUevent_flags */
enum { IS_CAPTURING = 1 };                  /* of CUstreamCaptureStatus */
enum { THREADS = 256, MAX_BLOCKS = 1024 };  /* of a copy: as many as run at once */

_Static_assert((int)MAX_PARTS <= (int)MAX_COPIES, "a batch has more parts than a launch copies");
_Static_assert(sizeof(row_copy[MAX_COPIES]) == 2048, "as the kernel has it");

typedef struct {
    char bytes[sizeof((lent *)NULL)->handle];
} ipc_handle;

typedef struct { /* CUDA_KERNEL_NODE_PARAMS */
    void *function;
    uint32_t x, y, z, threads_x, threads_y, threads_z, shared_bytes;
    void **arguments, **extra;
    void *kernel, *context;
} node_parameters;

typedef struct {
    void *fetching, *fetched, *began, *computed, *timed; /* events, in this order */
    void *ended; /* ahead of the last, and without a time: that would be seen 2 us later */
    uint64_t rows;       /* 0: not lent, or lost */
    const int32_t *counts;
    uint64_t deliveries; /* one for each part that graphs of several experts compute */
    int32_t taken, beside;
} slot;

struct device {
    void *stream;
    void *in, *out;           /* streams of what comes and goes beside it */
    void *arrived;            /* an event of the first, of what is fetched alone */
    slot slots[SLOTS];
    int32_t leaving;            /* a slot whose rows nothing takes away yet; -1: none */
    row_copy taken[MAX_COPIES]; /* what will */
    int32_t num_taken;
    void *graph_ended; /* event */
    int32_t (*create)(void **event, uint32_t flags);
    int32_t (*destroy)(void *event);
    int32_t (*record)(void *event, void *stream);
    int32_t (*query)(void *event);
    int32_t (*elapsed)(float *milliseconds, void *began, void *ended);
    int32_t (*launch)(void *graph, void *stream);
    int32_t (*synchronize)(void *stream);
    int32_t (*priorities)(int32_t *least, int32_t *greatest);
    int32_t (*open_stream)(void **stream, uint32_t flags, int32_t priority);
    int32_t (*close_stream)(void *stream);
    int32_t (*follow)(void *stream, void *event, uint32_t flags);
    int32_t (*move)(uint64_t to, uint64_t from, size_t bytes, void *stream);
    int32_t (*range)(uint64_t *base, size_t *bytes, uint64_t address);
    int32_t (*handle)(ipc_handle *of, uint64_t address);
    int32_t (*open)(uint64_t *base, ipc_handle of, uint32_t flags);
    int32_t (*close)(uint64_t base);
    int32_t (*load)(void **module, const void *image);
    int32_t (*function)(void **found, void *module, const char *name);
    int32_t (*run)(void *function, uint32_t x, uint32_t y, uint32_t z, uint32_t threads_x,
                   uint32_t threads_y, uint32_t threads_z, uint32_t shared_bytes, void *stream,
                   void **arguments, void **extra);
    int32_t (*capture)(void *stream, int32_t *status, uint64_t *number, void **graph,
                       void *const **last, size_t *count);
    int32_t (*set)(void *graph, void *node, const node_parameters *parameters);
    void *copy; /* copy_rows; NULL: the driver refuses it */
};

static int find(device *gpu, void *library) {
    *(void **)&gpu->create = dlsym(library, "cuEventCreate");
    *(void **)&gpu->destroy = dlsym(library, "cuEventDestroy_v2");
    *(void **)&gpu->record = dlsym(library, "cuEventRecord");
    *(void **)&gpu->query = dlsym(library, "cuEventQuery");
    *(void **)&gpu->elapsed = dlsym(library, "cuEventElapsedTime");
    *(void **)&gpu->launch = dlsym(library, "cuGraphLaunch");
    *(void **)&gpu->synchronize = dlsym(library, "cuStreamSynchronize");
    *(void **)&gpu->open_stream = dlsym(library, "cuStreamCreateWithPriority");
    *(void **)&gpu->priorities = dlsym(library, "cuCtxGetStreamPriorityRange");
    *(void **)&gpu->close_stream = dlsym(library, "cuStreamDestroy_v2");
    *(void **)&gpu->follow = dlsym(library, "cuStreamWaitEvent");
    *(void **)&gpu->move = dlsym(library, "cuMemcpyAsync");
    *(void **)&gpu->range = dlsym(library, "cuMemGetAddressRange_v2");
    *(void **)&gpu->handle = dlsym(library, "cuIpcGetMemHandle");
    *(void **)&gpu->open = dlsym(library, "cuIpcOpenMemHandle_v2");
    *(void **)&gpu->close = dlsym(library, "cuIpcCloseMemHandle");
    *(void **)&gpu->load = dlsym(library, "cuModuleLoadData");
    *(void **)&gpu->function = dlsym(library, "cuModuleGetFunction");
    *(void **)&gpu->run = dlsym(library, "cuLaunchKernel");
    *(void **)&gpu->capture = dlsym(library, "cuStreamGetCaptureInfo_v2");
    *(void **)&gpu->set = dlsym(library, "cuGraphExecKernelNodeSetParams_v2");
    return gpu->create && gpu->destroy && gpu->record && gpu->query && gpu->elapsed &&
           gpu->launch && gpu->synchronize && gpu->priorities && gpu->open_stream && gpu->close_stream &&
           gpu->follow && gpu->move && gpu->range && gpu->handle && gpu->open && gpu->close && gpu->load &&
           gpu->function && gpu->run && gpu->capture && gpu->set;
}

static void load_copy(device *gpu) {
    const char *images[] = {COPY_ROWS_ON_HOPPER, COPY_ROWS};
    for (int32_t i = 0; i < 2 && !gpu->copy; i++) {
        void *module;
        if (gpu->load(&module, images[i]) || gpu->function(&gpu->copy, module, "copy_rows"))
            gpu->copy = NULL;
    }
}

device *device_new(const char *path, uint64_t stream) {
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    device *gpu = library ? calloc(1, sizeof *gpu) : NULL;
    if (!gpu) return NULL;
    if (!find(gpu, library)) {
        free(gpu);
        return NULL;
    }
    gpu->stream = (void *)stream;
    gpu->leaving = -1;
    load_copy(gpu);
    /* Ahead of what is computed: else a copy waits until a matrix product has ended. */
    int32_t least, first;
    if (gpu->priorities(&least, &first) || gpu->open_stream(&gpu->in, NON_BLOCKING, first) ||
        gpu->open_stream(&gpu->out, NON_BLOCKING, first) ||
        gpu->create(&gpu->arrived, DISABLE_TIMING)) {
        device_free(gpu);
        return NULL;
    }
    for (slot *one = gpu->slots; one < gpu->slots + SLOTS; one++)
        if (gpu->create(&one->fetching, 0) || gpu->create(&one->fetched, 0) ||
            gpu->create(&one->began, 0) || gpu->create(&one->computed, 0) ||
            gpu->create(&one->timed, 0) || gpu->create(&one->ended, DISABLE_TIMING)) {
            device_free(gpu);
            return NULL;
        }
    if (gpu->create(&gpu->graph_ended, DISABLE_TIMING)) {
        device_free(gpu);
        return NULL;
    }
    return gpu;
}

void device_free(device *gpu) {
    if (gpu->in) gpu->close_stream(gpu->in);
    if (gpu->out) gpu->close_stream(gpu->out);
    if (gpu->arrived) gpu->destroy(gpu->arrived);
    for (slot *one = gpu->slots; one < gpu->slots + SLOTS; one++) {
        void *events[] = {one->fetching, one->fetched, one->began,
                          one->computed, one->timed,   one->ended};
        for (int32_t i = 0; i < 6; i++)
            if (events[i]) gpu->destroy(events[i]);
    }
    if (gpu->graph_ended) gpu->destroy(gpu->graph_ended);
    free(gpu);
}

uint64_t device_out(const device *gpu) { return (uint64_t)gpu->out; }

void device_lend(device *gpu, int32_t index, uint64_t rows, uint64_t counts, uint64_t deliveries) {
    gpu->slots[index].rows = rows;
    gpu->slots[index].counts = (const int32_t *)counts;
    gpu->slots[index].deliveries = deliveries;
}

uint64_t device_rows(const device *gpu, int32_t index) { return gpu->slots[index].rows; }

const int32_t *device_counts(const device *gpu, int32_t index) { return gpu->slots[index].counts; }

int32_t device_graph(const captured *const *graphs, int32_t index, int64_t rows) {
    int32_t size = index / RING, step = STEPS - 1;
    if (size >= STEPPED) {
        int64_t half = 1LL << (size - 1);
        step = rows > half ? (int32_t)((rows - half - 1) * STEPS / half) : 0;
    }
    for (int32_t graph = index * STEPS + step; graph < (index + 1) * STEPS; graph++)
        if (graphs[graph]) return graph;
    return -1;
}

/* A slot of the smallest buffers that hold the rows, with a graph for them; -1: none. */
static int32_t find_slot(const device *gpu, const captured *const *graphs, int64_t rows, int taken_too,
                         int32_t *graph) {
    int32_t size = 0;
    while (size < SIZES && 1LL << size < rows) size++;
    for (int32_t i = size * RING; size < SIZES && i < (size + 1) * RING; i++)
        if (gpu->slots[i].rows && (taken_too || !gpu->slots[i].taken) &&
            (*graph = device_graph(graphs, i, rows)) >= 0)
            return i;
    return -1;
}

int32_t device_knows(const device *gpu, const captured *const *graphs, int64_t rows) {
    int32_t graph;
    return find_slot(gpu, graphs, rows, 1, &graph) >= 0;
}

int32_t device_take(device *gpu, const captured *const *graphs, int64_t rows, int32_t *graph) {
    int32_t index = find_slot(gpu, graphs, rows, 0, graph);
    if (index >= 0) gpu->slots[index].taken = 1;
    return index;
}

void device_give_back(device *gpu, int32_t index) { gpu->slots[index].taken = 0; }

void device_lose(device *gpu, int32_t index) {
    gpu->slots[index].rows = 0;
    if (gpu->leaving == index) gpu->leaving = -1;
}

/* For each of so many copies. By powers of two: a graph's launch takes 2 us more with another number of
 * blocks than the time before. */
static uint32_t blocks_of(const row_copy *copies, int32_t count) {
    uint64_t units = 0, blocks = 1;
    for (int32_t i = 0; i < count; i++) units = copies[i].units > units ? copies[i].units : units;
    while (blocks * THREADS < units && blocks < MAX_BLOCKS) blocks *= 2;
    return (uint32_t)blocks;
}

static int copy(device *gpu, void *stream, const row_copy *copies, int32_t count) {
    void *arguments[] = {(void *)copies};
    return gpu->copy && !gpu->run(gpu->copy, blocks_of(copies, count), (uint32_t)count, 1, THREADS, 1,
                                  1, 0, stream, arguments, NULL);
}

static const row_copy NOTHING[MAX_COPIES];

void *device_capture(device *gpu) {
    void *const *last;
    int32_t status;
    size_t count;
    if (!copy(gpu, gpu->stream, NOTHING, 1) ||
        gpu->capture(gpu->stream, &status, NULL, NULL, &last, &count) || status != IS_CAPTURING ||
        count != 1)
        return NULL;
    return last[0];
}

/* What one of a graph's own launches moves from here on. */
static int set(device *gpu, void *graph, void *node, const row_copy *copies, int32_t count) {
    void *arguments[] = {(void *)(count ? copies : NOTHING)};
    node_parameters all = {.function = gpu->copy, .x = blocks_of(copies, count),
                           .y = count ? (uint32_t)count : 1, .z = 1, .threads_x = THREADS,
                           .threads_y = 1, .threads_z = 1, .arguments = arguments};
    return !gpu->set(graph, node, &all);
}

int32_t device_fetch(device *gpu, const borrowed *arenas, uint64_t offset, uint64_t bytes,
                     uint64_t rows) {
    row_copy one[MAX_COPIES] = {{rows, arenas->sends + offset, bytes / UNIT_BYTES, 0, {0}}};
    return copy(gpu, gpu->in, one, 1) && !gpu->record(gpu->arrived, gpu->in) &&
           !gpu->follow(gpu->stream, gpu->arrived, 0);
}

int32_t device_deliver(device *gpu, const borrowed *arenas, uint64_t offset, uint64_t bytes,
                       uint64_t rows) {
    row_copy one[MAX_COPIES] = {{arenas->replies + offset, rows, bytes / UNIT_BYTES, 0,
                                 {.permit = arenas->permit, .wanted = arenas->wanted}}};
    return copy(gpu, gpu->out, one, 1);
}

/* What to bring; with `noted`, also a word to the graph of where each part's outputs are to be. */
static void list_brought(const slot *one, const transfer *parts, int32_t count, int32_t noted,
                         row_copy *copies) {
    for (int32_t i = 0; i < count; i++) {
        const transfer *part = &parts[i];
        copies[i].to = one->rows + part->at - part->header_bytes;
        copies[i].from = part->from - part->header_bytes;
        if (copies[i].to != copies[i].from)
            copies[i].units = (part->header_bytes + part->bytes) / UNIT_BYTES;
        if (noted) {
            copies[i].note = one->deliveries + (uint64_t)i * sizeof(delivery);
            copies[i].out = (delivery){part->to, part->rows, part->permit, part->wanted};
        }
    }
}

static void list_taken(const slot *one, const transfer *parts, int32_t count, row_copy *copies) {
    for (int32_t i = 0; i < count; i++) {
        const transfer *part = &parts[i];
        copies[i] = (row_copy){part->to, one->rows + part->at, part->bytes / UNIT_BYTES, 0,
                               {.permit = part->permit, .wanted = part->wanted}};
    }
}

/* By the engines that copy, while kernels that leave no room for others run. */
static int move_beside(device *gpu, row_copy *copies, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        uint64_t bytes = copies[i].units * UNIT_BYTES;
        if (bytes && gpu->move(copies[i].to, copies[i].from, bytes, gpu->in)) return 0;
        copies[i].units = 0;
    }
    return 1;
}

static int mark_end(device *gpu, slot *one, void *stream, int timed) {
    return !gpu->record(one->ended, stream) && !(timed && gpu->record(one->timed, stream));
}

/* Once it is computed. No stream is told to wait for that before the next rows are on their way, as it may
 * share a queue of the device with theirs, which then wait too; nor after the next batch has begun, as a
 * kernel that copies would not find room until that has ended. */
static void take_away(device *gpu) {
    if (gpu->leaving < 0) return;
    int32_t index = gpu->leaving;
    slot *one = &gpu->slots[index];
    gpu->leaving = -1;
    if (gpu->follow(gpu->out, one->computed, 0) || !copy(gpu, gpu->out, gpu->taken, gpu->num_taken) ||
        !mark_end(gpu, one, gpu->out, 1))
        device_lose(gpu, index);
}

int32_t device_launch(device *gpu, int32_t index, const captured *of, const transfer *parts,
                      int32_t count, int32_t how) {
    slot *one = &gpu->slots[index];
    int beside = how & BESIDE, delivers = how & DELIVERS, timed = how & TIMED;
    int leaves = beside && !delivers; /* by a launch of its own */
    void *stream = gpu->stream, *in = beside ? gpu->in : stream;
    row_copy brought[MAX_COPIES] = {0}, taken[MAX_COPIES] = {0};
    int32_t to_bring = count, to_take = delivers || leaves ? 0 : count;
    list_brought(one, parts, to_bring, delivers, brought);
    list_taken(one, parts, to_take, taken);
    one->beside = beside;
    if (beside && (gpu->record(one->fetching, in) || !move_beside(gpu, brought, to_bring))) return 0;
    if (leaves) to_bring = 0;
    if (of->brings) {
        if (!set(gpu, of->graph, of->brings, brought, to_bring)) return 0;
        to_bring = 0;
    }
    if (of->takes_away) {
        if (!set(gpu, of->graph, of->takes_away, taken, to_take)) return 0;
        to_take = 0;
    }
    if ((!beside && timed && gpu->record(one->began, stream)) ||
        (to_bring && !copy(gpu, in, brought, to_bring)) ||
        (beside && (gpu->record(one->fetched, in) || gpu->follow(stream, one->fetched, 0) ||
                    gpu->record(one->began, stream))) ||
        gpu->launch(of->graph, stream))
        return 0;
    take_away(gpu); /* of the batch before */
    if ((beside && gpu->record(one->computed, stream)) ||
        (to_take && !copy(gpu, stream, taken, to_take)) ||
        (!leaves && !mark_end(gpu, one, stream, timed))) {
        device_lose(gpu, index); /* nobody can tell when it will have stopped writing */
        return 0;
    }
    if (leaves) {
        gpu->leaving = index;
        gpu->num_taken = count;
        list_taken(one, parts, count, gpu->taken);
    }
    return 1;
}

static int32_t passed(const device *gpu, void *event) {
    int32_t result = gpu->query(event);
    return result == NOT_READY ? 0 : result ? -1 : 1;
}

int32_t device_done(device *gpu, int32_t index) {
    const slot *one = &gpu->slots[index];
    if (gpu->leaving == index) {
        int32_t computed = passed(gpu, one->computed);
        if (computed < 1) return computed;
        take_away(gpu);
    }
    return one->rows ? passed(gpu, one->ended) : -1;
}

int32_t device_launch_graphs(device *gpu, const uint64_t *graphs, int32_t count) {
    for (int32_t i = 0; i < count; i++)
        if (gpu->launch((void *)graphs[i], gpu->stream)) return 0;
    return !gpu->record(gpu->graph_ended, gpu->stream);
}

int32_t device_graph_done(device *gpu) { return passed(gpu, gpu->graph_ended); }

static uint32_t between(device *gpu, void *began, void *ended) {
    float milliseconds = 0;
    return gpu->elapsed(&milliseconds, began, ended) ? 0 : (uint32_t)(milliseconds * 1e3f);
}

device_times device_took(device *gpu, int32_t index) {
    const slot *one = &gpu->slots[index];
    while (gpu->query(one->timed) == NOT_READY) {} /* it follows at once */
    if (!one->beside) return (device_times){.compute_us = between(gpu, one->began, one->timed)};
    return (device_times){between(gpu, one->fetching, one->fetched),
                          between(gpu, one->fetched, one->began),
                          between(gpu, one->began, one->computed),
                          between(gpu, one->computed, one->timed)};
}

/* ---- Memory that another process lends. */

int32_t device_share(device *gpu, uint64_t address, uint64_t bytes, lent *out) {
    uint64_t base;
    size_t all;
    ipc_handle handle;
    if (gpu->range(&base, &all, address) || gpu->handle(&handle, address)) return 0;
    memcpy(out->handle, handle.bytes, sizeof handle);
    out->offset = address - base;
    out->bytes = bytes;
    return 1;
}

/* Where the lent memory is here; 0 when it cannot be reached, or is not as large as is said. */
static uint64_t reach(device *gpu, const lent *memory, uint64_t *base) {
    ipc_handle handle;
    uint64_t start;
    size_t all;
    memcpy(handle.bytes, memory->handle, sizeof handle);
    if (gpu->open(base, handle, LAZY_ENABLE_PEER_ACCESS)) {
        *base = 0;
        return 0;
    }
    if (gpu->range(&start, &all, *base) || memory->offset > all ||
        memory->bytes > all - memory->offset)
        return 0;
    return *base + memory->offset;
}

int32_t device_borrow(device *gpu, const lent_arenas *arenas, uint64_t row_bytes, borrowed *out) {
    memset(out, 0, sizeof *out);
    if (!gpu->copy) return 0;
    out->rows = arenas->rows;
    out->wanted = arenas->wanted;
    out->sends = reach(gpu, &arenas->sends, &out->bases[0]);
    out->replies = reach(gpu, &arenas->replies, &out->bases[1]);
    out->permit = reach(gpu, &arenas->permit, &out->bases[2]);
    if (out->sends && out->replies && out->permit && row_bytes % UNIT_BYTES == 0 &&
        arenas->permit.bytes >= sizeof arenas->wanted && arenas->rows > 0 &&
        (uint64_t)arenas->rows <= arenas->sends.bytes / row_bytes &&
        (uint64_t)arenas->rows <= arenas->replies.bytes / row_bytes)
        return 1;
    device_return(gpu, out);
    return 0;
}

void device_return(device *gpu, borrowed *arenas) {
    take_away(gpu);
    gpu->synchronize(gpu->in);
    gpu->synchronize(gpu->stream);
    gpu->synchronize(gpu->out);
    for (int32_t i = 0; i < 3; i++)
        if (arenas->bases[i]) gpu->close(arenas->bases[i]);
    memset(arenas, 0, sizeof *arenas);
}
