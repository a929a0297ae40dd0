/* What mesh/native/__init__.py calls by ctypes, and what these files share. */
#ifndef MESH_NATIVE_H
#define MESH_NATIVE_H

#include <stddef.h>
#include <stdint.h>
#include <ucp/api/ucp.h>

#define EXPORT __attribute__((visibility("default")))

/* ---- mlp.c: see mesh/mlp.py ---- */

typedef struct gated_mlp gated_mlp;

/* Copies the weights; NULL when there is no memory for that. */
EXPORT gated_mlp *gated_mlp_new(const float *gate_up_HD, const float *down_DH, int64_t hidden,
                                int64_t width);
EXPORT void gated_mlp_free(gated_mlp *mlp);
/* What gated_mlp_run needs beside its rows. */
EXPORT int64_t gated_mlp_scratch_floats(const gated_mlp *mlp, int64_t num_rows);
EXPORT void gated_mlp_run(const gated_mlp *mlp, const float *x_RD, float *y_RD, int64_t num_rows,
                          float *scratch);

/* ---- linear.c: see mesh/linear.py ---- */

typedef struct linear linear;

/* Copies the weights; NULL when there is no memory for that. */
EXPORT linear *linear_new(const float *weight_OI, int64_t outputs, int64_t inputs);
EXPORT void linear_free(linear *map);
/* y_RO = plus_RO + x_RI . weight_OI^T; plus_RO may be NULL. */
EXPORT void linear_run(const linear *map, const float *x_RI, const float *plus_RO, float *y_RO,
                       int64_t num_rows);

/* ---- layout.c: see gateway/layout.py ---- */

/* Row r of token r / per_token goes to arena row rows_R[r]: the next of those in_order_R that its
 * expert has, ids_R[r] < 1024. */
EXPORT void layout_scatter(const int64_t *ids_R, int64_t num_rows, int64_t per_token,
                           const int64_t *in_order_R, const char *x_TD, char *send_ND,
                           int64_t row_bytes, int64_t *rows_R);
/* y_TD: each token's arena rows by their weights, summed in order. */
EXPORT void layout_combine(const float *reply_ND, const int64_t *rows_TK, const float *weights_TK,
                           int64_t num_tokens, int64_t per_token, int64_t width, float *y_TD);

/* ---- norm.c: see gateway/model/norm.py ---- */

/* weight_HD has a row for each head; row r is one of head r % num_heads. */
EXPORT void rms_norm(const float *x_RD, int64_t num_rows, const float *weight_HD, int64_t num_heads,
                     int64_t width, float eps, float *y_RD);

/* ---- attention.c: see gateway/model/attention.py ---- */

typedef struct {
    const float *rows_SW;
    int64_t block_size, width, num_kv_heads, key_dim, value_dim, value_offset;
    float scale;
} paged;

/* out_BHV of sequences with one query each, over the positions first_B to end_B of their blocks.
 * Queries of a sequence lie q_stride floats from those of the one before; sinks_H may be NULL;
 * scores has room for every position of the longest. */
EXPORT void attend_pages(const paged *cache, const float *q_BHK, int64_t q_stride,
                         const int64_t *blocks_BN, int64_t max_blocks, const int64_t *first_B,
                         const int64_t *end_B, const float *sinks_H, int64_t num_sequences,
                         int64_t num_heads, float *scores, float *out_BHV);

/* ---- postbox.c: see mesh/transport/ucx.py ---- */

enum { DONE = 0, IN_PROGRESS = 1, SHORT = -1000 }; /* else a ucs_status_t, which is negative */

typedef struct postbox postbox;

typedef struct {
    postbox *box;
    ucs_status_ptr_t request; /* NULL once UCX is done with it */
    uint64_t endpoint;        /* of a receive: whose death ends it; else 0 */
    uint64_t expected;        /* of a receive: a message of any other length fails it */
    int32_t next_free;
    int32_t released;
} operation;

