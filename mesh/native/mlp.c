/* The gated MLP of small experts in float32, on one core.
 *
 * Legend: R rows, D hidden size of the model, H hidden size of the expert.
 *
 * A worker that shares its core with fifteen others finds the caches filled by them on every
 * message: what counts is how little is touched, and each matrix is read once, in order. Weights
 * lie in panels of LANES outputs, inputs outermost within a panel, so that a row's input is
 * broadcast against a vector of outputs and no sum crosses lanes. The sum of each output runs over
 * its inputs in ascending order whatever the number of rows, so that a row's result does not depend
 * on the rows beside it.
 */
#include "panels.h"
#include "native.h"

#include <stdlib.h>

struct gated_mlp {
    int64_t hidden, width;           /* D, H */
    int64_t up_panels, down_panels;  /* of H, of D */
    float *gate_up;                  /* up_panels x D x (LANES of gate, LANES of up) */
    float *down;                     /* down_panels x H x LANES */
};

gated_mlp *gated_mlp_new(const float *gate_up_HD, const float *down_DH, int64_t hidden,
                         int64_t width) {
    gated_mlp *mlp = calloc(1, sizeof *mlp);
    if (!mlp) return NULL;
    mlp->hidden = hidden;
    mlp->width = width;
    mlp->up_panels = panels(width);
    mlp->down_panels = panels(hidden);
    mlp->gate_up = floats(mlp->up_panels * hidden * 2 * LANES);
    mlp->down = floats(mlp->down_panels * width * LANES);
    if (!mlp->gate_up || !mlp->down) {
        gated_mlp_free(mlp);
        return NULL;
    }
    for (int64_t p = 0; p < mlp->up_panels; p++) {
        float *panel = mlp->gate_up + p * hidden * 2 * LANES;
        pack(panel, 2 * LANES, gate_up_HD, p * LANES, width, hidden);
        pack(panel + LANES, 2 * LANES, gate_up_HD + width * hidden, p * LANES, width, hidden);
    }
    for (int64_t p = 0; p < mlp->down_panels; p++)
        pack(mlp->down + p * width * LANES, LANES, down_DH, p * LANES, hidden, width);
    return mlp;
}

void gated_mlp_free(gated_mlp *mlp) {
    free(mlp->gate_up);
    free(mlp->down);
    free(mlp);
}

int64_t gated_mlp_scratch_floats(const gated_mlp *mlp, int64_t num_rows) {
    return num_rows * mlp->up_panels * LANES;
}

/* hidden[r] = silu(gate . x[r]) * (up . x[r]) for one panel and `rows` rows. */
INLINE void up_block(const float *panel, const float *x_RD, int64_t inputs, float *hidden,
                     int64_t stride, int rows) {
    lanes gate[BLOCK] = {0}, up[BLOCK] = {0};
    for (int64_t i = 0; i < inputs; i++) {
        lanes g, u;
        memcpy(&g, panel + i * 2 * LANES, sizeof g);
        memcpy(&u, panel + i * 2 * LANES + LANES, sizeof u);
        for (int r = 0; r < rows; r++) {
            gate[r] += g * x_RD[r * inputs + i];
            up[r] += u * x_RD[r * inputs + i];
        }
    }
    for (int r = 0; r < rows; r++) {
        float *h = hidden + r * stride;
        for (int lane = 0; lane < LANES; lane++) {
            float g = gate[r][lane];
            h[lane] = g / (1.0f + exponential(-g)) * up[r][lane];
        }
    }
}

FOR_EACH_CPU
static void run(const gated_mlp *mlp, const float *x_RD, float *y_RD, int64_t num_rows,
                float *hidden) {
    int64_t D = mlp->hidden, H = mlp->width, stride = mlp->up_panels * LANES;
    for (int64_t p = 0; p < mlp->up_panels; p++) {
        const float *panel = mlp->gate_up + p * D * 2 * LANES;
#define UP(rows) up_block(panel, x_RD + r * D, D, hidden + r * stride + p * LANES, stride, rows)
        FOR_EACH_BLOCK(UP)
    }
    for (int64_t p = 0; p < mlp->down_panels; p++) {
        const float *panel = mlp->down + p * H * LANES;
        int64_t outputs = D - p * LANES < LANES ? D - p * LANES : LANES;
        float *y = y_RD + p * LANES;
#define DOWN(rows) \
    multiply(panel, hidden + r * stride, H, stride, NULL, y + r * D, D, outputs, rows)
        FOR_EACH_BLOCK(DOWN)
    }
}

void gated_mlp_run(const gated_mlp *mlp, const float *x_RD, float *y_RD, int64_t num_rows,
                   float *scratch) {
    run(mlp, x_RD, y_RD, num_rows, scratch);
}
