/* The few calls of libcuda.so.1 that mesh/native/device.c makes, over the host's memory: a graph
 * multiplies a buffer, as one or by expert, or places rows; the one kernel copies. Each runs when the test has allowed so many, in the order
 * of the launches. While `capturing` a launch is a node. A memory handle is an address of this process. */
#include "../mesh/native/copy_rows.h"

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { READY = 0, NOT_READY = 600, LAUNCH_FAILED = 719, MAX_LAUNCHES = 4096 };
enum { FAILS_AT_LAUNCH = 1, FAILS_LATER = 2 };

/* See gateway/gpu_kernels.py's place; rows of floats. */
typedef struct {
    const float *x;
    const int64_t *ids;
    const int32_t *tables;
    float *send;
    int64_t *rows;
    int32_t *counts;
    int64_t num_rows, rows_per_token, num_shards, num_experts, width;
} placing;

/* Rows of several experts, and the counts ahead of them, which go to the host too. */
typedef struct {
    const int32_t *counts;
    int32_t *on_host;
    const float *times; /* by expert */
    int64_t num_experts, width;
    int64_t parts, step; /* so many of these, and floats from one to the next */
    const delivery *to;  /* by part; NULL: where they are */
} sharing;

typedef struct {
    float *rows;
    int64_t count;
    float times;
    int32_t fails;
    const placing *places; /* instead */
    const sharing *shares; /* instead of times */
    row_copy *brings, *takes_away; /* MAX_COPIES each; NULL: none */
} graph;

typedef struct {
    graph *replayed; /* NULL: copies alone */
    row_copy copies[MAX_COPIES], away[MAX_COPIES]; /* of a graph: as they were when it was launched */
} launch;

typedef struct {
    void *function;
    uint32_t x, y, z, threads_x, threads_y, threads_z, shared_bytes;
    void **arguments, **extra, *kernel, *context;
} node_parameters;

typedef struct {
    char bytes[64];
} ipc_handle;

int32_t allowed, launched, ran, mapped, refuses, capturing;
static launch queue[MAX_LAUNCHES];

int32_t cuEventCreate(void **event, uint32_t flags) {
    (void)flags;
    return (*event = calloc(1, sizeof(int32_t))) ? READY : 2;
}

int32_t cuEventDestroy_v2(void *event) {
    free(event);
    return READY;
}

int32_t cuEventRecord(void *event, void *stream) {
    (void)stream;
    *(int32_t *)event = launched;
    return READY;
}

int32_t cuGraphLaunch(void *given, void *stream) {
    (void)stream;
    graph *one = given;
    if (one->fails == FAILS_AT_LAUNCH) return LAUNCH_FAILED;
    launch *queued = &queue[launched++];
    *queued = (launch){.replayed = one};
    if (one->brings) memcpy(queued->copies, one->brings, sizeof queued->copies);
    if (one->takes_away) memcpy(queued->away, one->takes_away, sizeof queued->away);
    return READY;
}

int32_t cuGraphExecKernelNodeSetParams_v2(void *given, void *node, const node_parameters *all) {
    const graph *one = given;
    if (refuses || all->y > MAX_COPIES || (node != one->brings && node != one->takes_away))
        return LAUNCH_FAILED;
    memset(node, 0, sizeof queue->copies);
    memcpy(node, all->arguments[0], sizeof(row_copy) * all->y);
    return READY;
}

int32_t cuStreamGetCaptureInfo_v2(void *stream, int32_t *status, uint64_t *number, void **of,
                                  void *const **last, size_t *count) {
    static void *node;
    (void)stream, (void)number, (void)of;
    node = (void *)(intptr_t)capturing++;
    *status = node != NULL;
    *last = &node;
    *count = 1;
    return READY;
}

static int64_t unit(const placing *p, int64_t n) {
    return p->ids[n / p->num_shards] * p->num_shards + n % p->num_shards;
}

static void place(const placing *p) {
    int64_t experts = p->num_experts;
    const int32_t *group = p->tables + 1, *first = group + experts, *limit = first + experts;
    const int32_t *header = limit + experts, *owner = header + experts;
    memset(p->counts, 0, sizeof *p->counts * (size_t)experts);
    for (int64_t n = 0; n < p->num_rows; n++) {
        int64_t mine = unit(p, n), row = -1;
        if (mine < experts) {
            p->counts[mine]++;
            if (group[mine] >= 0) row = first[mine];
        }
        for (int64_t m = 0; row >= 0 && m < p->num_rows; m++) {
            int64_t other = unit(p, m);
            row += other < experts && group[other] == group[mine] &&
                   (other < mine || (other == mine && m < n));
        }
        if (row >= 0 && row >= limit[mine]) row = -1;
        p->rows[n] = row;
        if (row >= 0)
            memcpy(p->send + row * p->width, p->x + n / p->rows_per_token * p->width,
                   sizeof *p->x * (size_t)p->width);
    }
    for (int32_t n = 0; n < p->tables[0]; n++) {
        int32_t *words = (int32_t *)(p->send + header[n] * p->width);
        for (int64_t e = 0; e < experts; e++) words[e] = group[e] == owner[n] ? p->counts[e] : 0;
    }
}

