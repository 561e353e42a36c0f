/* Address spaces against a plain array as the model, bad input, and readers that race with mappers. */
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../../../csrc/common/cleanup.h"
#include "../../../csrc/memory/space.h"

#define CHECK(condition)                                                                   \
    do {                                                                                   \
        if (!(condition)) {                                                                \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                \
            exit(1);                                                                       \
        }                                                                                  \
    } while (0)

#define PAGE(n) ((uint64_t)(n) << PV_PAGE_SHIFT)

struct fixture {
    int fd;
    struct pv_pfdb *db;
    struct pv_space *space;
    struct pv_reader *reader;
};

static struct fixture setup(uint32_t vads, uint32_t pfes)
{
    struct fixture f = {.fd = memfd_create("pfdb", MFD_CLOEXEC)};
    int err = 0;

    CHECK(f.fd >= 0);
    CHECK(!pv_pfdb_create(f.fd, vads, pfes, &f.db, &err));
    CHECK(!pv_space_create(f.db, &f.space, &err));
    CHECK(!pv_space_add_reader(f.space, &f.reader, &err));
    return f;
}

static void teardown(struct fixture *f)
{
    pv_space_remove_reader(f->space, f->reader);
    pv_space_destroy(f->space);
    pv_pfdb_close(f->db);
    close(f->fd);
}

static uint32_t add(struct fixture *f, uint32_t pages, uint64_t offset)
{
    uint32_t vad;
    int err = 0;

    CHECK(!pv_pfdb_add(f->db, PV_SOURCE_FILE, 7, offset, pages, &vad, &err));
    return vad;
}

static int lookup(struct fixture *f, uint64_t address, struct pv_translation *out)
{
    int found;

    pv_space_read_lock(f->space, f->reader);
    found = pv_space_lookup(f->space, address, out);
    pv_space_read_unlock(f->reader);
    return found;
}

static void test_a_page_leads_to_its_vad(void)
{
    struct fixture f = setup(16, 4096);
    struct pv_translation t;
    uint32_t vad = add(&f, 100, PAGE(3));
    int err = 0;

    CHECK(!lookup(&f, PAGE(5), &t));
    CHECK(!pv_space_map(f.space, PAGE(5), 10, vad, 20, &err));
    CHECK(lookup(&f, PAGE(5) + 123, &t) && t.page == 20 && t.vad == pv_pfdb_vad(f.db, vad));
    CHECK(lookup(&f, PAGE(14), &t) && t.page == 29 && pv_vad_offset(t.vad) == PAGE(3) && pv_vad_source(t.vad) == 7);
    CHECK(!lookup(&f, PAGE(15), &t) && !lookup(&f, PAGE(4), &t));
    CHECK(!lookup(&f, UINT64_C(1) << 48, &t) && !lookup(&f, UINT64_MAX, &t));
    teardown(&f);
}

static void test_bad_ranges_change_nothing(void)
{
    struct fixture f = setup(16, 4096);
    uint32_t vad = add(&f, 1000, 0);
    struct pv_space_usage usage;
    uint64_t n;
    int err;

#define REFUSED(code, call) (err = 0, (call) == -1 && err == (code))
    CHECK(REFUSED(EINVAL, pv_space_map(f.space, 1, 1, vad, 0, &err)));
    CHECK(REFUSED(EINVAL, pv_space_map(f.space, 0, 0, vad, 0, &err)));
    CHECK(REFUSED(EINVAL, pv_space_map(f.space, 0, 1001, vad, 0, &err)));
    CHECK(REFUSED(EINVAL, pv_space_map(f.space, 0, 1, vad, 1000, &err)));
    CHECK(REFUSED(EINVAL, pv_space_map(f.space, 0, UINT64_MAX, vad, 1, &err)));
    CHECK(REFUSED(EINVAL, pv_space_map(f.space, (UINT64_C(1) << 48) - PAGE(1), 2, vad, 0, &err)));
    CHECK(REFUSED(EINVAL, pv_space_map(f.space, UINT64_C(1) << 48, 1, vad, 0, &err)));
    CHECK(REFUSED(ENOENT, pv_space_map(f.space, 0, 1, 0, 0, &err)));
    CHECK(REFUSED(ENOENT, pv_space_map(f.space, 0, 1, 9, 0, &err)));
    CHECK(REFUSED(ENOENT, pv_space_map(f.space, 0, 1, 1u << 31, 0, &err)));
    CHECK(REFUSED(EINVAL, pv_space_unmap(f.space, 1, 1, &n, &err)));
    CHECK(REFUSED(EINVAL, pv_space_unmap(f.space, 0, 0, &n, &err)));
    CHECK(!pv_space_map(f.space, PAGE(600), 10, vad, 0, &err));
    CHECK(REFUSED(EEXIST, pv_space_map(f.space, PAGE(400), 201, vad, 0, &err)));
    pv_space_usage(f.space, &usage);
    CHECK(usage.mapped_pages == 10);
    teardown(&f);
}

