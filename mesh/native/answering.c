/* Answer regular dispatches: a known session, an expert of ours or several of them that a device
 * computes together, rows that fit, of the right length. Whatever is not regular stays in the queue
 * for Python, which says why and refuses.
 *
 * This is the whole of a small expert's turn: on a core shared with other workers the caches hold
 * none of it when a message comes, and each line of Python costs several times what it does when hot.
 * With a device it launches what was captured, and receives and sends while that computes; rows that
 * came by reference are then read and answered in the gateway's own memory, by the device.
 */
#include "native.h"

#include <poll.h>
#include <sched.h>
#include <stdlib.h>

/* As mesh/wire.py has them. */
enum { DISPATCH = 1, REPLY = 2, REFERENCE = 6 };
enum { EXPERT_BITS = 10, EXPERTS = 1 << EXPERT_BITS, SEVERAL = EXPERTS - 1, LAYERS = 1 << 10 };
enum { UNKNOWN_EXPERT = 2, BAD_COUNTS = 5, DEVICE_FAILED = 7, MALFORMED = 8 };
enum { SESSIONS = 1 << 16, MAX_IN_HAND = 256, LOOK_US = 1000, LOOK_AROUND_US = 1000000 };

#define KIND(tag) ((tag) >> 60)
#define SESSION(tag) ((tag) >> 44 & 0xFFFF)
#define EXPERT(tag) ((tag) >> 16 & 0xFFFFF)
#define IS_SEVERAL(tag) (((tag) >> 16 & SEVERAL) == SEVERAL)
#define ROWS(tag) ((int64_t)((tag) & 0xFFFF))
#define REPLY_TAG(tag, reply_session) \
    ((uint64_t)REPLY << 60 | (reply_session) << 44 | ((tag) & 0xFFFFFFFFFFFULL))

/* One dispatch in hand: its rows come in behind each other, and go out from the second half; with
 * a device, from where they came. */
struct work {
    enum { FREE, RECEIVING, COMPUTING, FAILED, SENDING } state;
    int32_t operation;
    uint64_t tag;
    union {
        const gated_mlp *mlp;
        replays *replays;
    };
    float *rows;
    int64_t capacity_rows;
    int64_t header_rows; /* ahead of the rows of several experts */
    int64_t first;       /* of a reference: the row that it says */
    int32_t slot;
    int32_t refusal; /* why it has failed */
    work *next; /* to have been launched */
};

