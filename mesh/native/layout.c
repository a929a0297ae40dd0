/* Routed rows between their tokens and the arenas, on a CPU: see gateway/layout.py.
 *
 * Legend: T tokens, K experts a token, R = T x K routed rows, E experts, D hidden size, N arena rows.
 */
#include "native.h"

#include <string.h>

enum { MAX_EXPERTS = 1 << 10 };

void layout_scatter(const int64_t *ids_R, int64_t num_rows, int64_t per_token,
                    const int64_t *in_order_R, const char *x_TD, char *send_ND, int64_t row_bytes,
                    int64_t *rows_R) {
    int64_t next_E[MAX_EXPERTS] = {0}, before = 0;
    for (int64_t r = 0; r < num_rows; r++) next_E[ids_R[r]]++;
    for (int64_t e = 0; e < MAX_EXPERTS; e++) {
        int64_t count = next_E[e];
        next_E[e] = before;
        before += count;
    }
    for (int64_t r = 0; r < num_rows; r++) {
        rows_R[r] = in_order_R[next_E[ids_R[r]]++];
        memcpy(send_ND + rows_R[r] * row_bytes, x_TD + r / per_token * row_bytes,
               (size_t)row_bytes);
    }
}

void layout_combine(const float *reply_ND, const int64_t *rows_TK, const float *weights_TK,
                    int64_t num_tokens, int64_t per_token, int64_t width, float *y_TD) {
    for (int64_t t = 0; t < num_tokens; t++) {
        float *y = y_TD + t * width;
        memset(y, 0, (size_t)width * sizeof(float));
        for (int64_t k = t * per_token; k < (t + 1) * per_token; k++) {
            const float *row = reply_ND + rows_TK[k] * width;
            for (int64_t d = 0; d < width; d++) y[d] += weights_TK[k] * row[d];
        }
    }
}
