/* Gateways in step.
 *
 * Those that decode ask for one layer after the other, at much the same pace. Where they do so at the
 * same time their rows are computed together, and none attends while an expert that works for
 * another takes the memory's bandwidth. So who comes early is held for those who are about to come:
 * where a step begins for a part of it, which brings together who is apart, and within it, where it
 * is a matter of moments, for those who were computed together the last time.
 */
#include "native.h"

enum { PART_OF_STEP = 8, PART_OF_BATCH = 1 };

void company_came(pace *one, int32_t layer, int64_t now) {
    if (layer <= one->layer || !one->came_us) {
        int64_t period_us = one->came_us ? now - one->step_us : 0;
        /* Steps out of step take longer: they must not look like another pace. */
        int64_t most_us = one->period_us + one->period_us / PART_OF_STEP;
        one->period_us = most_us && most_us < period_us ? most_us : period_us;
        one->step_us = now;
    }
    one->layer = layer;
    one->came_us = now;
    one->waits = 1;
}

void company_left(pace *one, uint64_t batch) {
    one->batch = batch;
    one->waits = 0;
}

static int is_active(const pace *one, int64_t now) { return now - one->came_us < one->period_us; }

/* Whether it is about to begin a step, or should have: less than half of one after we did. Of two the
 * other one is further from that, and does not wait. Paces that are too far apart never meet. */
static int comes_soon(const pace *one, const pace *other, int64_t now) {
    int64_t ours = one->period_us, theirs = other->period_us;
    return is_active(other, now) && 4 * ours < 5 * theirs && 4 * theirs < 5 * ours &&
           other->step_us + theirs - one->step_us < ours / 2;
}

int64_t company_until(const pace *one, const pace *const *others, int32_t count,
                      uint32_t expected_us, int64_t now) {
    int beginning = one->step_us == one->came_us, missing = 0;
    const pace *first = NULL; /* it and each of the others come together: else all would chase all */
    for (int32_t i = 0; i < count; i++) {
        const pace *other = others[i];
        if (!first && (other == one || is_active(other, now))) first = other;
        if (other == one) continue;
        missing |= beginning ? (one == first || other == first) && comes_soon(one, other, now)
                             : one->batch && other->batch == one->batch && !other->waits;
    }
    if (!missing) return 0;
    return one->came_us + (beginning ? one->period_us / PART_OF_STEP : expected_us / PART_OF_BATCH);
}
