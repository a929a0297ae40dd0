/* Answer regular dispatches: a known session, an expert of ours, rows that fit, of the right
 * length. Whatever is not regular stays in the queue for Python, which says why and refuses.
 *
 * This is the whole of a small expert's turn: on a core shared with other workers the caches hold
 * none of it when a message comes, and each line of Python costs several times what it does when hot.
 */
#include "native.h"

#include <stdlib.h>

/* As mesh/wire.py has them. */
enum { DISPATCH = 1, REPLY = 2, EXPERT_BITS = 10, EXPERTS = 1 << EXPERT_BITS, LAYERS = 1 << 10 };
enum { SESSIONS = 1 << 16, MAX_IN_HAND = 256 };

#define KIND(tag) ((tag) >> 60)
#define SESSION(tag) ((tag) >> 44 & 0xFFFF)
#define EXPERT(tag) ((tag) >> 16 & 0xFFFFF)
#define ROWS(tag) ((int64_t)((tag) & 0xFFFF))
#define REPLY_TAG(tag, reply_session) \
    ((uint64_t)REPLY << 60 | (reply_session) << 44 | ((tag) & 0xFFFFFFFFFFFULL))

/* One dispatch in hand: its rows come in behind each other, and go out from the second half. */
struct work {
    enum { FREE, RECEIVING, SENDING } state;
    int32_t operation;
    uint64_t tag;
    const gated_mlp *mlp;
    float *rows;
    int64_t capacity_rows;
};

answering *answering_new(postbox *box, int32_t row_bytes, int32_t max_rows) {
    answering *all = calloc(1, sizeof *all);
    if (!all) return NULL;
    all->box = box;
    all->row_bytes = row_bytes;
    all->max_rows = max_rows;
    /* Large and touched in few places: the kernel gives memory to those alone. */
    all->sessions = calloc(SESSIONS, sizeof *all->sessions);
    all->answerers = calloc((size_t)LAYERS * EXPERTS, sizeof *all->answerers);
    all->works = calloc(MAX_IN_HAND, sizeof *all->works);
    if (!all->sessions || !all->answerers || !all->works) {
        answering_free(all);
        return NULL;
    }
    return all;
}

void answering_free(answering *all) {
    for (int32_t i = 0; all->works && i < MAX_IN_HAND; i++) free(all->works[i].rows);
    free(all->works);
    free(all->sessions);
    free(all->answerers);
    free(all->scratch);
    free(all);
}

static int regular(const answering *all, const arrival *found) {
    int64_t rows = ROWS(found->tag);
    return KIND(found->tag) == DISPATCH && all->sessions[SESSION(found->tag)].endpoint &&
           all->answerers[EXPERT(found->tag)].mlp && rows > 0 && rows <= all->max_rows &&
           found->bytes == (uint64_t)(rows * all->row_bytes);
}

/* Room for the rows and for their answers; keeps what it has. */
static int make_room(answering *all, work *one, int64_t rows) {
    if (rows > one->capacity_rows) {
        int64_t capacity = 1;
        while (capacity < rows) capacity *= 2;
        void *memory = NULL;
        if (posix_memalign(&memory, 64, (size_t)(2 * capacity * all->row_bytes))) return 0;
        free(one->rows);
        one->rows = memory;
        one->capacity_rows = capacity;
    }
    int64_t floats = gated_mlp_scratch_floats(one->mlp, rows);
    if (floats > all->scratch_floats) {
        free(all->scratch);
        void *memory = NULL;
        all->scratch_floats = 0;
        if (posix_memalign(&memory, 64, (size_t)floats * sizeof(float))) memory = NULL;
        all->scratch = memory;
        if (!memory) return 0;
        all->scratch_floats = floats;
    }
    return 1;
}

static void finish(answering *all, work *one) {
    postbox_release(all->box, one->operation);
    one->state = FREE;
    all->in_hand--;
}

/* The rows are in: compute, and send them back. */
static void answer(answering *all, work *one) {
    postbox *box = all->box;
    session *to = &all->sessions[SESSION(one->tag)];
    if (box->status[one->operation] != DONE || !to->endpoint) {
        /* Its gateway died, or left: nobody waits for this. */
        finish(all, one);
        return;
    }
    postbox_release(box, one->operation);
    int64_t rows = ROWS(one->tag), began_us = now_us();
    float *answers = one->rows + one->capacity_rows * all->row_bytes / (int64_t)sizeof(float);
    gated_mlp_run(one->mlp, one->rows, answers, rows, all->scratch);
    answerer *expert = &all->answerers[EXPERT(one->tag)];
    expert->rows += (uint64_t)rows;
    expert->microseconds += (uint64_t)(now_us() - began_us);
    one->state = SENDING;
    one->operation = postbox_send(box, to->endpoint, (uint64_t)answers,
                                  (uint64_t)(rows * all->row_bytes),
                                  REPLY_TAG(one->tag, to->reply_session));
    if (one->operation < 0) {
        one->state = FREE;
        all->in_hand--;
    } else if (box->status[one->operation] != IN_PROGRESS)
        finish(all, one);
}

/* Start on the message at the head of the queue; 0 when there is no memory for it. */
static int take(answering *all, work *one, arrival *found) {
    one->tag = found->tag;
    one->mlp = all->answerers[EXPERT(found->tag)].mlp;
    if (!make_room(all, one, ROWS(found->tag))) return 0;
    postbox_probe(all->box, 1, found);
    one->operation = postbox_take(all->box, found->message, (uint64_t)one->rows, found->bytes);
    if (one->operation < 0) return 0;
    one->state = RECEIVING;
    all->in_hand++;
    if (all->box->status[one->operation] != IN_PROGRESS) answer(all, one);
    return 1;
}

/* Move on what is in hand; a free place, or NULL. */
static work *look_at_works(answering *all) {
    work *place = NULL;
    int32_t left = all->in_hand;
    for (work *one = all->works; one < all->works + MAX_IN_HAND && (left || !place); one++) {
        if (one->state != FREE) {
            left--;
            if (all->box->status[one->operation] != IN_PROGRESS)
                one->state == RECEIVING ? answer(all, one) : finish(all, one);
        }
        if (one->state == FREE && !place) place = one;
    }
    return place;
}

void answering_look(answering *all) { look_at_works(all); }

void answering_run(answering *all, int32_t spin_us, int32_t wake_fd) {
    postbox *box = all->box;
    int64_t idle_since_us = now_us();
    do {
        while (ucp_worker_progress(box->worker)) {}
        work *place;
        arrival found;
        while ((place = look_at_works(all)) && postbox_probe(box, 0, &found)) {
            if (!regular(all, &found) || !take(all, place, &found)) return;
            all->last_progress_us = idle_since_us = now_us();
            ucp_worker_progress(box->worker);
        }
        if (box->attention) return;
    } while (postbox_idle(box, idle_since_us, spin_us, INT64_MAX, wake_fd));
}
