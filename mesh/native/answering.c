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
enum { MAX_MERGED = MAX_PARTS, AHEAD_US = 30, TIMED_EVERY = 16 };

#define KIND(tag) ((tag) >> 60)
#define SESSION(tag) ((tag) >> 44 & 0xFFFF)
#define EXPERT(tag) ((tag) >> 16 & 0xFFFFF)
#define IS_SEVERAL(tag) (((tag) >> 16 & SEVERAL) == SEVERAL)
#define ROWS(tag) ((int64_t)((tag) & 0xFFFF))
/* Fewer are of sequences that decode: several times as many, where each token has several experts. */
#define MANY_ROWS(tag) (IS_SEVERAL(tag) ? 1024 : 256)
#define REPLY_TAG(tag, reply_session) \
    ((uint64_t)REPLY << 60 | (reply_session) << 44 | ((tag) & 0xFFFFFFFFFFFULL))

/* One dispatch in hand. On the host its rows come in behind each other, and go out from the second
 * half; with a device they come into a slot of their own, or by reference stay where they are, and the
 * batch that it is in may have another one. */
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
    int32_t slot;        /* its own; -1: none */
    int32_t refusal;     /* why it has failed */
    work *next;          /* to wait for its turn, or of the same batch */
    trail trail;
};

answering *answering_new(postbox *box, int32_t row_bytes, int32_t max_rows, device *device) {
    answering *all = calloc(1, sizeof *all);
    if (!all) return NULL;
    all->box = box;
    all->device = device;
    all->row_bytes = row_bytes;
    all->max_rows = max_rows;
    all->waiting_end = &all->waiting;
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

static void refuse(answering *all, work *one, int32_t refusal) {
    one->state = FAILED;
    one->refusal = refusal;
    all->failed++;
}

static void find_end(answering *all) {
    all->waiting_end = &all->waiting;
    while (*all->waiting_end) all->waiting_end = &(*all->waiting_end)->next;
}

/* ---- Sessions. */

void answering_open(answering *all, int32_t number, uint64_t endpoint, uint64_t reply_session) {
    answering_close(all, number);
    session *opened = &all->sessions[number];
    opened->endpoint = endpoint;
    opened->reply_session = reply_session;
    opened->pace = (pace){0};
    if (all->num_sessions < MAX_COMPANY) all->paces[all->num_sessions] = &opened->pace;
    all->num_sessions++;
}

static void forget_pace(answering *all, const pace *closed) {
    int32_t known = all->num_sessions < MAX_COMPANY ? all->num_sessions : MAX_COMPANY;
    for (int32_t i = 0; i < known; i++)
        if (all->paces[i] == closed) all->paces[i] = all->paces[known - 1];
}

void answering_close(answering *all, int32_t number) {
    if (!all->sessions[number].endpoint) return;
    all->sessions[number].endpoint = 0;
    forget_pace(all, &all->sessions[number].pace);
    all->num_sessions--;
    all->sessions[number].closed_us = now_us();
    if (all->sessions[number].arenas.sends) device_return(all->device, &all->sessions[number].arenas);
}

int32_t answering_borrow(answering *all, int32_t number, const lent_arenas *arenas) {
    session *of = &all->sessions[number];
    if (!all->device || !of->endpoint) return 0;
    /* What waits was said of the arenas before. */
    for (work **link = &all->waiting; *link;) {
        work *one = *link;
        if (SESSION(one->tag) != (uint64_t)number || KIND(one->tag) != REFERENCE) {
            link = &one->next;
            continue;
        }
        *link = one->next;
        all->computing--;
        refuse(all, one, MALFORMED);
    }
    find_end(all);
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
    free(all->trails);
    free(all);
}

int32_t answering_trace(answering *all, int32_t max_trails) {
    free(all->trails);
    all->trails = calloc((size_t)max_trails, sizeof *all->trails);
    all->num_trails = 0;
    all->max_trails = all->trails ? max_trails : 0;
    return all->trails != NULL;
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
    if (all->device && one->slot >= 0) device_give_back(all->device, one->slot);
    one->state = FREE;
    all->in_hand--;
}

static void finish(answering *all, work *one) {
    postbox_release(all->box, one->operation);
    if (all->num_trails < all->max_trails && one->state == SENDING) {
        one->trail.sent_us = now_us();
        all->trails[all->num_trails++] = one->trail;
    }
    drop(all, one);
}

static void count(answering *all, uint64_t tag, int64_t rows, uint64_t microseconds) {
    answerer *expert = &all->answerers[EXPERT(tag)];
    expert->rows += (uint64_t)rows;
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

/* Why the counts that a message was computed by are refused; 0: they are not. */
static int32_t judge(const answering *all, const work *one, const int32_t *counts_E) {
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
                                  REPLY_TAG(one->tag, to->reply_session), ANYWHERE);
    if (one->operation < 0)
        drop(all, one);
    else if (all->box->status[one->operation] != IN_PROGRESS && !all->trails)
        finish(all, one); /* else when its trail is whole */
}

static void refuse_all(answering *all, const batch *one, int32_t refusal) {
    for (work *of = one->works; of; of = of->next) refuse(all, of, refusal);
}

/* What failed once is not launched again: without graphs, its dispatches are not regular. */
static void fail(answering *all, const batch *one) {
    one->replays->graphs[one->graph] = NULL;
    refuse_all(all, one, DEVICE_FAILED);
}

/* ---- With a device: what is computed when, and together with what. */

static int32_t num_works(const batch *one) {
    int32_t count = 0;
    for (const work *of = one->works; of; of = of->next) count++;
    return count;
}

static int32_t size_and_step(const batch *one) {
    return one->slot / RING * STEPS + one->graph % STEPS;
}

/* What graphs of its size and step took when last timed. */
static uint32_t *expected_us(const batch *one) {
    return &one->replays->expected_us[size_and_step(one)];
}

/* Whether it is its turn to be timed: of those that are alike few are, as two events with a time take
 * 1 us of 10. */
static int timed_in_turn(const answering *all, const batch *one) {
    uint8_t *untimed = &one->replays->untimed[size_and_step(one)];
    int timed = all->trails || !*expected_us(one) || *untimed >= TIMED_EVERY - 1;
    *untimed = timed ? 0 : *untimed + 1;
    return timed;
}

static void give_back(answering *all, const batch *one) {
    if (one->slot != one->works->slot) device_give_back(all->device, one->slot);
}

/* 1 when it is time: what is launched while the device computes is merged with nothing that comes
 * until it is done, and comes too late when that is. One gateway alone sends nothing to merge. */
static int time_has_come(const answering *all) {
    if (!all->num_batches || all->num_batches == UNDER_WAY) return !all->num_batches;
    return all->num_sessions < 2 ||
           now_us() >= all->turned_us + *expected_us(&all->batches[0]) - AHEAD_US;
}

/* Whether a dispatch can be computed still. */
static int stands(const answering *all, const work *one) {
    const session *from = &all->sessions[SESSION(one->tag)];
    return from->endpoint &&
           (KIND(one->tag) != REFERENCE ||
            lends(&from->arenas, one->first, one->header_rows, ROWS(one->tag)));
}

/* The same; what cannot is done with. */
static int stands_or_falls(answering *all, work *one) {
    if (stands(all, one)) return 1;
    all->computing--;
    if (all->sessions[SESSION(one->tag)].endpoint)
        refuse(all, one, MALFORMED);
    else
        drop(all, one); /* its gateway died, or left */
    return 0;
}

/* Whether to wait for others in step with its gateway. */
static int held(const answering *all, const work *one, int64_t now) {
    if (all->num_sessions < 2 || all->num_sessions > MAX_COMPANY ||
        ROWS(one->tag) >= MANY_ROWS(one->tag))
        return 0;
    return now < company_until(&all->sessions[SESSION(one->tag)].pace, all->paces,
                               all->num_sessions, all->took_us, now);
}

/* The same of all that it would be computed with. */
static int group_held(const answering *all, const work *one, int64_t now) {
    for (const work *other = all->waiting; other; other = other->next)
        if (EXPERT(other->tag) == EXPERT(one->tag) && held(all, other, now)) return 1;
    return 0;
}

/* Take the one here off those that wait, to the end of a batch. */
static void take_along(answering *all, batch *taken, work ***end, work **link) {
    work *one = *link;
    *link = one->next;
    one->next = NULL;
    if (!stands_or_falls(all, one)) return;
    taken->rows += ROWS(one->tag);
    **end = one;
    *end = &one->next;
}

static int is_alike(const work *one, const work *other) {
    return EXPERT(one->tag) == EXPERT(other->tag) && one->replays == other->replays;
}

/* All that waits for the same expert, as far as a graph holds it. */
static void join(answering *all, batch *taken, work **end) {
    const work *first = taken->works;
    int32_t left = MAX_MERGED - 1;
    for (work **link = &all->waiting; *link && left;) {
        if (is_alike(*link, first) &&
            device_knows(all->device, taken->replays->graphs, taken->rows + ROWS((*link)->tag))) {
            take_along(all, taken, &end, link);
            left--;
        } else
            link = &(*link)->next;
    }
    taken->room = taken->rows;
}

/* Messages for several experts, which keep their counts: as many as graphs take at once, one or two
 * or four..., the longest of which says how long each one's part is. */
static void join_several(answering *all, batch *taken, work **end) {
    const work *first = taken->works;
    int64_t longest = taken->room;
    int32_t count = 1;
    for (const work *one = all->waiting; one && taken->replays->doubled; one = one->next) {
        if (!is_alike(one, first) || !stands(all, one)) continue;
        int64_t rows = one->header_rows + ROWS(one->tag);
        longest = rows > longest ? rows : longest;
        if (++count < 2 * taken->parts) continue;
        if (!device_knows(all->device, taken->replays->doubled->graphs, count * longest)) break;
        taken->replays = taken->replays->doubled;
        taken->parts = count;
        taken->room = count * longest;
    }
    int32_t left = taken->parts - 1;
    for (work **link = &all->waiting; left;) {
        if (is_alike(*link, first) && stands(all, *link)) {
            take_along(all, taken, &end, link);
            left--;
        } else
            link = &(*link)->next;
    }
}

typedef enum { WITH_OTHERS, IN_ITS_SLOT } manner;

/* What has waited the longest and is not held, and all that may be computed with it; or, IN_ITS_SLOT,
 * what has waited there the longest, alone. */
static batch next_batch(answering *all, manner how) {
    int64_t now = now_us();
    batch taken = {.parts = 1};
    work **end = &taken.works, **link = &all->waiting;
    while (*link && (how == IN_ITS_SLOT ? (*link)->slot < 0 : group_held(all, *link, now)))
        link = &(*link)->next;
    if (*link) {
        taken.replays = (*link)->replays;
        taken.room = (*link)->header_rows + ROWS((*link)->tag);
        take_along(all, &taken, &end, link);
    }
    if (taken.works && how == WITH_OTHERS)
        (IS_SEVERAL(taken.works->tag) ? join_several : join)(all, &taken, end);
    find_end(all);
    return taken;
}

/* Where in a slot of its own the rows of a dispatch are, behind their header. */
static uint64_t own_rows(const answering *all, const work *one) {
    return device_rows(all->device, one->slot) + (uint64_t)(one->header_rows * all->row_bytes);
}

static transfer transfer_of(const answering *all, const work *one, int64_t at) {
    uint64_t row = (uint64_t)all->row_bytes, header = (uint64_t)one->header_rows * row;
    transfer part = {.header_bytes = header,
                     .bytes = (uint64_t)ROWS(one->tag) * row,
                     .rows = (uint64_t)ROWS(one->tag),
                     .at = (uint64_t)at * row + header};
    if (KIND(one->tag) == REFERENCE) {
        const borrowed *arenas = &all->sessions[SESSION(one->tag)].arenas;
        part.from = arenas->sends + (uint64_t)one->first * row;
        part.to = arenas->replies + (uint64_t)one->first * row;
        part.permit = arenas->permit;
        part.wanted = arenas->wanted;
    } else
        part.from = part.to = own_rows(all, one);
    return part;
}

/* A slot and a graph for a batch. What came into a slot of its own is computed there, unless it is
 * one of several. NEVER: what was there when it came has failed since. */
static enum { FOUND, LATER, NEVER } find_room(answering *all, batch *one) {
    const work *first = one->works;
    const captured *const *graphs = one->replays->graphs;
    if (!first->next && first->slot >= 0) {
        one->slot = first->slot;
        one->graph = device_graph(graphs, first->slot, one->room);
        return one->graph >= 0 ? FOUND : NEVER;
    }
    one->slot = device_take(all->device, graphs, one->room, &one->graph);
    return one->slot >= 0 ? FOUND : device_knows(all->device, graphs, one->room) ? LATER : NEVER;
}

static void put_back(answering *all, const batch *one) {
    work **end = &all->waiting, *rest = all->waiting;
    *end = one->works;
    while (*end) end = &(*end)->next;
    *end = rest;
    find_end(all);
}

static void wait_for_turn(answering *all, work *one) {
    one->state = COMPUTING;
    one->next = NULL;
    *all->waiting_end = one;
    all->waiting_end = &one->next;
    all->computing++;
    if (ROWS(one->tag) < MANY_ROWS(one->tag))
        company_came(&all->sessions[SESSION(one->tag)].pace, (int32_t)(EXPERT(one->tag) / EXPERTS),
                     one->trail.received_us);
}

static void launch_waiting(answering *all) {
    while (all->waiting && time_has_come(all)) {
        transfer parts[MAX_MERGED];
        int32_t count = 0;
        int64_t at = 0;
        batch one = next_batch(all, WITH_OTHERS);
        if (!one.works) return;
        int room = find_room(all, &one);
        if (room == LATER) {
            put_back(all, &one);
            if (all->num_batches) return;
            /* Nothing is under way that will make room: who leaves his slot may. */
            one = next_batch(all, IN_ITS_SLOT);
            if (!one.works) return;
            room = find_room(all, &one);
        }
        if (room == NEVER) {
            all->computing -= num_works(&one);
            refuse_all(all, &one, DEVICE_FAILED);
            continue;
        }
        int64_t launched_us = now_us(), part_rows = (1LL << one.slot / RING) / one.parts;
        uint64_t tag = one.works->tag;
        all->batch++;
        for (work *of = one.works; of; of = of->next) {
            company_left(&all->sessions[SESSION(of->tag)].pace, all->batch);
            if (of->slot != one.slot || IS_SEVERAL(tag)) parts[count++] = transfer_of(all, of, at);
            at += IS_SEVERAL(tag) ? part_rows : ROWS(of->tag);
        }
        int32_t how = IS_SEVERAL(tag) ? DELIVERS : 0;
        if (count && one.rows >= MANY_ROWS(tag))
            how |= BESIDE | TIMED;
        else if (timed_in_turn(all, &one))
            how |= TIMED;
        one.timed = how & TIMED;
        if (!device_launch(all->device, one.slot, one.replays->graphs[one.graph], parts, count, how)) {
            all->computing -= num_works(&one);
            give_back(all, &one);
            fail(all, &one);
            return;
        }
        if (!all->num_batches) all->turned_us = launched_us;
        all->batches[all->num_batches++] = one;
    }
}

/* Reply to what the device is done with: it computes in order. */
static void look_at_device(answering *all) {
    int32_t done;
    while (all->num_batches && (done = device_done(all->device, all->batches[0].slot))) {
        batch one = all->batches[0];
        for (int32_t i = 1; i < all->num_batches; i++) all->batches[i - 1] = all->batches[i];
        all->num_batches--;
        all->computing -= num_works(&one);
        all->turned_us = all->last_progress_us = now_us();
        give_back(all, &one);
        if (done < 0) {
            device_lose(all->device, one.slot);
            fail(all, &one);
            continue;
        }
        uint64_t tag = one.works->tag;
        const int32_t *counts_E = device_counts(all->device, one.slot);
        for (work *of = one.works; of; of = of->next) {
            int32_t refusal = IS_SEVERAL(tag) ? judge(all, of, counts_E) : 0;
            counts_E += all->num_experts;
            of->trail.done_us = all->turned_us;
            if (refusal)
                refuse(all, of, refusal);
            else
                reply(all, of, of->slot < 0 ? 0 : own_rows(all, of));
        }
        device_times took = {.compute_us = *expected_us(&one)};
        if (one.timed) took = device_took(all->device, one.slot); /* last: nobody waits for it */
        *expected_us(&one) = all->took_us = took.compute_us;
        if (!IS_SEVERAL(tag)) count(all, tag, one.rows, took.compute_us);
        counts_E = device_counts(all->device, one.slot);
        for (work *of = one.works; of; of = of->next) {
            of->trail.took = took;
            if (IS_SEVERAL(tag) && of->state != FAILED)
                count_several(all, tag, counts_E, took.compute_us / (uint32_t)one.parts);
            counts_E += all->num_experts;
        }
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
    one->trail.received_us = now_us();
    if (all->device) {
        wait_for_turn(all, one);
        return;
    }
    int64_t rows = ROWS(one->tag), began_us = one->trail.received_us;
    float *answers = one->rows + one->capacity_rows * all->row_bytes / (int64_t)sizeof(float);
    gated_mlp_run(one->mlp, one->rows, answers, rows, all->scratch);
    one->trail.done_us = now_us();
    one->trail.took.compute_us = (uint32_t)(one->trail.done_us - began_us);
    count(all, one->tag, rows, one->trail.took.compute_us);
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
    one->slot = -1;
    if (KIND(found->tag) == REFERENCE) return 1;
    int32_t graph;
    one->slot = device_take(all->device, one->replays->graphs,
                            one->header_rows + ROWS(found->tag), &graph);
    return one->slot >= 0;
}

/* Start on the message at the head of the queue, which was prepared for. */
static int take(answering *all, work *one, arrival *found) {
    uint64_t rows = KIND(found->tag) == REFERENCE ? (uint64_t)&one->first
                    : all->device                 ? device_rows(all->device, one->slot)
                                                  : (uint64_t)one->rows;
    one->trail = (trail){.tag = found->tag, .found_us = now_us()};
    postbox_probe(all->box, 1, found);
    one->operation = postbox_take(all->box, found->message, rows, found->bytes,
                                  KIND(found->tag) == REFERENCE ? ON_HOST : ANYWHERE);
    if (one->operation < 0) {
        if (all->device && one->slot >= 0) device_give_back(all->device, one->slot);
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

void answering_look(answering *all) {
    look_at_works(all);
    launch_waiting(all);
}

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

/* Take what has come; 0 when what comes next is not regular. */
static int take_all(answering *all, int64_t *idle_since_us) {
    work *place;
    arrival found;
    while ((place = look_at_works(all)) && postbox_probe(all->box, 0, &found)) {
        if (!regular(all, &found)) return 0;
        /* With a device: until one of its slots is free. */
        if (!prepare(all, place, &found)) return all->device != NULL;
        if (!take(all, place, &found)) return 0;
        all->last_progress_us = *idle_since_us = now_us();
        ucp_worker_progress(all->box->worker);
    }
    return 1;
}

void answering_run(answering *all, int32_t spin_us, int32_t wake_fd) {
    postbox *box = all->box;
    int64_t began_us = now_us(), idle_since_us = began_us, looked_us = began_us;
    do {
        while (ucp_worker_progress(box->worker)) {}
        int all_taken = take_all(all, &idle_since_us);
        launch_waiting(all);
        if (!all_taken || box->attention || all->failed) return;
    } while (give_way(all, began_us, &idle_since_us, &looked_us, spin_us, wake_fd));
}
