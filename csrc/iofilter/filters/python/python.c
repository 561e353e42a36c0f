/* Hands requests to a Python class in a process of its own: slow, and safe.
 *
 * Theory of operation
 * -------------------
 *     CONNECTED --the socket ends, a wrong message, an answer that took longer than timeout_ms--> BROKEN --each second: connect--> CONNECTED
 *
 * A request becomes a *call* (python.h): its message waits in a queue until the socket takes it, and the call until an answer with its id comes.
 * When the connection breaks, all calls end with EIO, at once; and so do requests until it is there again. Nothing ever waits for Python for
 * longer than timeout_ms. The reason stands in the log, once for each time that it breaks.
 *
 * A write's data is copied before Python sees it, and what is written afterwards is that copy, or what Python sent. What Python answers is not
 * trusted: ids, verbs and lengths are checked.
 *
 * Bounds: CALLS calls and BYTES of data under way (one call more than that is let through, so that a long one is served); others wait.
 */
#include "python.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "../all.h"

#define CALLS 256
#define BYTES (16u << 20)
#define RECONNECT_NS 1000000000u

struct call {
    struct pv_link link; /* calls */
    struct pv_link out;  /* to be sent */
    struct python *self;
    struct pv_io *io;
    struct pv_py_message message;
    uint8_t *data; /* length bytes: a write's, or what was read below; NULL: none */
    struct iovec iov;
    uint64_t sent, deadline_ns;
    bool below, told; /* below: it is downstream; told: its result was sent to Python */
};

struct python {
    struct pv_filter filter;
    struct pv_event event;
    struct pv_timer timer;
    struct sockaddr_un address;
    uint64_t timeout_ns, next_id, bytes;
    unsigned count;
    int fd; /* -1: broken */
    bool writable_asked;
    struct pv_link calls, out, waiting; /* struct call by link; by out; struct pv_io */
    struct pv_py_message head;          /* of the message that is being received */
    uint64_t received;                  /* bytes of head and data */
    uint8_t *body;
    uint64_t requests, failures, broken;
};

static const char *const names[] = {"socket", "timeout_ms", NULL};

static void break_off(struct python *self, const char *why);
static void admit(struct python *self);

static struct pv_loop *loop_of(struct python *self)
{
    return self->filter.instance->loop;
}

/* ---- calls ---- */

static struct call *find(struct python *self, uint64_t id)
{
    for (struct pv_link *link = self->calls.next; link != &self->calls; link = link->next) {
        struct call *call = pv_member(link, struct call, link);

        if (call->message.id == id)
            return call;
    }
    return NULL;
}

static bool has_data(const struct pv_io *io)
{
    return io->type <= PV_IO_WRITE;
}

static struct pv_io *drop(struct call *call)
{
    struct python *self = call->self;
    struct pv_io *io = call->io;

    pv_list_remove(&call->link);
    pv_list_remove(&call->out);
    self->count--;
    self->bytes -= has_data(io) ? io->length : 0;
    free(call->data);
    free(call);
    return io;
}

static void end_call(struct call *call, int error)
{
    struct python *self = call->self;

    pv_add(&self->failures, error != 0);
    pv_io_end(drop(call), error);
}

/* The soonest of the times by which Python must have answered; UINT64_MAX: it owes nothing. What is downstream it does not owe. */
static uint64_t next_deadline(const struct python *self)
{
    uint64_t soonest = UINT64_MAX;

    for (const struct pv_link *link = self->calls.next; link != &self->calls; link = link->next) {
        const struct call *call = pv_member(link, struct call, link);

        if (!call->below && call->deadline_ns < soonest)
            soonest = call->deadline_ns;
    }
    return soonest;
}

/* An armed timer comes no later than the next deadline: it looks and arms itself again. */
static void arm(struct python *self)
{
    if (!pv_linked(&self->timer.link))
        pv_loop_arm(loop_of(self), &self->timer, pv_loop_clock_ns() + (self->fd < 0 ? RECONNECT_NS : self->timeout_ns));
}

/* ---- sending ---- */

static void watch_for(struct python *self, bool writable)
{
    int err;

    if (self->writable_asked == writable)
        return;
    self->writable_asked = writable;
    pv_loop_rewatch(loop_of(self), self->fd, EPOLLIN | (writable ? EPOLLOUT : 0), &self->event, &err);
}

