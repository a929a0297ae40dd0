/* RMSNorm of float32 rows: see gateway/model/norm.py. */
#include "lanes.h"
#include "native.h"

FOR_EACH_CPU
static void norm(const float *x_RD, int64_t num_rows, const float *weight_HD, int64_t num_heads,
              int64_t width, float eps, float *y_RD) {
    for (int64_t r = 0; r < num_rows; r++) {
        const float *x = x_RD + r * width, *weight = weight_HD + r % num_heads * width;
        float *y = y_RD + r * width;
        float scale = 1.0f / __builtin_sqrtf(dot(x, x, width) / (float)width + eps);
        for (int64_t d = 0; d < width; d++) y[d] = x[d] * scale * weight[d];
    }
}

void rms_norm(const float *x_RD, int64_t num_rows, const float *weight_HD, int64_t num_heads,
              int64_t width, float eps, float *y_RD) {
    norm(x_RD, num_rows, weight_HD, num_heads, width, eps, y_RD);
}
