/* Dear sources that a host loads once: two VMs and one loader; a loader that is full, dead, silent; what a hostile client can do. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>

#include "../../../csrc/memory/fault.h"
#include "../../../csrc/memory/loader.h"
#include "packed.h"

enum { SOURCE = 2, OTHER = 3, FIRST = 50 /* pages of the first of two VADs: the border lies inside a unit */ };

struct host {
    struct pv_pfdb *db;
    struct pv_loader *loader;
    uint32_t vads[2], other;
    int file, result, err;
    pthread_t thread;
};

struct vm {
    struct host *host;
    struct pv_space *space;
    struct pv_fault *server;
    unsigned char *ram;
    int result, err;
    pthread_t thread;
};

static void *load(void *argument)
{
    struct host *host = argument;

    host->result = pv_loader_run(host->loader, &host->err);
    return NULL;
}

static struct host *make_host(uint64_t max_bytes)
{
    struct host *host = calloc(1, sizeof *host);
    char why[PV_SOURCE_WHY];

    CHECK(host);
    host->file = file_of(packed_bytes);
    CHECK(!pv_pfdb_create(memfd_create("pfdb", MFD_CLOEXEC), 8, 4 * PAGES, &host->db, &host->err));
    CHECK(!pv_pfdb_add(host->db, PV_SOURCE_ZSTD, SOURCE, 0, FIRST, &host->vads[0], &host->err));
    CHECK(!pv_pfdb_add(host->db, PV_SOURCE_ZSTD, SOURCE, FIRST * PV_PAGE_SIZE, PAGES - FIRST, &host->vads[1], &host->err));
    CHECK(!pv_pfdb_add(host->db, PV_SOURCE_ZSTD, OTHER, 0, 4, &host->other, &host->err));
    struct pv_loader_config config = {host->db, SOURCE, PV_SOURCE_ZSTD, host->file, 0, max_bytes};
    CHECK(!pv_loader_create(&config, &host->loader, &host->err, why));
    CHECK(!pthread_create(&host->thread, NULL, load, host));
    return host;
}

static void end_loader(struct host *host)
{
    pv_loader_stop(host->loader);
    pthread_join(host->thread, NULL);
    CHECK(host->result == 0);
    pv_loader_destroy(host->loader);
    host->loader = NULL;
}

static void free_host(struct host *host)
{
    if (host->loader)
        end_loader(host);
    pv_pfdb_close(host->db);
    close(host->file);
    free(host);
}

static void *serve(void *argument)
{
    struct vm *vm = argument;

    vm->result = pv_fault_run(vm->server, &vm->err);
    return NULL;
}

/* `loader`: -1 for a client of the host's. */
static struct vm *make_vm(struct host *host, uint32_t around, int loader)
{
    int ram = memfd_create("ram", MFD_CLOEXEC), client = loader, err = 0;
    struct vm *vm = calloc(1, sizeof *vm);

    CHECK(vm && ram >= 0 && !ftruncate(ram, BYTES));
    vm->host = host;
    vm->ram = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, ram, 0);
    close(ram);
    CHECK(vm->ram != MAP_FAILED && !pv_space_create(host->db, &vm->space, &err));
    CHECK(!pv_space_map(vm->space, 0, FIRST, host->vads[0], 0, &err));
    CHECK(!pv_space_map(vm->space, FIRST * PV_PAGE_SIZE, PAGES - FIRST, host->vads[1], 0, &err));
    struct pv_fault_config config = {host->db, vm->space, BYTES, around, 0};
    CHECK(!pv_fault_create(&config, &vm->server, &err));
    CHECK(!pv_fault_add_source(vm->server, SOURCE, PV_SOURCE_ZSTD, host->file, 0, &err));
    if (loader < 0)
        CHECK(!pv_loader_add_client(host->loader, &client, &err));
    CHECK(!pv_fault_share_source(vm->server, SOURCE, pv_loader_store(host->loader), client, &err));
    if (loader < 0)
        close(client);
    CHECK(!pv_fault_open_own(vm->server, -1, &err) && !pv_fault_register_own(vm->server, vm->ram, BYTES, 0, &err));
    CHECK(!pthread_create(&vm->thread, NULL, serve, vm));
    return vm;
}

static void free_vm(struct vm *vm)
{
    pv_fault_stop(vm->server);
    pthread_join(vm->thread, NULL);
    CHECK(vm->result == 0);
    pv_fault_destroy(vm->server);
    pv_space_destroy(vm->space);
    munmap(vm->ram, BYTES);
    free(vm);
}