struct postbox {
    ucp_worker_h worker;
    int32_t event_fd;  /* UCX's */
    int32_t attention; /* set by whoever wants a wait to end: an endpoint died */
    int64_t busy_since_us; /* UCX has not let us sleep since then; 0: it did when last asked */
    int64_t calm_us;       /* when it last did */
    int64_t doubted_us;    /* when a wait last ended for that */
    int32_t num_operations;
    int32_t num_free; /* of those, in the list that starts with first_free */
    int32_t first_free;
    int32_t *status;   /* of each operation */
    int64_t *ended_us; /* when that stopped being IN_PROGRESS; CLOCK_MONOTONIC */
    operation *operations;
};

typedef struct {
    uint64_t endpoint, send_address, send_bytes, send_tag, receive_address, receive_bytes,
        receive_tag;
    uint64_t send_where; /* as below */
} round_trip;

typedef struct {
    uint64_t tag, bytes, message;
} arrival;

/* Where a buffer is. UCX asks the driver of a device about each of which it is not told. */
enum { ANYWHERE = 0, ON_HOST = 1 };

EXPORT postbox *postbox_new(uint64_t worker);
EXPORT void postbox_free(postbox *box);
/* An operation each, or -1 when there are too many. */
EXPORT int32_t postbox_send(postbox *box, uint64_t endpoint, uint64_t address, uint64_t bytes,
                            uint64_t tag, int32_t where);
EXPORT int32_t postbox_receive(postbox *box, uint64_t endpoint, uint64_t address, uint64_t bytes,
                               uint64_t tag);
EXPORT int32_t postbox_take(postbox *box, uint64_t message, uint64_t address, uint64_t bytes,
                            int32_t where);
/* All receives, then all sends: operations[2 i] and [2 i + 1]. 0, or -1 with nothing posted. */
EXPORT int32_t postbox_exchange(postbox *box, int32_t count, const round_trip *trips,
                                int32_t *operations);
EXPORT void postbox_cancel(postbox *box, int32_t operation);
EXPORT void postbox_cancel_receives(postbox *box, uint64_t endpoint);
/* What is in progress ends as failed. Only for a worker that is never progressed again. */
EXPORT void postbox_abandon(postbox *box);
/* The caller will not ask for this operation again; its number is used anew once it is done. */
EXPORT void postbox_release(postbox *box, int32_t operation);
EXPORT int32_t postbox_progress(postbox *box);
/* 1 when a message is there that no receive was posted for; `remove` takes it off the queue. */
EXPORT int32_t postbox_probe(postbox *box, int32_t remove, arrival *found);
EXPORT int64_t now_us(void); /* CLOCK_MONOTONIC */
int64_t now_ns(void);
/* 1 when it is safe to sleep until UCX's descriptor is readable. */
EXPORT int32_t postbox_arm(postbox *box);
/* Give way once: yield for the first spin_us of idleness, then sleep until UCX has work. 0 when
 * time is up (INT64_MAX: never), wake_fd (-1: none) has become readable, or UCX has not let us
 * sleep for so long that the owner should look into it. */
EXPORT int32_t postbox_idle(postbox *box, int64_t idle_since_us, int32_t spin_us, int64_t until_us,
                            int32_t wake_fd);
/* Returns when all operations are done, or anything else wants to be looked at, or time is up. */
EXPORT void postbox_wait(postbox *box, int32_t count, const int32_t *operations, int32_t spin_us,
                         int32_t timeout_us);
EXPORT const char *status_text(int32_t status);

/* ---- device.c: see mesh/replay.py ---- */

/* A slot is a buffer that graphs are captured for: RING of each size, of 1 << slot / RING rows. A
 * graph computes the first so many of those: all, or, of large buffers, what any of STEPS even steps
 * from half of them to all comes to. */
enum { RING = 4, SIZES = 14, SLOTS = RING * SIZES, STEPS = 16, STEPPED = 9, GRAPHS = SLOTS * STEPS };

typedef struct device device;

/* Memory of one process that another one on the same host may map. */
typedef struct {
    char handle[64]; /* CUipcMemHandle */
    uint64_t offset, bytes;
} lent;

/* What a gateway lends a worker (see gateway/lending.py): it reads rows and writes replies, while the
 * permit says what is wanted. */
typedef struct {
    lent sends, replies, permit;
    int64_t rows; /* of either arena */
    uint64_t wanted;
} lent_arenas;