static void test_database_refuses(void)
{
    struct fixture f = setup(3, 101);
    struct pv_pfdb *other;
    uint32_t vad;
    int err;

    CHECK(REFUSED(EINVAL, pv_pfdb_add(f.db, PV_SOURCE_FILE, 0, 1, 1, &vad, &err)));
    CHECK(REFUSED(EINVAL, pv_pfdb_add(f.db, PV_SOURCE_FILE, 0, 0, 0, &vad, &err)));
    CHECK(REFUSED(EINVAL, pv_pfdb_add(f.db, 0, 0, 0, 1, &vad, &err)));
    CHECK(REFUSED(EINVAL, pv_pfdb_add(f.db, PV_SOURCE_FILE, 0, PAGE(UINT64_C(1) << 51) - PAGE(1), 2, &vad, &err)));
    CHECK(REFUSED(ENOSPC, pv_pfdb_add(f.db, PV_SOURCE_FILE, 0, 0, 101, &vad, &err)));
    add(&f, 50, 0);
    add(&f, 50, 0);
    CHECK(REFUSED(ENOSPC, pv_pfdb_add(f.db, PV_SOURCE_FILE, 0, 0, 1, &vad, &err)));
    CHECK(REFUSED(ENOENT, pv_pfdb_remove(f.db, 0, &err)));
    CHECK(REFUSED(ENOENT, pv_pfdb_remove(f.db, 3, &err)));
    CHECK(!pv_pfdb_remove(f.db, 1, &err));
    CHECK(REFUSED(ENOENT, pv_pfdb_remove(f.db, 1, &err)));
    CHECK(REFUSED(EINVAL, pv_pfdb_create(f.fd, 0, 1, &other, &err)));
    CHECK(!ftruncate(f.fd, 4096) && REFUSED(EBADMSG, pv_pfdb_open(f.fd, 0, &other, &err)));
    CHECK(!ftruncate(f.fd, 0) && REFUSED(EBADMSG, pv_pfdb_open(f.fd, 1, &other, &err)));
    CHECK(!ftruncate(f.fd, 1 << 20)); /* so that the teardown finds its mapping backed */
    teardown(&f);
}

/* A successor of a killed writer derives the free entries from the table. */
static void test_a_new_writer_goes_on(void)
{
    struct fixture f = setup(64, 10000);
    struct pv_pfdb *next, *reader;
    struct pv_pfdb_usage before, after;
    uint32_t a = add(&f, 100, 0), b = add(&f, 200, 0), c = add(&f, 300, 0);
    int err = 0;

    CHECK(!pv_pfdb_remove(f.db, b, &err));
    pv_pfdb_usage(f.db, &before);
    CHECK(!pv_pfdb_open(f.fd, 1, &next, &err));
    pv_pfdb_usage(next, &after);
    CHECK(before.pfes == 400 && after.pfes == 400 && after.free_runs == before.free_runs && after.vads == 2);
    CHECK(!pv_pfdb_open(f.fd, 0, &reader, &err));
    CHECK(pv_pfdb_vad(reader, c)->pages == 300 && reader->directory[a] == f.db->directory[a]);
    next->directory[c] = next->directory[a] + 1; /* damage: a VAD where another's entries are */
    pv_pfdb_close(reader);
    pv_pfdb_close(next);
    CHECK(REFUSED(EBADMSG, pv_pfdb_open(f.fd, 1, &next, &err)));
    teardown(&f);
}

