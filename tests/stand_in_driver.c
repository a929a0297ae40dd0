/* The few calls of libcuda.so.1 that mesh/native/device.c makes, over the host's memory: a graph
 * multiplies a buffer. It runs when the test has allowed so many, in the order of the launches. */
#include <stdint.h>
#include <stdlib.h>

enum { READY = 0, NOT_READY = 600, LAUNCH_FAILED = 719, MAX_LAUNCHES = 4096 };
enum { FAILS_AT_LAUNCH = 1, FAILS_LATER = 2 };

typedef struct {
    float *rows;
    int64_t count;
    float times;
    int32_t fails;
} graph;

int32_t allowed, launched, ran;
static graph *queue[MAX_LAUNCHES];

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
    queue[launched++] = one;
    return READY;
}

int32_t cuEventQuery(void *event) {
    for (; ran < allowed && ran < launched; ran++)
        for (int64_t i = 0; i < queue[ran]->count; i++) queue[ran]->rows[i] *= queue[ran]->times;
    int32_t after = *(int32_t *)event;
    if (after > ran) return NOT_READY;
    return after && queue[after - 1]->fails == FAILS_LATER ? LAUNCH_FAILED : READY;
}

/* Half a millisecond each. */
int32_t cuEventElapsedTime(float *milliseconds, void *began, void *ended) {
    *milliseconds = 0.5f * (float)(*(int32_t *)ended - *(int32_t *)began);
    return READY;
}