/* The same, where it is mapped. */
typedef struct {
    uint64_t sends, replies, permit, wanted; /* sends: 0 when there is none */
    int64_t rows;
    uint64_t bases[3];
} borrowed;

enum { MAX_PARTS = 32 }; /* of a batch */

/* Bytes that a batch is computed from and answered to, where they are not in its slot already. */
typedef struct {
    uint64_t from, to;
    uint64_t header_bytes; /* ahead of `from`, which are brought too */
    uint64_t bytes, rows;
    uint64_t at; /* in the slot: of `from` */
    uint64_t permit, wanted;
} transfer;

/* How long the parts of a batch took on the device; all of it is computing where they were not beside
 * each other. */
typedef struct {
    uint32_t fetch_us, queued_us, compute_us, deliver_us;
} device_times;

/* A graph (CUgraphExec), and the launches that it begins and ends with (CUgraphNode), which move what
 * they are told; NULL: there is none. */
typedef struct {
    void *graph, *brings, *takes_away;
} captured;

/* NULL when there is no such driver, or it refuses. Graphs are launched on the stream (CUstream),
 * by the thread that has its context. */
EXPORT device *device_new(const char *path, uint64_t stream);
EXPORT void device_free(device *gpu);
/* The stream (CUstream) that what is delivered leaves on. */
EXPORT uint64_t device_out(const device *gpu);
/* A slot's rows; where on the host its graphs put the counts of several experts, and where on the
 * device they find where outputs are to be. */
EXPORT void device_lend(device *gpu, int32_t slot, uint64_t rows, uint64_t counts,
                        uint64_t deliveries);
/* Amid what is captured on the device's stream: a launch that moves what device_launch will say. NULL when
 * it failed. */
EXPORT void *device_capture(device *gpu);
uint64_t device_rows(const device *gpu, int32_t slot);
const int32_t *device_counts(const device *gpu, int32_t slot);
/* Whether any of these GRAPHS (by slot and step) fits so many rows, now or when one is free. */
int32_t device_knows(const device *gpu, const captured *const *graphs, int64_t rows);
/* A free slot with a graph for so many rows, and which that is; or -1. */
int32_t device_take(device *gpu, const captured *const *graphs, int64_t rows, int32_t *graph);
/* Which of a slot's graphs so many rows need, or -1. */
int32_t device_graph(const captured *const *graphs, int32_t slot, int64_t rows);
void device_give_back(device *gpu, int32_t slot);
/* Never use this slot again. */
void device_lose(device *gpu, int32_t slot);
enum {
    BESIDE = 1,   /* many rows, which come and go on streams of their own, beside what is computed before
                   * and after; others do by the graph's own launches, where it has those */
    DELIVERS = 2, /* the graph does, and is told where to */
    TIMED = 4,    /* as all that is BESIDE must be */
};
/* On what is in the slot, with what is brought there and taken away. 0 when it failed. */
int32_t device_launch(device *gpu, int32_t slot, const captured *of, const transfer *parts,
                      int32_t count, int32_t how);
/* The two ways alone, between what is lent and memory of our own, each on a stream of its own. The
 * device's stream waits for what is fetched; what is delivered was seen to be computed: behind the
 * device's stream it would wait for whatever is queued there by now. 0 when it failed. */
int32_t device_fetch(device *gpu, const borrowed *arenas, uint64_t offset, uint64_t bytes,
                     uint64_t rows);
int32_t device_deliver(device *gpu, const borrowed *arenas, uint64_t offset, uint64_t bytes,
                       uint64_t rows);
/* 1, or 0 while it computes; -1 when it failed. What is BESIDE leaves when this is asked for, or with the
 * next launch. */
int32_t device_done(device *gpu, int32_t slot);
/* Of a launch that is done and was timed. */
device_times device_took(device *gpu, int32_t slot);
/* Graphs that have no slot, behind each other; and as above, when all are done. */
int32_t device_launch_graphs(device *gpu, const uint64_t *graphs, int32_t count);
int32_t device_graph_done(device *gpu);
/* Lend this memory. 0 when its kind cannot be lent. */
EXPORT int32_t device_share(device *gpu, uint64_t address, uint64_t bytes, lent *out);
/* Map what is lent; 0, with nothing mapped, where that cannot be or it is not what it says. */
int32_t device_borrow(device *gpu, const lent_arenas *arenas, uint64_t row_bytes, borrowed *out);
/* Once nothing on the streams uses them. */
void device_return(device *gpu, borrowed *arenas);