#define MODEL_PAGES 3000
struct cell {
    uint32_t vad, page;
};

static void compare(struct fixture *f, const struct cell *model)
{
    struct pv_extent e;
    struct pv_translation t;
    uint64_t address = 0, mapped = 0;
    struct pv_space_usage usage;
    int err = 0;

    for (uint32_t i = 0; i < MODEL_PAGES; i++) {
        int found = lookup(f, PAGE(i), &t);

        CHECK(found == (model[i].vad != 0));
        CHECK(!found || (t.vad == pv_pfdb_vad(f->db, model[i].vad) && t.page == model[i].page));
        mapped += (uint64_t)found;
    }
    while (pv_space_next(f->space, address, &e, &err) == 1) {
        for (uint64_t i = 0; i < e.pages; i++) {
            const struct cell *cell = &model[(e.address >> PV_PAGE_SHIFT) + i];

            CHECK(cell->vad == e.vad && cell->page == e.page + i);
        }
        mapped -= e.pages;
        address = e.address + PAGE(e.pages);
    }
    CHECK(mapped == 0);
    pv_space_usage(f->space, &usage);
    for (uint32_t i = 0; i < MODEL_PAGES; i++)
        mapped += model[i].vad != 0;
    CHECK(usage.mapped_pages == mapped);
}

static void test_against_the_model(unsigned seed)
{
    struct fixture f = setup(64, 1 << 16);
    static struct cell model[MODEL_PAGES];
    uint32_t vads[8];
    int err = 0;

    memset(model, 0, sizeof model);
    srandom(seed);
    for (int i = 0; i < 8; i++)
        vads[i] = add(&f, 1 + (uint32_t)random() % 1500, PAGE(i));
    for (int step = 0; step < 300; step++) {
        uint32_t at = (uint32_t)random() % MODEL_PAGES, pages = 1 + (uint32_t)random() % (MODEL_PAGES - at);

        if (random() % 2) {
            uint32_t vad = vads[random() % 8], length = pv_pfdb_vad(f.db, vad)->pages, page = (uint32_t)random() % length;
            int free_there = 1, result;

            if (pages > length - page)
                pages = length - page;
            for (uint32_t i = 0; i < pages; i++)
                free_there &= !model[at + i].vad;
            result = pv_space_map(f.space, PAGE(at), pages, vad, page, &err);
            CHECK(result == (free_there ? 0 : -1));
            for (uint32_t i = 0; free_there && i < pages; i++)
                model[at + i] = (struct cell){vad, page + i};
        } else {
            uint64_t count, expected = 0;

            pages = 1 + pages / 8;
            for (uint32_t i = 0; i < pages; i++)
                expected += model[at + i].vad != 0;
            CHECK(!pv_space_unmap(f.space, PAGE(at), pages, &count, &err) && count == expected);
            memset(&model[at], 0, pages * sizeof model[0]);
        }
        if (step % 16 == 0)
            compare(&f, model);
    }
    compare(&f, model);
    teardown(&f);
}

