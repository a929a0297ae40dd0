/* Captured graphs on a GPU: launched, asked about, timed. The driver is found at run time, so that
 * this library builds and loads where there is none.
 */
#include "native.h"

#include <dlfcn.h>
#include <stdlib.h>

enum { NOT_READY = 600 };     /* of CUresult, whose 0 is success */
enum { DISABLE_TIMING = 2 }; /* of CUevent_flags */

typedef struct {
    void *began, *ended; /* events */
    uint64_t rows;       /* 0: not lent, or lost */
    int32_t taken;
} slot;

struct device {
    void *stream;
    slot slots[SLOTS];
    void *graph_ended; /* event */
    int32_t (*create)(void **event, uint32_t flags);
    int32_t (*destroy)(void *event);
    int32_t (*record)(void *event, void *stream);
    int32_t (*query)(void *event);
    int32_t (*elapsed)(float *milliseconds, void *began, void *ended);
    int32_t (*launch)(void *graph, void *stream);
};

static int find(device *gpu, void *library) {
    *(void **)&gpu->create = dlsym(library, "cuEventCreate");
    *(void **)&gpu->destroy = dlsym(library, "cuEventDestroy_v2");
    *(void **)&gpu->record = dlsym(library, "cuEventRecord");
    *(void **)&gpu->query = dlsym(library, "cuEventQuery");
    *(void **)&gpu->elapsed = dlsym(library, "cuEventElapsedTime");
    *(void **)&gpu->launch = dlsym(library, "cuGraphLaunch");
    return gpu->create && gpu->destroy && gpu->record && gpu->query && gpu->elapsed && gpu->launch;
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
    for (slot *one = gpu->slots; one < gpu->slots + SLOTS; one++)
        if (gpu->create(&one->began, 0) || gpu->create(&one->ended, 0)) {
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
    for (slot *one = gpu->slots; one < gpu->slots + SLOTS; one++) {
        if (one->began) gpu->destroy(one->began);
        if (one->ended) gpu->destroy(one->ended);
    }
    if (gpu->graph_ended) gpu->destroy(gpu->graph_ended);
    free(gpu);
}

void device_lend(device *gpu, int32_t index, uint64_t rows) { gpu->slots[index].rows = rows; }

uint64_t device_rows(const device *gpu, int32_t index) { return gpu->slots[index].rows; }

/* The first slot of the smallest buffers that hold the rows; SLOTS when none does. */
static int32_t first_slot(int64_t rows) {
    int32_t first = 0;
    while (first < SLOTS && 1LL << first / RING < rows) first += RING;
    return first;
}

int32_t device_knows(const device *gpu, void *const *graphs, int64_t rows) {
    int32_t first = first_slot(rows);
    for (int32_t i = first; first < SLOTS && i < first + RING; i++)
        if (gpu->slots[i].rows && graphs[i]) return 1;
    return 0;
}

int32_t device_take(device *gpu, void *const *graphs, int64_t rows) {
    int32_t first = first_slot(rows);
    for (int32_t i = first; first < SLOTS && i < first + RING; i++)
        if (gpu->slots[i].rows && graphs[i] && !gpu->slots[i].taken) {
            gpu->slots[i].taken = 1;
            return i;
        }
    return -1;
}

void device_give_back(device *gpu, int32_t index) { gpu->slots[index].taken = 0; }

void device_lose(device *gpu, int32_t index) { gpu->slots[index].rows = 0; }

int32_t device_launch(device *gpu, int32_t index, void *graph) {
    slot *one = &gpu->slots[index];
    if (gpu->record(one->began, gpu->stream) || gpu->launch(graph, gpu->stream)) return 0;
    if (gpu->record(one->ended, gpu->stream)) {
        device_lose(gpu, index); /* nobody can tell when it will have stopped writing */
        return 0;
    }
    return 1;
}

static int32_t passed(const device *gpu, void *event) {
    int32_t result = gpu->query(event);
    return result == NOT_READY ? 0 : result ? -1 : 1;
}

int32_t device_done(device *gpu, int32_t index) { return passed(gpu, gpu->slots[index].ended); }

int32_t device_launch_graph(device *gpu, void *graph) {
    return !gpu->launch(graph, gpu->stream) && !gpu->record(gpu->graph_ended, gpu->stream);
}

int32_t device_graph_done(device *gpu) { return passed(gpu, gpu->graph_ended); }

uint64_t device_microseconds(device *gpu, int32_t index) {
    float milliseconds = 0;
    slot *one = &gpu->slots[index];
    return gpu->elapsed(&milliseconds, one->began, one->ended) ? 0 : (uint64_t)(milliseconds * 1e3f);
}