static void check_page(const struct vm *vm, size_t page)
{
    CHECK(!memcmp(vm->ram + page * PV_PAGE_SIZE, data + page * PV_PAGE_SIZE, PV_PAGE_SIZE));
}

static void *touch_all(void *argument)
{
    const struct vm *vm = argument;

    for (size_t i = 0; i < PAGES; i++)
        check_page(vm, i * 37 % PAGES); /* 159 pages: every one */
    return NULL;
}

static void touch_both(struct vm *a, struct vm *b)
{
    pthread_t thread;

    CHECK(!pthread_create(&thread, NULL, touch_all, a));
    touch_all(b);
    pthread_join(thread, NULL);
}

static struct pv_fault_stats stats_of(struct vm *vm)
{
    struct pv_fault_stats stats;

    pv_fault_stats(vm->server, &stats);
    return stats;
}

static void test_a_unit_is_loaded_once_for_all(uint32_t around)
{
    struct host *host = make_host(BYTES);
    struct vm *a = make_vm(host, around, -1), *b = make_vm(host, around, -1);
    struct pv_loader_counts counts;

    touch_both(a, b);
    pv_loader_count(host->loader, &counts);
    CHECK(counts.units == UNITS && counts.bytes == BYTES && counts.full == 0 && counts.failed == 0);
    CHECK(stats_of(a).units_loaded == 0 && stats_of(b).units_loaded == 0);
    CHECK(stats_of(a).frames_found == PAGES && stats_of(b).frames_found >= PAGES);
    CHECK(stats_of(a).frames_asked + stats_of(b).frames_asked == counts.asked && counts.asked < 3 * UNITS);
    free_vm(a);
    free_vm(b);
    free_host(host);
}

static void test_prefetching_finds_frames_too(void)
{
    struct host *host = make_host(BYTES);
    struct vm *a = make_vm(host, 1, -1);
    uint32_t pages[PAGES];

    for (uint32_t i = 0; i < PAGES; i++)
        pages[i] = i;
    CHECK(pv_fault_prefetch(a->server, pages, PAGES) == PAGES);
    touch_all(a);
    CHECK(stats_of(a).units_loaded == 0 && stats_of(a).faults == 0);
    free_vm(a);
    free_host(host);
}

static void test_a_full_store_leaves_the_rest_to_each(void)
{
    struct host *host = make_host(5 * UNIT);
    struct vm *a = make_vm(host, 16, -1), *b = make_vm(host, 16, -1);
    struct pv_loader_counts counts;

    touch_both(a, b);
    pv_loader_count(host->loader, &counts);
    CHECK(counts.units == 5 && counts.full > 0);
    CHECK(stats_of(a).units_loaded > 0 && stats_of(a).frames_found > 0);
    free_vm(a);
    free_vm(b);
    free_host(host);
}

/* What it had loaded stays readable; nobody waits for it. */
static void test_a_loader_that_dies(void)
{
    struct host *host = make_host(BYTES);
    struct vm *a = make_vm(host, 1, -1), *b = make_vm(host, 1, -1);
    pthread_t thread;

    for (size_t page = 0; page < 20; page++)
        check_page(a, page);
    CHECK(!pthread_create(&thread, NULL, touch_all, a));
    end_loader(host); /* somewhere in the storm */
    pthread_join(thread, NULL);
    touch_all(b);
    CHECK(stats_of(b).frames_found >= 20 && stats_of(b).frames_asked <= 1 && stats_of(b).units_loaded > 0);
    free_vm(a);
    free_vm(b);
    free_host(host);
}

static void test_a_loader_that_is_silent(void)
{
    struct host *host = make_host(BYTES);
    int pair[2];
    struct vm *vm;

    CHECK(!socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair));
    vm = make_vm(host, 16, pair[0]);
    touch_all(vm); /* waits for it once */
    CHECK(stats_of(vm).frames_asked == 1 && stats_of(vm).units_loaded > 0);
    free_vm(vm);
    close(pair[0]);
    close(pair[1]);
    free_host(host);
}

static void *touch_damaged(void *argument)
{
    const struct vm *vm = argument;

    CHECK(*(const volatile unsigned char *)vm->ram == 0 && !"a page was invented");
    return NULL;
}

/* In a child: the toucher stays suspended. The VM looks for itself, and names what it saw. */
static void damaged_frame(void)
{
    struct host *host;
    struct vm *vm;
    pthread_t toucher;

    packed[100] ^= 16;
    host = make_host(BYTES);
    vm = make_vm(host, 1, -1);
    CHECK(!pthread_create(&toucher, NULL, touch_damaged, vm));
    pthread_join(vm->thread, NULL);
    CHECK(vm->result == -1 && vm->err == EIO && strstr(pv_fault_reason(vm->server), "source 2: frame 0 at byte 0"));
    _exit(0);
}

