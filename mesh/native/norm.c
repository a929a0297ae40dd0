/* RMSNorm of float32 rows: see gateway/model/norm.py. */
#include "native.h"

enum { LANES = 16 };

void rms_norm(const float *x_RD, int64_t num_rows, const float *weight_HD, int64_t num_heads,
              int64_t width, float eps, float *y_RD) {
    for (int64_t r = 0; r < num_rows; r++) {
        const float *x = x_RD + r * width, *weight = weight_HD + r % num_heads * width;
        float *y = y_RD + r * width, squares[LANES] = {0}, sum = 0;
        int64_t d = 0;
        for (; d + LANES <= width; d += LANES)
            for (int lane = 0; lane < LANES; lane++) squares[lane] += x[d + lane] * x[d + lane];
        for (; d < width; d++) sum += x[d] * x[d];
        for (int lane = 0; lane < LANES; lane++) sum += squares[lane];
        float scale = 1.0f / __builtin_sqrtf(sum / (float)width + eps);
        for (d = 0; d < width; d++) y[d] = x[d] * scale * weight[d];
    }
}