static int is_wanted(const delivery *to) {
    return !to->permit || *(const uint64_t *)to->permit == to->wanted;
}

static void multiply_by_expert(const sharing *s, float *rows, int64_t count) {
    const int32_t *counts = s->counts;
    for (int64_t part = 0; part < s->parts; part++, counts += s->step) {
        memcpy(s->on_host + part * s->num_experts, counts, sizeof *counts * (size_t)s->num_experts);
        float *row = rows + part * s->step, *end = row + count;
        for (int64_t e = 0; e < s->num_experts; e++)
            for (int64_t i = 0; i < counts[e] * s->width && row < end; i++) *row++ *= s->times[e];
        if (s->to && is_wanted(&s->to[part]))
            memmove((float *)s->to[part].to, rows + part * s->step,
                    sizeof *rows * s->to[part].rows * (size_t)s->width);
    }
}

static void copy(const row_copy *one) {
    if (one->note)
        *(delivery *)one->note = one->out;
    if (one->note || is_wanted(&one->out))
        memcpy((char *)one->to, (const char *)one->from, UNIT_BYTES * one->units);
}

static void copy_all(const row_copy *copies) {
    for (int32_t i = 0; i < MAX_COPIES; i++) copy(&copies[i]);
}

static void run(const launch *one) {
    copy_all(one->copies);
    if (one->replayed && one->replayed->places)
        place(one->replayed->places);
    else if (one->replayed && one->replayed->shares)
        multiply_by_expert(one->replayed->shares, one->replayed->rows, one->replayed->count);
    else if (one->replayed)
        for (int64_t i = 0; i < one->replayed->count; i++)
            one->replayed->rows[i] *= one->replayed->times;
    copy_all(one->away);
}

int32_t cuEventQuery(void *event) {
    for (; ran < allowed && ran < launched; ran++) run(&queue[ran]);
    int32_t after = *(int32_t *)event;
    if (after > ran) return NOT_READY;
    graph *last = after ? queue[after - 1].replayed : NULL;
    return last && last->fails == FAILS_LATER ? LAUNCH_FAILED : READY;
}

/* Of each launch. */
float milliseconds = 0.5f;

int32_t cuEventElapsedTime(float *passed, void *began, void *ended) {
    *passed = milliseconds * (float)(*(int32_t *)ended - *(int32_t *)began);
    return READY;
}

/* Whatever the test allowed. */
int32_t cuStreamSynchronize(void *stream) {
    (void)stream;
    for (; ran < launched; ran++) run(&queue[ran]);
    return READY;
}

/* There is one queue for all. */
int32_t cuCtxGetStreamPriorityRange(int32_t *least, int32_t *greatest) {
    *least = *greatest = 0;
    return READY;
}

int32_t cuStreamCreateWithPriority(void **stream, uint32_t flags, int32_t priority) {
    (void)flags, (void)priority;
    *stream = &queue;
    return READY;
}

int32_t cuStreamDestroy_v2(void *stream) {
    (void)stream;
    return READY;
}

int32_t cuStreamWaitEvent(void *stream, void *event, uint32_t flags) {
    (void)stream, (void)event, (void)flags;
    return READY;
}

int32_t cuMemcpyAsync(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    (void)stream;
    queue[launched++] = (launch){.copies = {{to, from, bytes / UNIT_BYTES, 0, {0}}}};
    return READY;
}

int32_t cuMemGetAddressRange_v2(uint64_t *base, size_t *bytes, uint64_t address) {
    *base = address;
    *bytes = (size_t)1 << 30;
    return READY;
}

int32_t cuIpcGetMemHandle(ipc_handle *handle, uint64_t address) {
    memset(handle, 0, sizeof *handle);
    memcpy(handle->bytes, &address, sizeof address);
    return READY;
}

int32_t cuIpcOpenMemHandle_v2(uint64_t *base, ipc_handle handle, uint32_t flags) {
    (void)flags;
    memcpy(base, handle.bytes, sizeof *base);
    if (!*base) return 1;
    mapped++;
    return READY;
}

int32_t cuIpcCloseMemHandle(uint64_t base) {
    (void)base;
    mapped--;
    return READY;
}

int32_t cuModuleLoadData(void **module, const void *image) {
    *module = (void *)image;
    return READY;
}

int32_t cuModuleGetFunction(void **function, void *module, const char *name) {
    *function = module;
    return strstr(module, name) ? READY : 500;
}

int32_t cuLaunchKernel(void *function, uint32_t x, uint32_t y, uint32_t z, uint32_t threads_x,
                       uint32_t threads_y, uint32_t threads_z, uint32_t shared_bytes, void *stream,
                       void **arguments, void **extra) {
    (void)function, (void)x, (void)z, (void)threads_x, (void)threads_y, (void)threads_z;
    (void)shared_bytes, (void)stream, (void)extra;
    if (capturing) return READY;
    launch *one = &queue[launched++];
    *one = (launch){0};
    memcpy(one->copies, arguments[0], sizeof(row_copy) * y);
    return READY;
}