/* Far apart addresses: subtrees are skipped whole, the top page is usable. */
static void test_a_sparse_space(void)
{
    struct fixture f = setup(4, 64);
    uint32_t vad = add(&f, 3, 0);
    uint64_t top = (UINT64_C(1) << 48) - PAGE(1), n;
    struct pv_extent e;
    int err = 0;

    CHECK(!pv_space_map(f.space, top, 1, vad, 0, &err));
    CHECK(!pv_space_map(f.space, UINT64_C(1) << 40, 1, vad, 1, &err));
    CHECK(pv_space_next(f.space, 0, &e, &err) == 1 && e.address == UINT64_C(1) << 40 && e.pages == 1);
    CHECK(pv_space_next(f.space, e.address + PAGE(1), &e, &err) == 1 && e.address == top);
    CHECK(pv_space_next(f.space, 5, &e, &err) == -1 && err == EINVAL);
    CHECK(!pv_space_unmap(f.space, 0, UINT64_C(1) << 36, &n, &err) && n == 2);
    CHECK(pv_space_next(f.space, 0, &e, &err) == 0);
    teardown(&f);
}

/* Readers look up while a mapper maps and unmaps, and removes the VAD once unmap has returned: what a reader holds inside a
 * section must stay what it was. The VAD's tag repeats its offset, so a reused VAD would show. */
struct storm {
    struct fixture *f;
    _Atomic(int) stop;
    _Atomic(uint64_t) hits;
};

static void *storm_reader(void *argument)
{
    struct storm *storm = argument;
    struct pv_reader *reader;
    unsigned state = 1;
    int err = 0;

    CHECK(!pv_space_add_reader(storm->f->space, &reader, &err));
    while (!atomic_load(&storm->stop)) {
        struct pv_translation t;

        state = state * 1103515245 + 12345;
        pv_space_read_lock(storm->f->space, reader);
        if (pv_space_lookup(storm->f->space, PAGE(state >> 8 & 1023), &t)) {
            uint32_t pages = atomic_load(&t.vad->pages);

            CHECK(pages == 64 && t.page < pages && pv_vad_source(t.vad) == (pv_vad_offset(t.vad) >> PV_PAGE_SHIFT) + 1);
            atomic_fetch_add_explicit(&storm->hits, 1, memory_order_relaxed);
        }
        pv_space_read_unlock(reader);
    }
    pv_space_remove_reader(storm->f->space, reader);
    return NULL;
}

static void test_readers_race_with_mappers(void)
{
    struct fixture f = setup(64, 4096);
    struct storm storm = {.f = &f};
    pthread_t threads[3];
    uint64_t n;
    int err = 0;

    for (int i = 0; i < 3; i++)
        CHECK(!pthread_create(&threads[i], NULL, storm_reader, &storm));
    for (uint64_t i = 0; i < 2000 || !atomic_load(&storm.hits); i++) {
        uint64_t round = i % 60000, address = PAGE(round * 64 % 1024), offset = PAGE(round);
        uint32_t vad;

        CHECK(!pv_pfdb_add(f.db, PV_SOURCE_FILE, (uint32_t)round + 1, offset, 64, &vad, &err));
        CHECK(!pv_space_map(f.space, address, 64, vad, 0, &err));
        CHECK(!pv_space_unmap(f.space, address, 64, &n, &err) && n == 64);
        CHECK(!pv_pfdb_remove(f.db, vad, &err));
    }
    atomic_store(&storm.stop, 1);
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    teardown(&f);
}

static void test_readers_run_out(void)
{
    struct fixture f = setup(2, 2);
    struct pv_reader *readers[PV_SPACE_READERS];
    int err = 0;

    for (int i = 1; i < PV_SPACE_READERS; i++)
        CHECK(!pv_space_add_reader(f.space, &readers[i], &err));
    CHECK(REFUSED(EAGAIN, pv_space_add_reader(f.space, &readers[0], &err)));
    pv_space_remove_reader(f.space, readers[5]);
    CHECK(!pv_space_add_reader(f.space, &readers[5], &err));
    teardown(&f);
}

int main(void)
{
    test_a_page_leads_to_its_vad();
    test_bad_ranges_change_nothing();
    test_database_refuses();
    test_a_new_writer_goes_on();
    for (unsigned seed = 1; seed <= 20; seed++)
        test_against_the_model(seed);
    test_a_sparse_space();
    test_readers_race_with_mappers();
    test_readers_run_out();
    puts("space: all passed");
    return 0;
}
