/* Posting, polling and waiting without a Python object per message. One thread owns a postbox. */
#define _GNU_SOURCE
#include "native.h"

#include <poll.h>
#include <sched.h>
#include <stdlib.h>
#include <time.h>

enum { MAX_OPERATIONS = 1 << 16, NONE = -1 };
enum { NAP_AFTER_US = 100000, NAP_US = 1000, DOUBT_AFTER_US = 500000, DOUBT_EVERY_US = 100000 };

postbox *postbox_new(uint64_t worker) {
    postbox *box = calloc(1, sizeof *box);
    if (!box) return NULL;
    box->worker = (ucp_worker_h)worker;
    box->first_free = NONE;
    box->status = calloc(MAX_OPERATIONS, sizeof *box->status);
    box->ended_us = calloc(MAX_OPERATIONS, sizeof *box->ended_us);
    box->operations = calloc(MAX_OPERATIONS, sizeof *box->operations);
    if (!box->status || !box->ended_us || !box->operations ||
        ucp_worker_get_efd(box->worker, &box->event_fd) != UCS_OK) {
        postbox_free(box);
        return NULL;
    }
    return box;
}

void postbox_free(postbox *box) {
    free(box->status);
    free(box->ended_us);
    free(box->operations);
    free(box);
}

/* ---- Operations. */

static int32_t begin(postbox *box, uint64_t endpoint, uint64_t expected) {
    int32_t index = box->first_free;
    if (index != NONE) {
        box->first_free = box->operations[index].next_free;
        box->num_free--;
    } else if (box->num_operations < MAX_OPERATIONS)
        index = box->num_operations++;
    else
        return NONE;
    box->operations[index] = (operation){.box = box, .endpoint = endpoint, .expected = expected};
    box->status[index] = IN_PROGRESS;
    return index;
}

static void recycle(postbox *box, int32_t index) {
    box->operations[index].next_free = box->first_free;
    box->first_free = index;
    box->num_free++;
}

static void end(operation *posted, int32_t status) {
    postbox *box = posted->box;
    int32_t index = (int32_t)(posted - box->operations);
    posted->request = NULL;
    box->status[index] = status;
    box->ended_us[index] = now_us();
    if (posted->released) recycle(box, index);
}

static void end_receive(operation *posted, ucs_status_t status, uint64_t bytes) {
    end(posted, status == UCS_OK && bytes != posted->expected ? SHORT : (int32_t)status);
}

static void on_sent(void *request, ucs_status_t status, void *posted) {
    ucp_request_free(request);
    end(posted, (int32_t)status);
}

static void on_received(void *request, ucs_status_t status, const ucp_tag_recv_info_t *info,
                        void *posted) {
    uint64_t bytes = info->length;
    ucp_request_free(request);
    end_receive(posted, status, bytes);
}

/* What a posting call returned: done at once, failed at once, or a request to wait for. */
static void note(operation *posted, ucs_status_ptr_t request) {
    if (UCS_PTR_IS_PTR(request))
        posted->request = request;
    else
        end(posted, (int32_t)UCS_PTR_STATUS(request));
}

void postbox_release(postbox *box, int32_t index) {
    if (box->status[index] == IN_PROGRESS)
        box->operations[index].released = 1;
    else
        recycle(box, index);
}

void postbox_cancel(postbox *box, int32_t index) {
    if (box->operations[index].request)
        ucp_request_cancel(box->worker, box->operations[index].request);
}

void postbox_cancel_receives(postbox *box, uint64_t endpoint) {
    for (int32_t i = 0; i < box->num_operations; i++)
        if (box->operations[i].endpoint == endpoint) postbox_cancel(box, i);
}

void postbox_abandon(postbox *box) {
    for (int32_t i = 0; i < box->num_operations; i++)
        if (box->status[i] == IN_PROGRESS) end(&box->operations[i], UCS_ERR_CONNECTION_RESET);
}

/* ---- Posting. */

static void tell_where(ucp_request_param_t *param, uint64_t bytes, int32_t where) {
    if (bytes && where == ANYWHERE) return;
    param->op_attr_mask |= UCP_OP_ATTR_FIELD_MEMORY_TYPE;
    param->memory_type = UCS_MEMORY_TYPE_HOST;
}

int32_t postbox_send(postbox *box, uint64_t endpoint, uint64_t address, uint64_t bytes,
                     uint64_t tag, int32_t where) {
    int32_t index = begin(box, 0, 0);
    if (index == NONE) return NONE;
    operation *posted = &box->operations[index];
    ucp_request_param_t param = {
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA,
        .cb.send = on_sent,
        .user_data = posted,
    };
    tell_where(&param, bytes, where);
    note(posted, ucp_tag_send_nbx((ucp_ep_h)endpoint, (const void *)address, bytes, tag, &param));
    return index;
}

static ucp_request_param_t receiving(operation *posted, ucp_tag_recv_info_t *info) {
    /* UCX tells the length through `info` where the message was there already. */
    return (ucp_request_param_t){
        .op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA |
                        UCP_OP_ATTR_FIELD_RECV_INFO,
        .cb.recv = on_received,
        .user_data = posted,
        .recv_info.tag_info = info,
    };
}