/* ---- company.c ---- */

/* At what pace a gateway asks. Times are CLOCK_MONOTONIC. */
typedef struct {
    int64_t step_us, period_us; /* when its step began, and how long one takes; or 0 */
    int64_t since_us;           /* how long the one before took */
    int64_t layer_us;           /* from one layer to the next; 0: not known yet */
    int64_t came_us;            /* its last dispatch; 0: none yet */
    uint64_t batch;             /* what the one before that was computed in; 0: nothing */
    uint64_t layers, layers_before; /* masks of those that came, of its step and the one before */
    int32_t layer, waits, begins;   /* begins: with its last dispatch a step did */
} pace;

/* A dispatch for this layer has come, and waits; or it leaves, with a batch. */
EXPORT void company_came(pace *one, int32_t layer, int64_t now);
EXPORT void company_left(pace *one, uint64_t batch);
/* Until when to hold what one has sent, as long as nothing changes; 0: nobody is worth that. */
EXPORT int64_t company_until(const pace *one, const pace *const *others, int32_t count,
                             uint32_t expected_us, int64_t now);

/* ---- answering.c: see mesh/transport/base.py's Answering ---- */

/* What a device computes an expert by, or several of a layer together. */
typedef struct replays {
    const captured *graphs[GRAPHS]; /* by slot and step; NULL where there is none */
    uint32_t expected_us[SIZES * STEPS]; /* what those of a size and step took when last timed */
    uint8_t untimed[SIZES * STEPS];      /* how many of them were launched since then */
    uint8_t here[1 << 10]; /* of several: whether an expert of the layer is one of them */
    struct replays *doubled; /* of several: for twice as many messages, each in an equal part of a
                              * slot, that leave their counts behind each other; NULL: none */
} replays;

typedef struct {
    uint64_t endpoint; /* 0: no such session */
    uint64_t reply_session;
    int64_t closed_us; /* CLOCK_MONOTONIC */
    borrowed arenas;
    pace pace;
} session;

typedef struct {
    union { /* NULL: not one of ours */
        const gated_mlp *mlp;
        replays *replays; /* with a device */
    };
    uint64_t rows, microseconds;
} answerer;

typedef struct work work;

/* Dispatches that are computed together. */
typedef struct {
    work *works;
    replays *replays;
    int32_t slot, graph;
    int64_t rows;
    int64_t room;  /* rows of the slot that it needs, counts included */
    int32_t timed;
    int32_t parts; /* of several experts: the messages, each in its part of the slot */
} batch;

/* When a dispatch went through its stages, CLOCK_MONOTONIC. */
typedef struct {
    uint64_t tag;
    int64_t found_us, received_us, done_us, sent_us;
    device_times took;
} trail;

enum { UNDER_WAY = 2, MAX_COMPANY = 64 };

typedef struct {
    postbox *box;
    session *sessions;   /* by number */
    answerer *answerers; /* by layer << EXPERT_BITS | expert; SEVERAL is one more of each layer */
    work *works;
    float *scratch;
    int64_t scratch_floats;
    int32_t row_bytes, max_rows;
    int32_t num_experts, header_rows; /* counts of a layer, and the rows that they take */
    int32_t doubted; /* set by any thread: several experts may be others by now */
    int32_t in_hand;
    int32_t computing; /* of those, with the device: only asking tells when one ends */
    int32_t failed;    /* of those, for answering_next_failed */
    int64_t last_progress_us; /* CLOCK_MONOTONIC */
    device *device;           /* NULL: computed here */
    trail *trails;            /* NULL: nobody wants to know */
    int32_t max_trails, num_trails;
    const pace *paces[MAX_COMPANY]; /* of the open sessions, where those are so few */
    int32_t num_sessions;
    uint64_t batch;   /* counts those that were launched */
    uint32_t took_us; /* the last of those that are done */
    work *waiting, **waiting_end; /* of those computing: for their turn, in order */
    batch batches[UNDER_WAY];     /* the others, in order */
    int32_t num_batches;
    int64_t turned_us; /* when the device began with the first of them */
} answering;