static void in_a_child(void (*body)(void))
{
    pid_t pid = fork();
    int status;

    CHECK(pid >= 0);
    if (!pid) {
        body();
        _exit(0);
    }
    CHECK(waitpid(pid, &status, 0) == pid && WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

static uint32_t ask(int client, uint32_t vad, uint32_t page)
{
    struct pv_loader_ask question = {vad, page};
    struct pv_loader_answer answer;

    CHECK(send(client, &question, sizeof question, MSG_NOSIGNAL) == sizeof question);
    CHECK(recv(client, &answer, sizeof answer, 0) == sizeof answer && !memcmp(&answer.to, &question, sizeof question));
    return answer.no;
}

static void test_what_a_hostile_client_can_do(void)
{
    struct host *host = make_host(BYTES);
    int store = pv_loader_store(host->loader), client, rude, err;
    char path[32], byte;

    CHECK(!pv_loader_add_client(host->loader, &client, &err) && !pv_loader_add_client(host->loader, &rude, &err));
    CHECK(ask(client, host->other, 0) == 1 && ask(client, 0, 0) == 1 && ask(client, UINT32_MAX, 0) == 1);
    CHECK(ask(client, host->vads[0], FIRST) == 1 && ask(client, host->vads[0], UINT32_MAX) == 1);
    CHECK(send(rude, "nonsense, and too long", 22, 0) == 22 && recv(rude, &byte, 1, 0) == 0);
    CHECK(ask(client, host->vads[0], 0) == 0);
    CHECK(pwrite(store, "x", 1, 0) == -1);
    CHECK(mmap(NULL, PV_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, store, 0) == MAP_FAILED);
    snprintf(path, sizeof path, "/proc/self/fd/%d", store);
    store = open(path, O_RDWR | O_CLOEXEC); /* what root in the device process could do */
    CHECK(store < 0 || (pwrite(store, "x", 1, 0) == -1 && ftruncate(store, 0) == -1));
    CHECK(store < 0 || mmap(NULL, PV_PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, store, 0) == MAP_FAILED);
    if (store >= 0)
        close(store);
    close(client);
    close(rude);
    free_host(host);
}

static void test_bad_input(void)
{
    struct host *host = make_host(BYTES);
    struct pv_loader_config config = {host->db, SOURCE, PV_SOURCE_FILE, host->file, 0, BYTES};
    struct vm *vm = make_vm(host, 1, -1);
    char why[PV_SOURCE_WHY];
    struct pv_loader *loader;
    int err;

    CHECK(pv_loader_create(&config, &loader, &err, why) == -1 && err == EINVAL && strstr(why, "not dear"));
    config.kind = PV_SOURCE_ZSTD;
    config.fd = -1;
    CHECK(pv_loader_create(&config, &loader, &err, why) == -1 && err == EBADF);
    CHECK(pv_fault_share_source(vm->server, SOURCE, pv_loader_store(host->loader), 0, &err) == -1 && err == EEXIST);
    CHECK(pv_fault_share_source(vm->server, 9, pv_loader_store(host->loader), 0, &err) == -1 && err == EINVAL);
    CHECK(!pv_fault_add_source(vm->server, 9, PV_SOURCE_ZSTD, host->file, 0, &err));
    CHECK(pv_fault_share_source(vm->server, 9, host->file, 0, &err) == -1 && err == EINVAL); /* not sealed */
    CHECK(pv_fault_share_source(vm->server, 9, pv_loader_store(host->loader), -1, &err) == -1 && err == EBADF);
    free_vm(vm);
    free_host(host);
}

int main(void)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

    if (uffd < 0) {
        printf("loader: SKIPPED: userfaultfd: %s\n", strerror(errno));
        return 0;
    }
    close(uffd);
    make_data();
    pack(1);
    test_bad_input();
    test_what_a_hostile_client_can_do();
    for (int i = 0; i < 5; i++) {
        test_a_unit_is_loaded_once_for_all(1);
        test_a_unit_is_loaded_once_for_all(16);
        test_a_loader_that_dies();
    }
    test_prefetching_finds_frames_too();
    test_a_full_store_leaves_the_rest_to_each();
    test_a_loader_that_is_silent();
    in_a_child(damaged_frame);
    puts("loader: all passed");
    return 0;
}
