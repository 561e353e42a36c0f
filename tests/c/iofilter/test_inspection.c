/* Settings, and the filters that look on: null, template, trace, stats. */
#include "chain.h"
#include "iofilter/filters/stats/stats.h"
#include "iofilter/filters/trace/trace.h"

static struct pv_loop loop;
static uint8_t block[64 * KIB];

static void settings_are_checked(void)
{
    struct settings_text parsed;
    struct pv_fail fail;
    uint64_t size;
    double real;
    static const char *const bad_sizes[] = {"s=", "s=-1", "s=1k", "s=1KK", "s=99999999999999999999", "s=16777216T", "s=0x10"};
    static const char *const bad_reals[] = {"r=", "r=nan", "r=inf", "r=0x1", "r=1e999", "r=0.5x", "r=2"};

    CHECK(!pv_setting_size(settings_of(&parsed, "s=3M"), "s", 0, 0, UINT64_MAX, &size, &fail) && size == 3 * MIB);
    CHECK(!pv_setting_size(settings_of(&parsed, "t=3M"), "s", 7, 8, 9, &size, &fail) && size == 7);
    for (unsigned i = 0; i < sizeof bad_sizes / sizeof *bad_sizes; i++)
        CHECK(pv_setting_size(settings_of(&parsed, bad_sizes[i]), "s", 0, 0, UINT64_MAX, &size, &fail) == -1 && fail.error == EINVAL);
    CHECK(pv_setting_size(settings_of(&parsed, "s=9"), "s", 0, 10, 20, &size, &fail) == -1 && strstr(fail.text, "from 10 to 20"));
    CHECK(!pv_setting_real(settings_of(&parsed, "r=0.25"), "r", 0, 0, 1, &real, &fail) && real == 0.25);
    for (unsigned i = 0; i < sizeof bad_reals / sizeof *bad_reals; i++)
        CHECK(pv_setting_real(settings_of(&parsed, bad_reals[i]), "r", 0, 0, 1, &real, &fail) == -1);
}

static void every_class_can_be_found(void)
{
    unsigned count = 0;

    for (; pv_filter_class_at(count); count++) {
        const struct pv_filter_class *class = pv_filter_class_at(count);

        CHECK(pv_filter_class(class->name) == class);
        CHECK(class->size >= sizeof(struct pv_filter) && class->types && class->request);
    }
    CHECK(count >= 7 && !pv_filter_class("nonesuch"));
}

static void bad_settings_are_refused(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);

    refused(disk, "null", "x=1", "there is no setting x");
    refused(disk, "template", "stride=1 stride=2", "given twice");
    refused(disk, "template", "stride=12", "from 512");
    refused(disk, "trace", "records=1000", "power of 2");
    refused(disk, "stats", "x=1", "there is: none");
    CHECK(disk->count == 0);
    disk_close(disk);
}

static void a_template_counts(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    struct pv_filter *filter = attach(disk, "template", "stride=8K");

    CHECK(!disk_write(disk, 4096, block, 4096) && !disk_write(disk, 8192, block, 4096));
    CHECK(!disk_do(disk, PV_IO_FLUSH, 0, NULL, 0, 0));
    CHECK(figure(filter, "matched") == 1 && figure(filter, "bytes") == 8192);
    disk_close(disk);
}

static void a_trace_keeps_the_last(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    struct pv_filter *filter;
    struct pv_trace_record records[64];
    uint64_t cursor = 0;

    attach(disk, "error", "types=discard error=ENOSPC");
    filter = attach(disk, "trace", "records=16");
    for (uint64_t i = 0; i < 40; i++)
        CHECK(!disk_write(disk, i * 512, block, 512));
    CHECK(disk_do(disk, PV_IO_DISCARD, 4096, NULL, 8192, 0) == ENOSPC);
    CHECK(pv_trace_read(filter, &cursor, records, 64) == 16 && cursor == 41);
    CHECK(records[0].number == 26 && records[0].offset == 25 * 512 && records[0].type == PV_IO_WRITE && !records[0].error);
    CHECK(records[15].number == 41 && records[15].error == ENOSPC && records[15].length == 8192 && records[15].type == PV_IO_DISCARD);
    CHECK(records[15].start_ns >= records[14].start_ns + records[14].latency_ns);
    CHECK(pv_trace_read(filter, &cursor, records, 64) == 0);
    CHECK(!disk_read(disk, 0, block, 512) && pv_trace_read(filter, &cursor, records, 64) == 1 && records[0].number == 42);
    CHECK(figure(filter, "traced") == 42);
    disk_close(disk);
}

static void a_trace_keeps_only_slow_ones(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    struct pv_trace_record record;
    struct pv_filter *filter;
    uint64_t cursor = 0;

    attach(disk, "delay", "us=30000 types=flush");
    filter = attach(disk, "trace", "slower_us=30000");
    CHECK(!disk_read(disk, 0, block, 512) && !disk_do(disk, PV_IO_FLUSH, 0, NULL, 0, 0));
    while (pv_trace_read(filter, &cursor, &record, 1))
        CHECK(record.latency_ns >= 30000000);
    CHECK(record.type == PV_IO_FLUSH);
    disk_close(disk);
}

static void stats_count(void)
{
    struct pv_instance *disk = memory_disk("d", MIB, &loop);
    struct pv_stats_type of;
    struct pv_filter *filter;

    attach(disk, "error", "types=write skip=1");
    attach(disk, "delay", "us=2000 types=read");
    filter = attach(disk, "stats", "");
    for (int i = 0; i < 3; i++)
        CHECK(!disk_read(disk, 0, block, 4096));
    CHECK(!disk_write(disk, 0, block, 64 * KIB) && disk_write(disk, 0, block, 512) == EIO);
    pv_stats_read(filter, PV_IO_READ, &of);
    CHECK(of.requests == 3 && of.errors == 0 && of.bytes == 3 * 4096 && of.size[12] == 3 && of.latency_ns >= 3 * 2000000);
    CHECK(pv_stats_quantile(of.latency, 0.5) >= 2000000);
    pv_stats_read(filter, PV_IO_WRITE, &of);
    CHECK(of.requests == 2 && of.errors == 1 && of.bytes == 64 * KIB && of.size[16] == 1 && of.size[9] == 1);
    CHECK(figure(filter, "read_requests") == 3 && figure(filter, "write_errors") == 1);
    CHECK(figure(filter, "read_latency_p99_ns") >= 2000000);
    disk_close(disk);
}

static void quantiles_are_upper_ends(void)
{
    uint64_t buckets[PV_STATS_BUCKETS] = {0};

    CHECK(pv_stats_quantile(buckets, 0.5) == 0);
    buckets[3] = 99;
    buckets[20] = 1;
    CHECK(pv_stats_quantile(buckets, 0.5) == 16 && pv_stats_quantile(buckets, 0.99) == 16 && pv_stats_quantile(buckets, 1) == 2 << 20);
}

int main(void)
{
    int err;

    CHECK(!pv_loop_open(&loop, 0, &err));
    settings_are_checked();
    every_class_can_be_found();
    bad_settings_are_refused();
    a_template_counts();
    a_trace_keeps_the_last();
    a_trace_keeps_only_slow_ones();
    stats_count();
    quantiles_are_upper_ends();
    pv_loop_close(&loop);
    return 0;
}
