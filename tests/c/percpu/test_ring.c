/* Rings: every record comes out once and whole, whoever is moved, killed or slow; exhausted and damaged rings. */
#include "check.h"
#include "percpu/ring.h"
#include "percpu/rooms.h"

enum { RECORDS = SOME(PV_HAS_SEQUENCES ? 20000 : 1000) };

static struct pv_ring new_ring(struct pv_percpu *areas, uint32_t bytes)
{
    struct pv_ring ring;
    int err;

    CHECK(!pv_ring_create(areas, bytes, &ring, &err));
    return ring;
}

static struct pv_ring_counts counts_of(const struct pv_ring *ring)
{
    struct pv_ring_counts counts;
    int err;

    CHECK(!pv_ring_count(ring, &counts, &err));
    return counts;
}

/* Any area's next record; bytes, or 0. */
static size_t read_any(const struct pv_ring *ring, void *out, size_t room)
{
    for (int64_t a = pv_percpu_next(ring->areas, ring->shape.control, 0); a >= 0;
         a = pv_percpu_next(ring->areas, ring->shape.control, (uint32_t)a + 1)) {
        size_t bytes;
        int err = 0, result = pv_ring_read(ring, (uint32_t)a, out, room, &bytes, &err);

        CHECK(result >= 0);
        if (result)
            return bytes;
    }
    return 0;
}

static void test_one_by_one(void)
{
    struct pv_percpu *areas = areas_for(0);
    struct pv_ring ring = new_ring(areas, 4096), again;
    char in[3000], out[3000];
    int err = 0;

    memset(in, 'x', sizeof in);
    for (uint32_t length = 1; length <= 2040; length += 17) {
        CHECK(pv_ring_put(&ring, in, length) == 1);
        CHECK(read_any(&ring, out, sizeof out) == length);
        CHECK(!memcmp(in, out, length));
    }
    CHECK(pv_ring_put(&ring, in, 2041) == 0 && pv_ring_put(&ring, in, UINT32_MAX) == 0);
    CHECK(counts_of(&ring).dropped == 2);
    CHECK(!pv_ring_open(areas, ring.control, ring.data, &again, &err) && pv_ring_put(&again, "abc", 3) == 1);
    CHECK(read_any(&ring, out, sizeof out) == 3);
    CHECK(pv_ring_open(areas, ring.data, ring.control, &again, &err) == -1 && err == EINVAL);
    CHECK(pv_ring_create(areas, 4095, &again, &err) == -1 && err == EINVAL);
    CHECK(!pv_ring_free(&ring, &err) && pv_ring_put(&ring, in, 8) == -1);
    CHECK(pv_ring_free(&ring, &err) == -1 && err == ESTALE);
    pv_percpu_destroy(areas);
}

static void test_exhausted(void)
{
    struct pv_percpu *areas = areas_for(0);
    struct pv_ring ring = new_ring(areas, 4096);
    uint64_t record[10], count = 0, read = 0;
    int cpus[64];
    cpu_set_t all, one;

    CHECK(!sched_getaffinity(0, sizeof all, &all));
    usable_cpus(cpus, 64);
    CPU_ZERO(&one);
    CPU_SET(cpus[0], &one);
    CHECK(!sched_setaffinity(0, sizeof one, &one));
    while (pv_ring_put(&ring, &count, sizeof count) == 1)
        count++;
    CHECK(count == 4096 / 16 && counts_of(&ring).dropped == 1);
    while (read_any(&ring, record, sizeof record))
        CHECK(record[0] == read++);
    CHECK(read == count && pv_ring_put(&ring, &count, sizeof count) == 1);
    CHECK(!sched_setaffinity(0, sizeof all, &all));
    pv_percpu_destroy(areas);
}

/* Sixteen moved writers, one reader: each writer's records all come once. */
struct flow {
    struct pv_ring ring;
    unsigned char seen[THREADS][RECORDS];
    _Atomic(unsigned long) written;
    _Atomic(int) over;
};

static void write_records(unsigned number, void *context)
{
    struct flow *flow = context;
    unsigned char record[64];

    for (unsigned i = 0; i < RECORDS; i++) {
        uint32_t head[2] = {number, i}, length = 8 + i % 50;

        memset(record, (int)i, sizeof record);
        memcpy(record, head, sizeof head);
        while (pv_ring_put(&flow->ring, record, length) == 0)
            sched_yield();
        flow->written++;
    }
}

static void *read_records(void *context)
{
    struct flow *flow = context;
    unsigned char record[64];

    for (unsigned long got = 0;;) {
        size_t bytes = read_any(&flow->ring, record, sizeof record);
        uint32_t head[2];

        if (!bytes && flow->over && got == flow->written)
            return NULL;
        if (!bytes)
            continue;
        memcpy(head, record, sizeof head);
        CHECK(head[0] < THREADS && head[1] < RECORDS && bytes == 8 + head[1] % 50);
        CHECK(bytes == 8 || record[bytes - 1] == (unsigned char)head[1]);
        CHECK(!flow->seen[head[0]][head[1]]++);
        got++;
    }
}

