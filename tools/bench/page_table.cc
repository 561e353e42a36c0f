/* Looking up random addresses: our page table beside the peers that search regions, at equal mapped memory (4 GiB).
 *
 * page_table REGIONS [ROUNDS]: one line a case and round: regions, method, mode, nanoseconds a look-up; the methods take turns.
 * Every method returns the source offset of the address's page, read from the region's descriptor: the timed look-up
 * dereferences the VAD, once. "dependent" derives each address from the last result. Each method is inlined into its timed loop: the
 * peers here, the page walk in page_table_ours.c, for its header is C; all read the same addresses. Last lines: memory of our
 * structures.
 */
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <sys/mman.h>
#include <vector>

#include "page_table_ours.h"

namespace {
constexpr unsigned long page = 4096, total_pages = 1 << 20;
constexpr size_t lookups = 1 << 20;

struct region { /* what a peer's entry leads to: as large as a VAD */
    unsigned long start, offset;
};

unsigned regions;
unsigned pages_each;
std::vector<region> sorted;
std::vector<unsigned long> starts;
std::map<unsigned long, region> tree;
unsigned long sink;

unsigned long answer(const region &r, unsigned long address)
{
    return r.offset + (address - r.start);
}

unsigned long by_upper_bound(unsigned long address)
{
    return answer(sorted[std::upper_bound(starts.begin(), starts.end(), address) - starts.begin() - 1], address);
}

unsigned long by_branchless(unsigned long address)
{
    const unsigned long *base = starts.data();
    for (size_t count = starts.size(); count > 1; count -= count / 2)
        base += (base[count / 2] <= address) * (count / 2);
    return answer(sorted[base - starts.data()], address);
}

unsigned long by_map(unsigned long address)
{
    return answer(std::prev(tree.upper_bound(address))->second, address);
}

double now()
{
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

/* The addresses lie in huge pages, so that reading them costs every method the same little. */
unsigned long *make_addresses()
{
    std::mt19937_64 random(42);
    auto *addresses = static_cast<unsigned long *>(aligned_alloc(2 << 20, lookups * sizeof(unsigned long)));

    madvise(addresses, lookups * sizeof(unsigned long), MADV_HUGEPAGE);
    for (size_t i = 0; i < lookups; i++)
        addresses[i] = random() % (static_cast<unsigned long>(regions) * pages_each / 2 * 2) * page;
    return addresses;
}

/* The timed loops. Ours are the same ones, in C: page_table_ours.c. */
template <typename F> unsigned long sum_of(F f, const unsigned long *addresses)
{
    unsigned long sum = 0;

    for (size_t i = 0; i < lookups; i++)
        sum += f(addresses[i]);
    return sum;
}

template <typename F> unsigned long chase(F f, const unsigned long *addresses)
{
    unsigned long last = 0;

    for (size_t i = 0; i < lookups; i++)
        last = f(addresses[i] ^ (last & page)); /* the page or its neighbour: known only when the last result is */
    return last;
}

template <typename I, typename D> void report(const char *name, I independent, D dependent)
{
    bench_lock();
    double start = now();
    sink += independent();
    double middle = now();
    sink += dependent();
    double end = now();
    bench_unlock();
    printf("%u %s independent %.2f\n", regions, name, (middle - start) / lookups);
    printf("%u %s dependent %.2f\n", regions, name, (end - middle) / lookups);
}

template <typename F> void report_peer(const char *name, F f, const unsigned long *addresses)
{
    report(name, [=] { return sum_of(f, addresses); }, [=] { return chase(f, addresses); });
}

void make_peers()
{
    for (unsigned long i = 0; i < regions; i++) {
        region r = {i * pages_each * page, i * pages_each * page};

        sorted.push_back(r);
        starts.push_back(r.start);
        tree[r.start] = r;
    }
}

int all_agree(const unsigned long *addresses)
{
    for (size_t i = 0; i < 1000; i++) {
        unsigned long expected = by_map(addresses[i]);

        if (bench_lookup(addresses[i]) != expected || by_upper_bound(addresses[i]) != expected ||
            by_branchless(addresses[i]) != expected)
            return 0;
    }
    return 1;
}
} // namespace

int main(int argc, char **argv)
{
    regions = argc > 1 ? static_cast<unsigned>(atoi(argv[1])) : 1;
    int rounds = argc > 2 ? atoi(argv[2]) : 3;

    if (!regions || regions > total_pages)
        return 2;
    pages_each = static_cast<unsigned>(total_pages / regions);
    make_peers();
    if (bench_setup(regions, pages_each, pages_each * page))
        return 1;
    unsigned long *addresses = make_addresses();
    if (!all_agree(addresses))
        return 1;
    for (int round = 0; round < rounds; round++) {
        report("page_table", [=] { return bench_sum(addresses, lookups); },
               [=] { return bench_chase(addresses, lookups, page); });
        report_peer("upper_bound", [](unsigned long a) { return by_upper_bound(a); }, addresses);
        report_peer("branchless", [](unsigned long a) { return by_branchless(a); }, addresses);
        report_peer("map", [](unsigned long a) { return by_map(a); }, addresses);
    }
    bench_print_memory(regions);
    return sink == 1;
}
