/* Vectors of floats, and what is computed on them. */
#ifndef MESH_LANES_H
#define MESH_LANES_H

#include <stdint.h>
#include <string.h>

enum { LANES = 16 };

typedef float lanes __attribute__((vector_size(LANES * sizeof(float))));

/* One build for each kind of x86-64; the loader picks. */
#if defined(__clang__)
#define HAS_CLONES (__clang_major__ >= 18)
#else
#define HAS_CLONES (__GNUC__ >= 12)
#endif
#if defined(__x86_64__) && defined(__linux__) && HAS_CLONES
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FOR_EACH_CPU
#endif
#define INLINE static inline __attribute__((always_inline))

/* e^x to 2 units in the last place: Cephes' expf, which compilers turn into vectors. */
INLINE float exponential(float of) {
    float x = of > 88.0f ? 88.0f : of < -87.0f ? -87.0f : of;
    float n = __builtin_floorf(x * 1.44269504088896341f + 0.5f);
    x = x - n * 0.693359375f + n * 2.12194440e-4f;
    float y = 1.9875691500e-4f;
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    union { int32_t bits; float value; } power = {((int32_t)n + 127) << 23};
    return of > 88.0f ? __builtin_inff() : y * power.value;
}

INLINE lanes load(const float *from) {
    lanes found;
    memcpy(&found, from, sizeof found);
    return found;
}

INLINE float sum_of(lanes all) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float four __attribute__((vector_size(16)));
    eight halves[2];
    memcpy(halves, &all, sizeof halves);
    halves[0] += halves[1];
    four quarters[2];
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][2]) + (quarters[0][1] + quarters[0][3]);
}

/* a . b, in an order that depends on the width alone. */
INLINE float dot(const float *a, const float *b, int64_t width) {
    lanes products = {0};
    float sum = 0;
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) products += load(a + i) * load(b + i);
    for (; i < width; i++) sum += a[i] * b[i];
    return sum + sum_of(products);
}

#endif
