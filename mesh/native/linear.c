/* A matrix product of few rows in float32 on one core: see mesh/linear.py.
 *
 * Legend: R rows, I inputs, O outputs.
 */
#include "native.h"
#include "panels.h"

struct linear {
    int64_t inputs, outputs;
    float *weight; /* panels of O x I x LANES */
};

linear *linear_new(const float *weight_OI, int64_t outputs, int64_t inputs) {
    linear *map = calloc(1, sizeof *map);
    if (!map) return NULL;
    map->inputs = inputs;
    map->outputs = outputs;
    map->weight = floats(panels(outputs) * inputs * LANES);
    if (!map->weight) {
        linear_free(map);
        return NULL;
    }
    for (int64_t p = 0; p < panels(outputs); p++)
        pack(map->weight + p * inputs * LANES, LANES, weight_OI, p * LANES, outputs, inputs);
    return map;
}

void linear_free(linear *map) {
    free(map->weight);
    free(map);
}

FOR_EACH_CPU
static void run(const linear *map, const float *x_RI, const float *plus_RO, float *y_RO,
                int64_t num_rows) {
    int64_t I = map->inputs, O = map->outputs;
    for (int64_t p = 0; p < panels(O); p++) {
        const float *panel = map->weight + p * I * LANES;
        const float *plus = plus_RO ? plus_RO + p * LANES : NULL;
        int64_t outputs = O - p * LANES < LANES ? O - p * LANES : LANES;
        float *y = y_RO + p * LANES;
#define MULTIPLY(rows) \
    multiply(panel, x_RI + r * I, I, I, plus ? plus + r * O : NULL, y + r * O, O, outputs, rows)
        FOR_EACH_BLOCK(MULTIPLY)
    }
}

void linear_run(const linear *map, const float *x_RI, const float *plus_RO, float *y_RO,
                int64_t num_rows) {
    run(map, x_RI, plus_RO, y_RO, num_rows);
}