static void test_flow(void)
{
    static struct flow flow;
    struct pv_percpu *areas = areas_for(0);
    pthread_t reader;

    flow.ring = new_ring(areas, 16384);
    CHECK(!pthread_create(&reader, NULL, read_records, &flow));
    run_crowd(write_records, &flow, SIGUSR1);
    flow.over = 1;
    CHECK(!pthread_join(reader, NULL));
    CHECK(flow.written == THREADS * RECORDS && counts_of(&flow.ring).waiting_bytes == 0);
    pv_percpu_destroy(areas);
}

/* A process that dies between reserve and commit, and one that is only slow. */
struct ending {
    const struct pv_ring *ring;
    pid_t id;
};

static void *end_in_a_record(void *context)
{
    struct ending *ending = context;
    void *payload;

    ending->id = (pid_t)syscall(SYS_gettid);
    CHECK(pv_ring_reserve(ending->ring, 24, &payload) == 1);
    return NULL;
}

/* A thread, of a process that lives on. */
static void let_a_thread_end(const struct pv_ring *ring)
{
    struct ending ending = {.ring = ring};
    pthread_t thread;

    CHECK(!pthread_create(&thread, NULL, end_in_a_record, &ending) && !pthread_join(thread, NULL));
    while (!kill(ending.id, 0)) /* it is joined a moment before the kernel has forgotten it */
        sched_yield();
}

static void test_writer_killed(void)
{
    struct pv_percpu *areas = areas_for(0);
    struct pv_ring ring = new_ring(areas, 4096);
    void *payload, *slow;
    char out[64];
    int status, err = 0;
    size_t bytes;
    cpu_set_t all, one;
    int cpus[64];
    pid_t pid;

    CHECK(!sched_getaffinity(0, sizeof all, &all));
    usable_cpus(cpus, 64);
    CPU_ZERO(&one);
    CPU_SET(cpus[0], &one);
    CHECK(!sched_setaffinity(0, sizeof one, &one));
    pid = fork();
    CHECK(pid >= 0);
    if (pid == 0) {
        CHECK(pv_ring_reserve(&ring, 24, &payload) == 1);
        raise(SIGKILL);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WIFSIGNALED(status));
    let_a_thread_end(&ring);
    CHECK(pv_ring_reserve(&ring, 16, &slow) == 1 && pv_ring_put(&ring, "late", 4) == 1);
    CHECK(read_any(&ring, out, sizeof out) == 0); /* the dead ones' are passed over, the slow one's waited for */
    CHECK(counts_of(&ring).abandoned == 2);
    memcpy(slow, "slow", 4);
    pv_ring_commit(slow, 4);
    CHECK(read_any(&ring, out, sizeof out) == 4 && !memcmp(out, "slow", 4));
    for (int64_t a = pv_percpu_next(areas, ring.shape.control, 0); a >= 0; a = -1) /* too small a room: it stays */
        CHECK(pv_ring_read(&ring, (uint32_t)a, out, 3, &bytes, &err) == -1 && err == EMSGSIZE && bytes == 4);
    CHECK(read_any(&ring, out, sizeof out) == 4 && !memcmp(out, "late", 4));
    CHECK(!sched_setaffinity(0, sizeof all, &all));
    pv_percpu_destroy(areas);
}

/* Whatever another process writes there, a reader stays within the ring. */
static void test_damaged(void)
{
    struct pv_percpu *areas = areas_for(0);
    struct pv_ring ring = new_ring(areas, 4096);
    char out[4096];
    size_t bytes;
    int err;

    srand(7);
    for (int i = 0; i < SOME(200000); i++) {
        int64_t a;
        char *control;

        CHECK(pv_ring_put(&ring, "something", 9) >= 0);
        a = pv_percpu_next(areas, ring.shape.control, 0);
        control = pv_percpu_at(ring.shape.control, (uint32_t)a);
        switch (rand() % 4) {
        case 0: *(uint64_t *)(control + ring.shape.data + rand() % 512 * 8) = (uint64_t)rand() << rand() % 40; break;
        case 1: *(uint64_t *)control += (uint64_t)rand() << rand() % 40; break;
        case 2: *(uint64_t *)(control + PV_RING_TAIL) -= (uint64_t)rand() % 64; break;
        default: break;
        }
        pv_ring_read(&ring, (uint32_t)a, out, sizeof out, &bytes, &err);
    }
    pv_percpu_destroy(areas);
}

static void ignore(int number)
{
    (void)number;
}

int main(void)
{
    CHECK(!sigaction(SIGUSR1, &(struct sigaction){.sa_handler = ignore, .sa_flags = SA_RESTART}, NULL));
    test_one_by_one();
    test_exhausted();
    test_flow();
    test_writer_killed();
    test_damaged();
    return 0;
}