answering *answering_new(postbox *box, int32_t row_bytes, int32_t max_rows, device *device) {
    answering *all = calloc(1, sizeof *all);
    if (!all) return NULL;
    all->box = box;
    all->device = device;
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

/* ---- Sessions. */

void answering_open(answering *all, int32_t number, uint64_t endpoint, uint64_t reply_session) {
    answering_close(all, number);
    all->sessions[number].endpoint = endpoint;
    all->sessions[number].reply_session = reply_session;
}

void answering_close(answering *all, int32_t number) {
    if (!all->sessions[number].endpoint) return;
    all->sessions[number].endpoint = 0;
    all->sessions[number].closed_us = now_us();
    if (all->sessions[number].arenas.sends) device_return(all->device, &all->sessions[number].arenas);
}

int32_t answering_borrow(answering *all, int32_t number, const lent_arenas *arenas) {
    session *of = &all->sessions[number];
    if (!all->device || !of->endpoint) return 0;
    if (of->arenas.sends) device_return(all->device, &of->arenas);
    return device_borrow(all->device, arenas, (uint64_t)all->row_bytes, &of->arenas);
}

/* Whether a session lends these rows, and so many ahead of them. */
static int lends(const borrowed *arenas, int64_t first, int64_t ahead, int64_t count) {
    return first >= ahead && count <= arenas->rows && first <= arenas->rows - count;
}

int32_t answering_fetch(answering *all, int32_t number, int64_t first, int64_t count,
                        uint64_t rows) {
    const borrowed *arenas = &all->sessions[number].arenas;
    uint64_t row = (uint64_t)all->row_bytes;
    return lends(arenas, first, 0, count) &&
           device_fetch(all->device, arenas, (uint64_t)first * row, (uint64_t)count * row, rows);
}

int32_t answering_deliver(answering *all, int32_t number, int64_t first, int64_t count,
                          uint64_t rows) {
    const borrowed *arenas = &all->sessions[number].arenas;
    uint64_t row = (uint64_t)all->row_bytes;
    return lends(arenas, first, 0, count) &&
           device_deliver(all->device, arenas, (uint64_t)first * row, (uint64_t)count * row, rows);
}

/* ---- Dispatches. */

void answering_free(answering *all) {
    for (int32_t i = 0; all->sessions && i < SESSIONS; i++) answering_close(all, i);
    for (int32_t i = 0; all->works && i < MAX_IN_HAND; i++) free(all->works[i].rows);
    free(all->works);
    free(all->sessions);
    free(all->answerers);
    free(all->scratch);
    free(all);
}

static int64_t header_rows(const answering *all, uint64_t tag) {
    return IS_SEVERAL(tag) ? all->header_rows : 0;
}

/* How long a message with this header is; 0: that kind is not ours. */
static uint64_t length(const answering *all, uint64_t tag) {
    if (KIND(tag) == DISPATCH)
        return (uint64_t)((header_rows(all, tag) + ROWS(tag)) * all->row_bytes);
    return KIND(tag) == REFERENCE && all->sessions[SESSION(tag)].arenas.sends ? sizeof(int64_t) : 0;
}

static int regular(const answering *all, const arrival *found) {
    int64_t rows = ROWS(found->tag);
    return all->sessions[SESSION(found->tag)].endpoint &&
           all->answerers[EXPERT(found->tag)].mlp &&
           !(all->doubted && IS_SEVERAL(found->tag)) && rows > 0 && rows <= all->max_rows &&
           found->bytes == length(all, found->tag) &&
           (!all->device ||
            device_knows(all->device, all->answerers[EXPERT(found->tag)].replays->graphs,
                         header_rows(all, found->tag) + rows));
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

static void drop(answering *all, work *one) {
    if (all->device) device_give_back(all->device, one->slot);
    one->state = FREE;
    all->in_hand--;
}

static void finish(answering *all, work *one) {
    postbox_release(all->box, one->operation);
    drop(all, one);
}

static void count(answering *all, uint64_t tag, uint64_t microseconds) {
    answerer *expert = &all->answerers[EXPERT(tag)];
    expert->rows += (uint64_t)ROWS(tag);
    expert->microseconds += microseconds;
}

/* Of the experts that a slot's counts name, evenly. */
static void count_several(answering *all, uint64_t tag, const int32_t *counts_E,
                          uint64_t microseconds) {
    uint64_t named = 0;
    for (int32_t e = 0; e < all->num_experts; e++) named += counts_E[e] > 0;
    answerer *experts = &all->answerers[EXPERT(tag) - SEVERAL];
    for (int32_t e = 0; e < all->num_experts; e++)
        if (counts_E[e] > 0) {
            uint64_t share = microseconds / named--;
            microseconds -= share;
            experts[e].rows += (uint64_t)counts_E[e];
            experts[e].microseconds += share;
        }
}

/* Why the counts that several were computed by are refused; 0: they are not. */
static int32_t judge(const answering *all, const work *one) {
    const int32_t *counts_E = device_counts(all->device, one->slot);
    int64_t rows = 0;
    int unknown = 0;
    for (int32_t e = 0; e < all->num_experts; e++) {
        if (counts_E[e] < 0) return BAD_COUNTS;
        rows += counts_E[e];
        unknown |= counts_E[e] && !one->replays->here[e];
    }
    return rows != ROWS(one->tag) ? BAD_COUNTS : unknown ? UNKNOWN_EXPERT : 0;
}

static void reply(answering *all, work *one, uint64_t answers) {
    session *to = &all->sessions[SESSION(one->tag)];
    if (!to->endpoint) {
        drop(all, one);
        return;
    }
    one->state = SENDING;
    uint64_t bytes = KIND(one->tag) == REFERENCE ? 0 : (uint64_t)(ROWS(one->tag) * all->row_bytes);
    one->operation = postbox_send(all->box, to->endpoint, answers, bytes,
                                  REPLY_TAG(one->tag, to->reply_session));
    if (one->operation < 0)
        drop(all, one);
    else if (all->box->status[one->operation] != IN_PROGRESS)
        finish(all, one);
}

static void refuse(answering *all, work *one, int32_t refusal) {
    one->state = FAILED;
    one->refusal = refusal;
    all->failed++;
}

/* What failed once is not launched again: without graphs, its dispatches are not regular. */
static void fail(answering *all, work *one) {
    one->replays->graphs[one->slot] = NULL;
    refuse(all, one, DEVICE_FAILED);
}

static void launch(answering *all, work *one) {
    const borrowed *arenas = NULL;
    uint64_t offset = 0, bytes = (uint64_t)(ROWS(one->tag) * all->row_bytes);
    uint64_t header_bytes = (uint64_t)(one->header_rows * all->row_bytes);
    if (KIND(one->tag) == REFERENCE) {
        arenas = &all->sessions[SESSION(one->tag)].arenas;
        if (!lends(arenas, one->first, one->header_rows, ROWS(one->tag))) {
            refuse(all, one, MALFORMED);
            return;
        }
        offset = (uint64_t)(one->first * all->row_bytes);
    }
    if (!device_launch(all->device, one->slot, one->replays->graphs[one->slot], arenas, offset,
                       header_bytes, bytes)) {
        fail(all, one);
        return;
    }
    one->state = COMPUTING;
    one->next = NULL;
    if (all->computing++)
        all->newest->next = one;
    else
        all->oldest = one;
    all->newest = one;
}

/* Reply to what the device is done with: a stream computes in order. */
static void look_at_device(answering *all) {
    int32_t done;
    while (all->computing && (done = device_done(all->device, all->oldest->slot))) {
        work *one = all->oldest;
        all->oldest = one->next;
        all->computing--;
        all->last_progress_us = now_us();
        if (done < 0) {
            device_lose(all->device, one->slot);
            fail(all, one);
            continue;
        }
        uint64_t tag = one->tag;
        int32_t slot = one->slot, refusal = IS_SEVERAL(tag) ? judge(all, one) : 0;
        if (refusal) {
            refuse(all, one, refusal);
            continue;
        }
        reply(all, one,
              device_rows(all->device, slot) + (uint64_t)(one->header_rows * all->row_bytes));
        /* Last: nobody waits for it. */
        uint64_t microseconds = device_microseconds(all->device, slot);
        if (IS_SEVERAL(tag))
            count_several(all, tag, device_counts(all->device, slot), microseconds);
        else
            count(all, tag, microseconds);
    }
}

/* The rows are in: compute, and send them back. */
static void answer(answering *all, work *one) {
    postbox *box = all->box;
    if (box->status[one->operation] != DONE || !all->sessions[SESSION(one->tag)].endpoint) {
        /* Its gateway died, or left: nobody waits for this. */
        finish(all, one);
        return;
    }
    postbox_release(box, one->operation);
    if (all->device) {
        launch(all, one);
        return;
    }
    int64_t rows = ROWS(one->tag), began_us = now_us();
    float *answers = one->rows + one->capacity_rows * all->row_bytes / (int64_t)sizeof(float);
    gated_mlp_run(one->mlp, one->rows, answers, rows, all->scratch);
    count(all, one->tag, (uint64_t)(now_us() - began_us));
    reply(all, one, (uint64_t)answers);
}

/* The slot or memory that the message at the head of the queue needs; 0 when there is none. */
static int prepare(answering *all, work *one, const arrival *found) {
    one->tag = found->tag;
    one->header_rows = header_rows(all, found->tag);
    if (!all->device) {
        one->mlp = all->answerers[EXPERT(found->tag)].mlp;
        return make_room(all, one, ROWS(found->tag));
    }
    one->replays = all->answerers[EXPERT(found->tag)].replays;
    one->slot = device_take(all->device, one->replays->graphs,
                            one->header_rows + ROWS(found->tag));
    return one->slot >= 0;
}

/* Start on the message at the head of the queue, which was prepared for. */
static int take(answering *all, work *one, arrival *found) {
    uint64_t rows = all->device ? device_rows(all->device, one->slot) : (uint64_t)one->rows;
    if (KIND(found->tag) == REFERENCE) rows = (uint64_t)&one->first;
    postbox_probe(all->box, 1, found);
    one->operation = postbox_take(all->box, found->message, rows, found->bytes);
    if (one->operation < 0) {
        if (all->device) device_give_back(all->device, one->slot);
        return 0;
    }
    one->state = RECEIVING;
    all->in_hand++;
    if (all->box->status[one->operation] != IN_PROGRESS) answer(all, one);
    return 1;
}

/* Move on what is in hand; a free place, or NULL. */
static work *look_at_works(answering *all) {
    work *place = NULL;
    if (all->computing) look_at_device(all);
    int32_t left = all->in_hand;
    for (work *one = all->works; one < all->works + MAX_IN_HAND && (left || !place); one++) {
        if (one->state != FREE) {
            left--;
            if ((one->state == RECEIVING || one->state == SENDING) &&
                all->box->status[one->operation] != IN_PROGRESS)
                one->state == RECEIVING ? answer(all, one) : finish(all, one);
        }
        if (one->state == FREE && !place) place = one;
    }
    return place;
}

void answering_look(answering *all) { look_at_works(all); }

void answering_strand(answering *all, int64_t patience_us) {
    int64_t now = now_us();
    for (work *one = all->works; all->in_hand && one < all->works + MAX_IN_HAND; one++) {
        const session *from = &all->sessions[SESSION(one->tag)];
        /* A reference comes whole. */
        if (one->state != RECEIVING || KIND(one->tag) == REFERENCE || from->endpoint ||
            now - from->closed_us < patience_us)
            continue;
        if (all->device) device_lose(all->device, one->slot);
        one->rows = NULL;
        one->capacity_rows = 0;
        postbox_release(all->box, one->operation);
        one->state = FREE;
        all->in_hand--;
    }
}

uint64_t answering_next_failed(answering *all, int32_t *refusal) {
    if (!all->failed) return 0;
    work *one = all->works;
    while (one->state != FAILED) one++;
    all->failed--;
    *refusal = one->refusal;
    drop(all, one);
    return one->tag;
}

/* Give way once; 0 when somebody else wants to be looked at, or something has been in hand since a
 * second ago and the caller is to see whether that is as it should be. Sleep is not certain to come: what a
 * device computes ends without a sign, and a peer that was stopped amid a message leaves shared memory
 * in a state that UCX calls busy for as long as that lasts. */
static int give_way(answering *all, int64_t began_us, int64_t *idle_since_us, int64_t *looked_us,
                    int32_t spin_us, int32_t wake_fd) {
    int64_t now = now_us(), until_us = all->in_hand ? began_us + LOOK_AROUND_US : INT64_MAX;
    if (now >= until_us) return 0;
    if (now - *looked_us >= LOOK_US) {
        struct pollfd wake = {wake_fd, POLLIN, 0};
        if (poll(&wake, 1, 0) > 0) return 0;
        *looked_us = now;
    }
    if (all->computing) {
        *idle_since_us = now;
        sched_yield();
        return 1;
    }
    return postbox_idle(all->box, *idle_since_us, spin_us, until_us, wake_fd);
}

void answering_run(answering *all, int32_t spin_us, int32_t wake_fd) {
    postbox *box = all->box;
    int64_t began_us = now_us(), idle_since_us = began_us, looked_us = began_us;
    do {
        while (ucp_worker_progress(box->worker)) {}
        work *place;
        arrival found;
        while ((place = look_at_works(all)) && postbox_probe(box, 0, &found)) {
            if (!regular(all, &found)) return;
            if (!prepare(all, place, &found)) {
                if (!all->device) return;
                break; /* until one of its slots is free */
            }
            if (!take(all, place, &found)) return;
            all->last_progress_us = idle_since_us = now_us();
            ucp_worker_progress(box->worker);
        }
        if (box->attention || all->failed) return;
    } while (give_way(all, began_us, &idle_since_us, &looked_us, spin_us, wake_fd));
}
