/* Gateways in step.
 *
 * Those that decode ask for one layer after the other, at much the same pace. Where they do so at the
 * same time their rows are computed together, and none attends while an expert that works for
 * another takes the memory's bandwidth. So who comes early is held until those who follow at its
 * pace should be here, for an eighth of a step at most. That is foretold from when they began their
 * step and which layer they last asked for: so another worker, which is asked too, foretells much the
 * same, and so does this one where somebody has no rows for it in a layer.
 */
#include "native.h"

enum {
    PART_OF_STEP = 8,
    UNSTEADY = 10,
    EARLY = 2, /* times what it may be wrong by */
    NEVER = -1,
    LAYERS = 64,    /* of a mask, which others share */
    MOST_US = 5000, /* that anybody is held in a layer: who idles has long steps, and no hurry */
};

static int64_t within(int64_t value, int64_t least, int64_t most) {
    return value < least ? least : value < most ? value : most;
}

/* What lies between two layers; who was held in between is not slower for that. */
static void learn(pace *one, int64_t layer_us) {
    int64_t most = one->layer_us / PART_OF_STEP / 2 + 1, by = layer_us - one->layer_us;
    one->layer_us += one->layer_us ? within(by / 2, -most, most) : by;
}

/* Steps out of step take longer, and prompts before them took much longer: one odd step does not make
 * another pace, two in a row do. */
static void learn_period(pace *one, int64_t since_us) {
    int64_t before_us = one->since_us, period_us = one->period_us;
    int64_t longer_us = since_us > before_us ? since_us : before_us;
    int64_t shorter_us = since_us < before_us ? since_us : before_us;
    int64_t least_us = period_us / 4 * 3, most_us = period_us / PART_OF_STEP * 9 + 1;
    if (longer_us < least_us) least_us = longer_us;
    if (shorter_us > most_us) most_us = shorter_us;
    one->period_us = period_us ? within(since_us, least_us, most_us) : since_us;
    one->since_us = since_us;
}

void company_came(pace *one, int32_t layer, int64_t now) {
    /* It may have had no rows for us until now. What comes twice, or after a long way without any, is
     * still of the same step unless that took much longer than the way does. */
    int64_t step_us = now - layer * one->layer_us, since_us = step_us - one->step_us;
    int64_t way_us = (layer - one->layer) * one->layer_us;
    one->begins = !one->came_us || layer < one->layer ||
                  (one->period_us && 2 * (now - one->came_us - way_us) > one->period_us);
    if (one->begins) {
        if (one->came_us && since_us > 0) learn_period(one, since_us);
        one->step_us = step_us;
        one->layers_before = one->layers;
        one->layers = 0;
    } else if (layer > one->layer)
        learn(one, (now - one->came_us) / (layer - one->layer));
    one->layers |= 1ull << layer % LAYERS;
    one->layer = layer;
    one->came_us = now;
    one->waits = 1;
}

void company_left(pace *one, uint64_t batch) {
    one->batch = batch;
    one->waits = 0;
}

static int is_active(const pace *one, int64_t now) { return now - one->came_us < one->period_us; }

/* Paces that are too far apart never meet; and a layer that had no rows for us has none again. */
static int comes(const pace *one, const pace *other, int64_t now) {
    int64_t ours = one->period_us, theirs = other->period_us;
    return is_active(other, now) && 4 * ours < 5 * theirs && 4 * theirs < 5 * ours &&
           !(other->waits && other->layer == one->layer) &&
           (!other->layers_before || other->layers_before >> one->layer % LAYERS & 1);
}

static int64_t mean_step(const pace *one, const pace *other) {
    return (one->period_us + other->period_us) / 2;
}

/* How long after one this other should come for the same layer, with what that may be wrong by in
 * ``slack``; NEVER: not at all. Of two that are half a step apart or more it is the other one that
 * waits. Who was computed together is so again: late for once, it is worth more than the layers that
 * both would take longer apart. */
static int64_t follows(const pace *one, const pace *other, int64_t expected_us, int64_t *slack) {
    int64_t step_us = mean_step(one, other), late;
    int together = one->batch && one->batch == other->batch && !other->waits;
    /* Whether it is still in the step before. */
    int next = one->begins && other->step_us < one->step_us - step_us / 2;
    *slack = one->begins || together ? step_us / UNSTEADY : expected_us;
    if (!next && other->layer >= one->layer) return NEVER;
    if (one->begins)
        late = other->step_us + (next ? other->period_us : 0) - one->step_us;
    else
        late = other->came_us + (one->layer - other->layer) * one->layer_us - one->came_us;
    if (next && together && late > *slack) return *slack;
    if (20 * late > (one->begins ? 9 : 10) * step_us) return NEVER;
    if (late >= 0) return late;
    /* It should have been here: any moment now, or it is not what it was. */
    return together || late >= -EARLY * *slack ? 0 : NEVER;
}

int64_t company_until(const pace *one, const pace *const *others, int32_t count,
                      uint32_t expected_us, int64_t now) {
    int64_t until_us = 0;
    const pace *first = NULL; /* it and each of the others come together: else all would chase all */
    for (int32_t i = 0; i < count; i++) {
        const pace *other = others[i];
        if (!first && (other == one || is_active(other, now))) first = other;
        if (other == one || !comes(one, other, now)) continue;
        int64_t slack = 0, late = follows(one, other, expected_us, &slack);
        int64_t most_us = within(mean_step(one, other) / PART_OF_STEP, 0, MOST_US);
        if (late == NEVER || (late > expected_us && one != first && other != first)) continue;
        int64_t here_us = one->came_us + within(late + slack, 0, most_us);
        if (here_us > until_us) until_us = here_us;
    }
    return until_us;
}
