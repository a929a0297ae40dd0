/* Matrices in panels of LANES outputs, inputs outermost within a panel: a row's input is broadcast
 * against a vector of outputs, no sum crosses lanes, and each output's sum runs over its inputs in
 * ascending order whatever the number of rows.
 */
#ifndef MESH_PANELS_H
#define MESH_PANELS_H

#include "lanes.h"

#include <stdlib.h>

enum { BLOCK = 6 };

INLINE int64_t panels(int64_t outputs) { return (outputs + LANES - 1) / LANES; }

/* matrix[output][input] into panel[input][lane], `stride` floats from input to input. */
INLINE void pack(float *panel, int64_t stride, const float *matrix, int64_t first, int64_t outputs,
                 int64_t inputs) {
    for (int64_t i = 0; i < inputs; i++)
        for (int64_t lane = 0; lane < LANES; lane++)
            panel[i * stride + lane] =
                first + lane < outputs ? matrix[(first + lane) * inputs + i] : 0.0f;
}

INLINE float *floats(int64_t count) {
    void *memory = NULL;
    return posix_memalign(&memory, 64, (size_t)count * sizeof(float)) ? NULL : memory;
}

/* `block` on BLOCK rows at a time and on what is left, each with its number of rows a constant. */
#define FOR_EACH_BLOCK(block)                                      \
    for (int64_t r = 0; r < num_rows; r += BLOCK) switch (num_rows - r) { \
        case 1: block(1); break;                                   \
        case 2: block(2); break;                                   \
        case 3: block(3); break;                                   \
        case 4: block(4); break;                                   \
        case 5: block(5); break;                                   \
        default: block(BLOCK);                                     \
    }

/* y[r] = plus[r] + panel . x[r] for `rows` rows, of whose outputs the first `outputs` count. */
INLINE void multiply(const float *panel, const float *x, int64_t inputs, int64_t x_stride,
                     const float *plus, float *y, int64_t y_stride, int64_t outputs, int rows) {
    lanes sum[BLOCK] = {0};
    for (int64_t i = 0; i < inputs; i++) {
        lanes w = load(panel + i * LANES);
        for (int r = 0; r < rows; r++) sum[r] += w * x[r * x_stride + i];
    }
    for (int r = 0; r < rows; r++) {
        if (plus)
            for (int64_t lane = 0; lane < outputs; lane++) sum[r][lane] += plus[r * y_stride + lane];
        memcpy(y + r * y_stride, &sum[r], (size_t)outputs * sizeof(float));
    }
}

#endif
