/* Decoding over the paged KV cache on a CPU: see gateway/model/attention.py.
 *
 * Legend: B sequences of one new token, H heads, J heads of keys and values, K size of a key, V size
 * of a value, W floats that a token leaves in the cache, N blocks that a sequence has at most.
 */
#include "lanes.h"
#include "native.h"

/* Run `body` for each position p in [first, end), with `row` where its keys and values are. */
#define FOR_EACH_POSITION(body)                                                          \
    for (int64_t p = first, n = first / size; p < end; n++) {                            \
        int64_t stop = (n + 1) * size < end ? (n + 1) * size : end;                      \
        const float *row = cache->rows_SW + (blocks_N[n] * size + p - n * size) * width; \
        for (; p < stop; p++, row += width) body                                         \
    }

/* Ask for the rows that the next sequence has at the positions of this one's block n: what a core
 * waits for otherwise is the way from the shared cache. */
INLINE void prefetch(const paged *cache, int64_t block) {
    enum { LINE = 64 / sizeof(float) };
    const float *row = cache->rows_SW + block * cache->block_size * cache->width;
    for (int64_t i = 0; i < cache->block_size * cache->width; i += LINE)
        __builtin_prefetch(row + i, 0, 2);
}

/* One head of one sequence; `scores` has room for each of its positions. */
INLINE void attend(const paged *cache, const int64_t *blocks_N, const int64_t *next_N,
                   int64_t first, int64_t end, const float *q_K, int64_t key, int64_t value, const float *sink, float *scores,
                   float *out_V) {
    int64_t size = cache->block_size, width = cache->width;
    float most = sink ? *sink : -__builtin_inff(), sum = 0;
    FOR_EACH_POSITION({
        if (next_N && p % size == 0) prefetch(cache, next_N[n]);
        float score = dot(q_K, row + key, cache->key_dim) * cache->scale;
        scores[p - first] = score;
        most = score > most ? score : most;
    })
    for (int64_t p = 0; p < end - first; p++) scores[p] = exponential(scores[p] - most);
    for (int64_t p = 0; p < end - first; p++) sum += scores[p];
    if (sink) sum += exponential(*sink - most);
    int64_t i = 0;
    for (; i + 2 * LANES <= cache->value_dim; i += 2 * LANES) {
        lanes left = {0}, right = {0};
        FOR_EACH_POSITION({
            left += scores[p - first] * load(row + value + i);
            right += scores[p - first] * load(row + value + i + LANES);
        })
        left /= sum;
        right /= sum;
        memcpy(out_V + i, &left, sizeof left);
        memcpy(out_V + i + LANES, &right, sizeof right);
    }
    for (; i < cache->value_dim; i++) {
        out_V[i] = 0;
        FOR_EACH_POSITION({ out_V[i] += scores[p - first] * row[value + i]; })
        out_V[i] /= sum;
    }
}

FOR_EACH_CPU
static void attend_all(const paged *cache, const float *q_BHK, int64_t q_stride,
                       const int64_t *blocks_BN, int64_t max_blocks, const int64_t *first_B,
                       const int64_t *end_B, const float *sinks_H, int64_t num_sequences,
                       int64_t num_heads, float *scores, float *out_BHV) {
    for (int64_t b = 0; b < num_sequences; b++)
        for (int64_t h = 0; h < num_heads; h++) {
            int64_t j = h / (num_heads / cache->num_kv_heads);
            const int64_t *blocks_N = blocks_BN + b * max_blocks;
            const int64_t *next_N = h || b + 1 == num_sequences ? NULL : blocks_N + max_blocks;
            attend(cache, blocks_N, next_N, first_B[b], end_B[b],
                   q_BHK + b * q_stride + h * cache->key_dim, j * cache->key_dim,
                   cache->value_offset + j * cache->value_dim, sinks_H ? sinks_H + h : NULL, scores,
                   out_BHV + (b * num_heads + h) * cache->value_dim);
        }
}

void attend_pages(const paged *cache, const float *q_BHK, int64_t q_stride,
                  const int64_t *blocks_BN, int64_t max_blocks, const int64_t *first_B,
                  const int64_t *end_B, const float *sinks_H, int64_t num_sequences,
                  int64_t num_heads, float *scores, float *out_BHV) {
    attend_all(cache, q_BHK, q_stride, blocks_BN, max_blocks, first_B, end_B, sinks_H,
               num_sequences, num_heads, scores, out_BHV);
}