static uint64_t message_size(const struct call *call)
{
    return sizeof call->message + call->message.data;
}

/* As much as the socket takes; false: it is broken. */
static bool send_some(struct python *self, struct call *call)
{
    struct iovec iov[2] = {{&call->message, sizeof call->message}, {call->data, call->message.data}}, rest[2];
    struct msghdr message = {.msg_iov = rest};
    ssize_t sent;

    message.msg_iovlen = pv_iov_cut(iov, 2, call->sent, message_size(call) - call->sent, rest, 2);
    sent = sendmsg(self->fd, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (sent > 0)
        call->sent += (uint64_t)sent;
    return sent > 0 || errno == EAGAIN || errno == EINTR;
}

static void flush_out(struct python *self)
{
    while (self->fd >= 0 && !pv_list_empty(&self->out)) {
        struct call *call = pv_member(self->out.next, struct call, out);
        uint64_t before = call->sent;

        if (!send_some(self, call)) {
            break_off(self, strerror(errno));
            return;
        }
        if (call->sent < message_size(call)) {
            if (call->sent == before)
                break;
            continue;
        }
        pv_list_remove(&call->out);
    }
    if (self->fd >= 0)
        watch_for(self, !pv_list_empty(&self->out));
}

static void send_call(struct call *call, uint32_t verb, int error, uint64_t data)
{
    struct pv_io *io = call->io;

    call->message = (struct pv_py_message){.magic = PV_PY_MAGIC, .verb = verb, .id = call->message.id, .offset = io->offset,
        .length = io->length, .type = io->type, .flags = io->flags, .error = (uint32_t)error, .data = (uint32_t)data};
    call->sent = 0;
    pv_list_append(&call->self->out, &call->out);
}

/* ---- downstream for Python ---- */

static void below_done(struct pv_io *child)
{
    struct call *call = child->owner;
    struct python *self = call->self;
    int error = child->error;

    pv_child_free(&self->filter, child);
    call->below = false;
    if (self->fd < 0) { /* it broke meanwhile */
        end_call(call, EIO);
        return;
    }
    call->told = true;
    call->deadline_ns = pv_loop_clock_ns() + self->timeout_ns;
    arm(self);
    send_call(call, PV_PY_RESULT, error, !error && call->io->type == PV_IO_READ ? call->io->length : 0);
    flush_out(self);
}

static void send_below(struct call *call)
{
    struct pv_io *io = call->io, *child = pv_io_child(&call->self->filter, io);

    if (!child) {
        end_call(call, ENOMEM);
        return;
    }
    child->type = io->type;
    child->flags = io->flags;
    child->offset = io->offset;
    child->length = io->length;
    if (call->data) {
        call->iov = (struct iovec){call->data, io->length};
        child->iov = &call->iov;
        child->iov_count = 1;
    }
    child->owner = call;
    child->done = below_done;
    call->below = true;
    pv_child_pass(&call->self->filter, child);
}

/* ---- what Python answers ---- */

/* A write goes on with the bytes that Python saw: the guest's may be others by now. */
static void written_done(struct pv_io *child)
{
    struct call *call = child->owner;
    int error = child->error;

    pv_child_free(&call->self->filter, child);
    call->below = false;
    end_call(call, error);
}

static void pass_on(struct call *call)
{
    struct pv_io *child;

    if (call->io->type != PV_IO_WRITE) {
        struct python *self = call->self;

        pv_io_pass(&self->filter, drop(call));
        return;
    }
    child = pv_io_child(&call->self->filter, call->io);
    if (!child) {
        end_call(call, ENOMEM);
        return;
    }
    call->iov = (struct iovec){call->data, call->io->length};
    child->type = PV_IO_WRITE;
    child->flags = call->io->flags;
    child->offset = call->io->offset;
    child->length = call->io->length;
    child->iov = &call->iov;
    child->iov_count = 1;
    child->owner = call;
    child->done = written_done;
    call->below = true;
    pv_child_pass(&call->self->filter, child);
}

static void answer(struct python *self, struct call *call, const uint8_t *body)
{
    const struct pv_py_message *head = &self->head;
    struct pv_io *io = call->io;
    bool busy = call->below || pv_linked(&call->out);

    if (busy || (head->data && head->data != io->length) || (head->verb == PV_PY_PASS && call->told)) {
        break_off(self, "an answer that does not fit the request");
    } else if (head->verb == PV_PY_PASS) {
        pass_on(call);
    } else if (head->verb == PV_PY_BELOW) {
        if (head->data && io->type == PV_IO_WRITE)
            memcpy(call->data, body, head->data);
        send_below(call);
    } else if (head->verb == PV_PY_END) {
        if (!head->error && io->type == PV_IO_READ)
            pv_iov_copy_in(io->iov, io->iov_count, 0, head->data ? body : call->data, io->length);
        end_call(call, head->error < 4096 ? (int)head->error : EIO);
    } else {
        break_off(self, "an answer of no known kind");
    }
}

static bool head_is_good(const struct python *self)
{
    return self->head.magic == PV_PY_MAGIC && self->head.data <= PV_IO_LENGTH_MAX;
}

/* Takes what the socket has; true: go on. */
static bool receive(struct python *self)
{
    uint64_t in_head = sizeof self->head;
    uint8_t *to = self->received < in_head ? (uint8_t *)&self->head + self->received : self->body + (self->received - in_head);
    uint64_t want = self->received < in_head ? in_head - self->received : in_head + self->head.data - self->received;
    ssize_t got = want ? recv(self->fd, to, want, MSG_DONTWAIT) : 0;

    if (want && got <= 0) {
        if (got < 0 && (errno == EAGAIN || errno == EINTR))
            return false;
        break_off(self, got ? strerror(errno) : "it closed the connection");
        return false;
    }
    self->received += (uint64_t)got;
    if (self->received == in_head) {
        if (!head_is_good(self)) {
            break_off(self, "a message that is none");
            return false;
        }
        free(self->body);
        self->body = self->head.data ? malloc(self->head.data) : NULL;
        if (self->head.data && !self->body) {
            break_off(self, "no memory for its message");
            return false;
        }
    }
    return true;
}

static bool is_whole(const struct python *self)
{
    return self->received >= sizeof self->head && self->received == sizeof self->head + self->head.data;
}

static void on_socket(struct pv_event *event, uint32_t events)
{
    struct python *self = pv_member(event, struct python, event);

    if (events & EPOLLOUT)
        flush_out(self);
    for (unsigned i = 0; i < 64 && self->fd >= 0 && receive(self); i++) { /* then others have their turn */
        struct call *call;

        if (!is_whole(self))
            continue;
        self->received = 0;
        call = find(self, self->head.id);
        if (call)
            answer(self, call, self->body);
        else
            break_off(self, "an answer to nothing that was asked");
    }
    admit(self);
}

/* ---- the connection ---- */

static void break_off(struct python *self, const char *why)
{
    struct pv_link *link, *next;

    if (self->fd < 0)
        return;
    fprintf(stderr, "filter %s of disk %s: Python is gone: %s\n", self->filter.name, self->filter.instance->name, why);
    pv_add(&self->broken, 1);
    pv_loop_unwatch(loop_of(self), self->fd, &self->event);
    close(self->fd);
    self->fd = -1;
    self->received = 0;
    for (link = self->calls.next; link != &self->calls; link = next) {
        struct call *call = pv_member(link, struct call, link);

        next = link->next;
        pv_list_remove(&call->out);
        if (!call->below) /* else when it comes back */
            end_call(call, EIO);
    }
    pv_loop_arm(loop_of(self), &self->timer, pv_loop_clock_ns() + RECONNECT_NS);
    admit(self);
}

static int connect_to(const struct python *self)
{
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);

    if (fd >= 0 && connect(fd, (const struct sockaddr *)&self->address, sizeof self->address)) {
        int error = errno;

        close(fd);
        errno = error;
        return -1;
    }
    return fd;
}

