/* The gateway's turn of a layer whose routing a GPU knows: launch what sorts and scatters, send its
 * rows as soon as they are there, wait for the replies.
 *
 * Who is asked for what was decided before (gateway/asking.py) and is on the device too, so that
 * nothing is to be decided in between. What does not fit the plan is left alone: Python does that.
 */
#include "native.h"

#include <stdlib.h>

/* As mesh/wire.py has them. */
enum { DISPATCH = 1, REPLY = 2, REFERENCE = 6, SEVERAL = (1 << 10) - 1 };
enum { IRREGULAR = 0, REGULAR = 1, FAILED = -1 };
enum { NOT_BACK = 0, BACK = 1, BACK_AND_AWAY = 2 };

asking *asking_new(postbox *box, device *device) {
    asking *all = calloc(1, sizeof *all);
    if (!all) return NULL;
    all->box = box;
    all->device = device;
    all->trips = calloc(MAX_ASKS, sizeof *all->trips);
    all->operations = calloc(2 * MAX_ASKS, sizeof *all->operations);
    if (!all->trips || !all->operations) {
        asking_free(all);
        return NULL;
    }
    return all;
}

void asking_free(asking *all) {
    free(all->trips);
    free(all->operations);
    free(all);
}

/* How many rows each ask has, and whose; 0 when some are nobody's or do not fit. */
static int count_rows(seat *one) {
    for (int32_t i = 0; i < one->num_asks; i++) one->asks[i].num_rows = one->asks[i].num_experts = 0;
    for (int32_t expert = 0; expert < one->num_experts; expert++) {
        int32_t rows = one->counts_E[expert];
        if (!rows) continue;
        if (one->groups_E[expert] < 0) return 0;
        ask *mine = &one->asks[one->groups_E[expert]];
        mine->expert = expert;
        mine->num_experts++;
        mine->num_rows += rows;
        if (mine->num_rows > mine->capacity) return 0;
    }
    return 1;
}

static round_trip trip_of(const seat *one, const ask *mine) {
    int several = mine->several || mine->num_experts > 1;
    int referred = mine->by_reference;
    uint64_t header = several ? mine->header_bytes : 0;
    uint64_t bytes = (uint64_t)mine->num_rows * one->row_bytes;
    uint64_t rest = (uint64_t)(several ? SEVERAL : mine->expert) << 16 | (uint64_t)mine->num_rows;
    return (round_trip){
        .endpoint = mine->endpoint,
        .send_address = referred ? (uint64_t)&mine->first : mine->rows - header,
        .send_bytes = referred ? sizeof mine->first : bytes + header,
        .send_tag = (uint64_t)(referred ? REFERENCE : DISPATCH) << 60 | mine->send_tag | rest,
        .receive_address = mine->replies,
        .receive_bytes = referred ? 0 : bytes,
        .receive_tag = (uint64_t)REPLY << 60 | mine->reply_tag | rest,
        .send_where = referred ? ON_HOST : ANYWHERE,
    };
}

static int post(asking *all, seat *one) {
    int32_t count = 0;
    for (const ask *mine = one->asks; mine < one->asks + one->num_asks; mine++)
        if (mine->num_rows) all->trips[count++] = trip_of(one, mine);
    if (postbox_exchange(all->box, count, all->trips, all->operations)) return 0;
    const int32_t *posted = all->operations;
    for (ask *mine = one->asks; mine < one->asks + one->num_asks; mine++)
        if (mine->num_rows) {
            mine->received = *posted++;
            mine->sent = *posted++;
        }
    for (int32_t expert = 0; expert < one->num_experts; expert++)
        one->totals_E[expert] += (uint64_t)one->counts_E[expert];
    return 1;
}

int32_t asking_leave(asking *all, seat *one, const uint64_t *graphs, int32_t count) {
    int32_t done;
    if (!device_launch_graphs(all->device, graphs, count)) return FAILED;
    if (!one) return REGULAR;
    while (!(done = device_graph_done(all->device))) ucp_worker_progress(all->box->worker);
    if (done < 0) return FAILED;
    if (all->box->attention || !count_rows(one)) return IRREGULAR;
    int64_t began_ns = now_ns();
    one->sent_us = began_ns / 1000;
    int posted = post(all, one);
    one->posted_ns += now_ns() - began_ns;
    return posted ? REGULAR : IRREGULAR;
}

/* 1 when all is done, 0 while it is not, -1 when some of it failed. */
static int state_of(const postbox *box, const seat *one) {
    int all_done = 1;
    for (const ask *mine = one->asks; mine < one->asks + one->num_asks; mine++) {
        if (!mine->num_rows) continue;
        int32_t received = box->status[mine->received], sent = box->status[mine->sent];
        if ((received != DONE && received != IN_PROGRESS) || (sent != DONE && sent != IN_PROGRESS))
            return -1;
        all_done &= received == DONE && sent == DONE;
    }
    return all_done;
}

static void settle(postbox *box, seat *one) {
    for (ask *mine = one->asks; mine < one->asks + one->num_asks; mine++) {
        if (!mine->num_rows) continue;
        mine->ended_us = box->ended_us[mine->received];
        postbox_release(box, mine->received);
        postbox_release(box, mine->sent);
    }
}

/* Nothing of it is away, whoever asks. */
static void forget(seat *one) {
    for (ask *mine = one->asks; mine < one->asks + one->num_asks; mine++) mine->num_rows = 0;
}

int32_t asking_wait(asking *all, seat *one, int32_t spin_us, int32_t timeout_us, seat *next,
                    const uint64_t *graphs, int32_t count) {
    postbox *box = all->box;
    int64_t began_us = now_us();
    arrival found;
    do {
        while (ucp_worker_progress(box->worker)) {}
        int state = state_of(box, one);
        if (state > 0) {
            settle(box, one);
            if (!count) return BACK;
            int32_t left = asking_leave(all, next, graphs, count);
            if (left == FAILED) forget(one);
            return left == REGULAR ? BACK_AND_AWAY : left == IRREGULAR ? BACK : FAILED;
        }
        if (state < 0 || box->attention || postbox_probe(box, 0, &found)) return NOT_BACK;
    } while (postbox_idle(box, began_us, spin_us, began_us + timeout_us, -1));
    return NOT_BACK;
}
