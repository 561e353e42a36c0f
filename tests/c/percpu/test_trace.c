/* Trace rings: events come out whole, once and by time; a ring that went round keeps the newest; a hook that is off costs nothing and does nothing. */
#include <sys/mman.h>

#include "check.h"
#include "percpu/trace.h"

enum { RECORDS = 128, EVENTS = SOME(20000) };

static char *text_of(const struct pv_trace *trace, uint64_t *events)
{
    int err, fd = memfd_create("trace", MFD_CLOEXEC);
    off_t size;
    char *text;

    CHECK(!pv_trace_write(trace, fd, events, &err));
    size = lseek(fd, 0, SEEK_END);
    text = calloc(1, (size_t)size + 1);
    CHECK(pread(fd, text, (size_t)size, 0) == size);
    close(fd);
    return text;
}

static unsigned count(const char *text, const char *word)
{
    unsigned found = 0;

    for (const char *at = strstr(text, word); at; at = strstr(at + 1, word))
        found++;
    return found;
}

static void test_by_hook(struct pv_percpu *areas)
{
    struct pv_trace trace;
    uint64_t start, events;
    char *text;
    int err;

    CHECK(!pv_trace_create(areas, RECORDS, &trace, &err));
    CHECK(PV_TRACE_NOW() == 0);
    PV_TRACE(PV_TRACE_INSTANT, PV_TRACE_VSOCK, 1, 0);
    PV_TRACE_SPAN(PV_TRACE_FAULT, PV_TRACE_NOW(), 1);
    pv_trace_use(&trace.hook);
    start = PV_TRACE_NOW();
    CHECK(start);
    PV_TRACE(PV_TRACE_INSTANT, PV_TRACE_VSOCK, 7, 0);
    PV_TRACE_SPAN(PV_TRACE_FAULT, start, 4096);
    pv_trace_use(NULL);
    PV_TRACE(PV_TRACE_INSTANT, PV_TRACE_VSOCK, 1, 0);
    text = text_of(&trace, &events);
    CHECK(pv_trace_committed(&trace) == 2);
    CHECK(events == 2 && count(text, "\"ph\":\"X\"") == 1 && count(text, "\"ph\":\"i\"") == 1);
    CHECK(strstr(text, "\"fault\"") < strstr(text, "\"vsock\"")); /* it began earlier, though it was written later */
    CHECK(strstr(text, "\"argument\":4096") && strstr(text, "\"argument\":7") && strstr(text, "\"dur\":"));
    free(text);
    pv_trace_destroy(&trace);
    CHECK(pv_trace_committed(&trace) == 0);
    pv_trace_put(&trace, PV_TRACE_INSTANT, PV_TRACE_OTHER, 1, 0); /* freed: nothing happens */
    CHECK(pv_trace_create(areas, 100, &trace, &err) == -1 && err == EINVAL);
}

static void trace_events(unsigned number, void *context)
{
    for (uint64_t i = 0; i < EVENTS; i++)
        pv_trace_put(context, PV_TRACE_INSTANT, PV_TRACE_OTHER, (uint64_t)number << 32 | i, 0);
}

struct reading {
    struct pv_trace trace;
    _Atomic(int) over;
};

/* Events of a text, each with its time not before the last one's and an argument that somebody wrote. */
static void check_events(const char *text)
{
    double last = 0;

    for (const char *at = strstr(text, "\"ts\":"); at; at = strstr(at + 1, "\"ts\":")) {
        double time = strtod(at + 5, NULL);
        unsigned long argument = strtoul(strstr(at, "\"argument\":") + 11, NULL, 10);

        CHECK(time >= last && argument >> 32 < THREADS && (argument & UINT32_MAX) < EVENTS);
        last = time;
    }
}

static void *read_meanwhile(void *argument)
{
    struct reading *reading = argument;

    while (!reading->over) {
        uint64_t events;
        char *text = text_of(&reading->trace, &events);

        check_events(text);
        free(text);
    }
    return NULL;
}

static void test_moved_threads(struct pv_percpu *areas)
{
    static struct reading reading;
    uint64_t events;
    pthread_t reader;
    char *text;
    int err;

    CHECK(!pv_trace_create(areas, RECORDS, &reading.trace, &err));
    CHECK(!pthread_create(&reader, NULL, read_meanwhile, &reading));
    run_crowd(trace_events, &reading.trace, SIGUSR1);
    reading.over = 1;
    CHECK(!pthread_join(reader, NULL));
    text = text_of(&reading.trace, &events);
    check_events(text);
    CHECK(events >= RECORDS - 1 && events % (RECORDS - 1) == 0 && count(text, "\"name\"") == events);
    free(text);
    pv_trace_destroy(&reading.trace);
}

static void ignore(int number)
{
    (void)number;
}

int main(void)
{
    struct pv_percpu *areas = areas_for(0);

    CHECK(!sigaction(SIGUSR1, &(struct sigaction){.sa_handler = ignore, .sa_flags = SA_RESTART}, NULL));
    test_by_hook(areas);
    test_moved_threads(areas);
    pv_percpu_destroy(areas);
    return 0;
}