EXPORT answering *answering_new(postbox *box, int32_t row_bytes, int32_t max_rows, device *device);
EXPORT void answering_free(answering *all);
EXPORT void answering_open(answering *all, int32_t number, uint64_t endpoint,
                           uint64_t reply_session);
EXPORT void answering_close(answering *all, int32_t number);
/* Take dispatches of this session by reference. 0 when what it lends cannot be reached. */
EXPORT int32_t answering_borrow(answering *all, int32_t number, const lent_arenas *arenas);
/* For what is not regular: bring `count` rows of a session's arena here, or answer them from here.
 * 0 when they are outside, or it failed. */
EXPORT int32_t answering_fetch(answering *all, int32_t number, int64_t first, int64_t count,
                               uint64_t rows);
EXPORT int32_t answering_deliver(answering *all, int32_t number, int64_t first, int64_t count,
                                 uint64_t rows);
/* Keep so many trails from here on, until they are taken (num_trails = 0). 0 without memory. */
EXPORT int32_t answering_trace(answering *all, int32_t max_trails);
/* Bring what is in hand forward; take nothing new. */
EXPORT void answering_look(answering *all);
/* Give up what a session that was closed so long ago has sent in part: UCX waits for the rest for
 * ever, and may write it, so that its memory is never used again. */
EXPORT void answering_strand(answering *all, int64_t patience_us);
/* The tag of a dispatch that was taken and cannot be answered, which the caller refuses for this
 * reason; 0: no more. */
EXPORT uint64_t answering_next_failed(answering *all, int32_t *refusal);
/* Answer what is regular; returns when something else wants to be looked at, wake_fd included, or
 * something has been in hand for a second. */
EXPORT void answering_run(answering *all, int32_t spin_us, int32_t wake_fd);

/* ---- asking.c: see mesh/transport/base.py's Asking ---- */

enum { MAX_ASKS = 1 << 10 };

typedef struct { /* one peer's part of a layer */
    uint64_t endpoint;
    uint64_t send_tag, reply_tag; /* but for kind, expert and rows */
    uint64_t rows, replies;       /* addresses of its first row in either arena */
    int64_t first;                /* the number of that row: all that is sent by reference */
    uint64_t header_bytes;        /* ahead of that, where rows are of several experts */
    int32_t capacity;             /* rows */
    int32_t by_reference;
    int32_t several; /* its worker holds some, which it computes together: also where one alone has rows */
    /* Of the last time. */
    int32_t num_rows, num_experts, expert; /* the last of these experts */
    int32_t received, sent;                /* operations, where there are rows */
    int64_t ended_us;
} ask;

typedef struct { /* a layer of a micro-batch */
    const int32_t *counts_E; /* rows of each expert: the device writes them */
    const int32_t *groups_E; /* whose ask each expert is in; -1: nobody's */
    uint64_t *totals_E;      /* rows that were sent */
    ask *asks;
    uint64_t row_bytes;
    int32_t num_experts, num_asks;
    int64_t sent_us;
    int64_t posted_ns; /* what posting took, all times together */
} seat;

typedef struct {
    postbox *box;
    device *device;
    round_trip *trips;
    int32_t *operations;
} asking;

EXPORT asking *asking_new(postbox *box, device *device);
EXPORT void asking_free(asking *all);
/* Launch graphs (CUgraphExec; none: they were launched before) and post what the last has made: 1, or
 * 0 with nothing posted where that does not fit the seat's asks, or -1 when the device failed. With no
 * seat they are only launched. */
EXPORT int32_t asking_leave(asking *all, seat *one, const uint64_t *graphs, int32_t count);
/* 1 when all is back, its operations released. 0 with none released when something failed, or
 * anything else wants to be looked at, or time is up. With graphs, asking_leave for the next seat
 * follows at once when all is back: 2 if that went well, -1 when the device failed. */
EXPORT int32_t asking_wait(asking *all, seat *one, int32_t spin_us, int32_t timeout_us, seat *next,
                           const uint64_t *graphs, int32_t count);

#endif