static void note_receive(operation *posted, ucs_status_ptr_t request,
                         const ucp_tag_recv_info_t *info) {
    if (request == NULL)
        end_receive(posted, UCS_OK, info->length);
    else
        note(posted, request);
}

int32_t postbox_receive(postbox *box, uint64_t endpoint, uint64_t address, uint64_t bytes,
                        uint64_t tag) {
    int32_t index = begin(box, endpoint, bytes);
    if (index == NONE) return NONE;
    operation *posted = &box->operations[index];
    ucp_tag_recv_info_t info;
    ucp_request_param_t param = receiving(posted, &info);
    tell_where(&param, bytes, ANYWHERE);
    ucs_status_ptr_t request =
        ucp_tag_recv_nbx(box->worker, (void *)address, bytes, tag, UINT64_MAX, &param);
    note_receive(posted, request, &info);
    return index;
}

int32_t postbox_take(postbox *box, uint64_t message, uint64_t address, uint64_t bytes,
                     int32_t where) {
    int32_t index = begin(box, 0, bytes);
    if (index == NONE) return NONE;
    operation *posted = &box->operations[index];
    ucp_tag_recv_info_t info;
    ucp_request_param_t param = receiving(posted, &info);
    tell_where(&param, bytes, where);
    ucs_status_ptr_t request = ucp_tag_msg_recv_nbx(box->worker, (void *)address, bytes,
                                                    (ucp_tag_message_h)message, &param);
    note_receive(posted, request, &info);
    return index;
}

int32_t postbox_exchange(postbox *box, int32_t count, const round_trip *trips,
                         int32_t *operations) {
    if (MAX_OPERATIONS - box->num_operations + box->num_free < 2 * count) return NONE;
    for (int32_t i = 0; i < count; i++)
        operations[2 * i] = postbox_receive(box, trips[i].endpoint, trips[i].receive_address,
                                            trips[i].receive_bytes, trips[i].receive_tag);
    for (int32_t i = 0; i < count; i++)
        operations[2 * i + 1] = postbox_send(box, trips[i].endpoint, trips[i].send_address,
                                             trips[i].send_bytes, trips[i].send_tag,
                                             (int32_t)trips[i].send_where);
    return 0;
}

/* ---- Polling and waiting. */

int32_t postbox_progress(postbox *box) { return (int32_t)ucp_worker_progress(box->worker); }

int32_t postbox_probe(postbox *box, int32_t remove, arrival *found) {
    ucp_tag_recv_info_t info;
    ucp_tag_message_h message = ucp_tag_probe_nb(box->worker, 0, 0, remove, &info);
    if (!message) return 0;
    *found = (arrival){info.sender_tag, info.length, (uint64_t)message};
    return 1;
}

int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

int64_t now_us(void) { return now_ns() / 1000; }

int32_t postbox_arm(postbox *box) {
    if (ucp_worker_arm(box->worker) == UCS_OK) {
        box->busy_since_us = 0;
        box->calm_us = now_us();
        return 1;
    }
    if (!box->busy_since_us) box->busy_since_us = now_us();
    return 0;
}

/* UCX has work, it says. It also says so while a peer's queue is full, even for ever where the peer
 * died, and while one who began to write into ours does not end. */
static int32_t give_way_to_work(postbox *box, int64_t now, int64_t idle_since_us, int32_t wake_fd) {
    if (now - box->busy_since_us > DOUBT_AFTER_US && now - box->doubted_us > DOUBT_EVERY_US) {
        box->doubted_us = now;
        return 0;
    }
    if (now - idle_since_us < NAP_AFTER_US || now - box->busy_since_us < NAP_AFTER_US) {
        sched_yield();
        return 1;
    }
    struct pollfd wake = {wake_fd, POLLIN, 0};
    struct timespec nap = {0, NAP_US * 1000};
    return ppoll(&wake, 1, &nap, NULL) <= 0;
}

int32_t postbox_idle(postbox *box, int64_t idle_since_us, int32_t spin_us, int64_t until_us,
                     int32_t wake_fd) {
    int64_t now = now_us();
    if (now >= until_us) return 0;
    int spinning = now - idle_since_us < spin_us;
    if (!spinning || now - box->calm_us > DOUBT_EVERY_US)
        if (!postbox_arm(box)) return give_way_to_work(box, now, idle_since_us, wake_fd);
    if (spinning) {
        sched_yield();
        return 1;
    }
    struct pollfd fds[] = {{box->event_fd, POLLIN, 0}, {wake_fd, POLLIN, 0}};
    struct timespec left = {(until_us - now) / 1000000, (until_us - now) % 1000000 * 1000};
    int ready = ppoll(fds, 2, until_us == INT64_MAX ? NULL : &left, NULL);
    return ready > 0 && !fds[1].revents;
}

void postbox_wait(postbox *box, int32_t count, const int32_t *operations, int32_t spin_us,
                  int32_t timeout_us) {
    int64_t began_us = now_us();
    arrival found;
    int32_t done = 0;
    do {
        while (ucp_worker_progress(box->worker)) {}
        while (done < count && box->status[operations[done]] != IN_PROGRESS) done++;
        if (done == count || box->attention || postbox_probe(box, 0, &found)) return;
    } while (postbox_idle(box, began_us, spin_us, began_us + timeout_us, -1));
}

const char *status_text(int32_t status) { return ucs_status_string((ucs_status_t)status); }