static void watch(struct python *self)
{
    int err;

    self->writable_asked = false;
    if (pv_loop_watch(loop_of(self), self->fd, EPOLLIN, &self->event, &err)) {
        close(self->fd);
        self->fd = -1;
    }
}

static void on_timer(struct pv_timer *timer)
{
    struct python *self = pv_member(timer, struct python, timer);

    uint64_t deadline = next_deadline(self);

    if (self->fd >= 0 && deadline <= pv_loop_clock_ns()) {
        break_off(self, "no answer within timeout_ms");
    } else if (self->fd >= 0) {
        if (deadline != UINT64_MAX)
            pv_loop_arm(loop_of(self), timer, deadline);
    } else {
        self->fd = connect_to(self);
        if (self->fd >= 0)
            watch(self);
        if (self->fd < 0)
            arm(self);
    }
}

/* ---- requests ---- */

static bool is_full(const struct python *self)
{
    return self->count >= CALLS || self->bytes > BYTES;
}

static void start_call(struct python *self, struct pv_io *io)
{
    struct call *call = calloc(1, sizeof *call);
    uint64_t data = io->type == PV_IO_WRITE ? io->length : 0;

    if (call && has_data(io))
        call->data = calloc(1, io->length + 1);
    if (!call || (has_data(io) && !call->data)) {
        free(call);
        pv_io_end(io, ENOMEM);
        return;
    }
    call->self = self;
    call->io = io;
    call->message.id = ++self->next_id;
    call->deadline_ns = pv_loop_clock_ns() + self->timeout_ns;
    if (data)
        pv_iov_copy_out(io->iov, io->iov_count, 0, call->data, data);
    self->count++;
    self->bytes += has_data(io) ? io->length : 0;
    pv_list_append(&self->calls, &call->link);
    send_call(call, PV_PY_REQUEST, 0, data);
}

/* Those that wait, as far as there is room; all of them with EIO, if Python is gone. */
static void admit(struct python *self)
{
    while (!pv_list_empty(&self->waiting) && (self->fd < 0 || !is_full(self))) {
        struct pv_io *io = pv_member(self->waiting.next, struct pv_io, link);

        pv_list_remove(&io->link);
        if (self->fd < 0) {
            pv_add(&self->failures, 1);
            pv_io_end(io, EIO);
        } else {
            start_call(self, io);
        }
    }
    if (self->fd >= 0)
        flush_out(self);
}

static void python_request(struct pv_filter *filter, struct pv_io *io)
{
    struct python *self = (struct python *)filter;

    pv_add(&self->requests, 1);
    pv_list_append(&self->waiting, &io->link);
    admit(self);
    if (self->fd >= 0)
        arm(self);
}

/* ---- life ---- */

static int python_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct python *self = (struct python *)filter;
    const char *path = pv_setting_text(settings, "socket", NULL);
    uint64_t ms;

    if (pv_settings_known(settings, names, fail) || pv_setting_size(settings, "timeout_ms", 10000, 10, 600000, &ms, fail))
        return -1;
    if (!path || strlen(path) >= sizeof self->address.sun_path)
        return pv_fail(fail, EINVAL, "socket is not set, or too long: name the socket that the Python class listens on");
    self->timeout_ns = ms * 1000000;
    self->address.sun_family = AF_UNIX;
    strcpy(self->address.sun_path, path);
    self->event.ready = on_socket;
    self->timer.fire = on_timer;
    pv_list_init(&self->calls);
    pv_list_init(&self->out);
    pv_list_init(&self->waiting);
    self->fd = connect_to(self);
    if (self->fd < 0)
        return pv_fail(fail, errno, "socket %.100s: %s: start the Python class first", path, strerror(errno));
    return 0;
}

static void python_close(struct pv_filter *filter)
{
    struct python *self = (struct python *)filter;

    if (self->fd >= 0)
        close(self->fd);
    free(self->body);
}

static void python_attached(struct pv_filter *filter)
{
    struct python *self = (struct python *)filter;

    if (self->fd >= 0)
        watch(self);
    if (self->fd < 0)
        arm(self);
}

static void python_detach(struct pv_filter *filter)
{
    struct python *self = (struct python *)filter;

    pv_loop_disarm(loop_of(self), &self->timer);
    if (self->fd >= 0)
        pv_loop_unwatch(loop_of(self), self->fd, &self->event);
}

static unsigned python_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    const struct python *self = (const struct python *)filter;
    unsigned count = 0;

    pv_figure(out, &count, max, "requests", pv_get(&self->requests));
    pv_figure(out, &count, max, "failures", pv_get(&self->failures));
    pv_figure(out, &count, max, "times_broken", pv_get(&self->broken));
    return count;
}

const struct pv_filter_class pv_python_class = {
    .name = "python",
    .order = PV_INSPECTION,
    .size = sizeof(struct python),
    .types = PV_ALL_TYPES,
    .open = python_open,
    .close = python_close,
    .attached = python_attached,
    .detach = python_detach,
    .request = python_request,
    .figures = python_figures,
};
