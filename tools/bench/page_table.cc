/* Looking up random addresses: our page table beside the peers that search regions, at equal mapped memory (4 GiB).
 *
 * Output: one line a case: regions, method, mode, nanoseconds a lookup. Every method returns the source offset of the
 * address's page, read from the region's descriptor: the timed look-up dereferences the VAD, once. "dependent" derives each
 * address from the last result.
 */
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <sys/mman.h>
#include <vector>

extern "C" {
#define _Atomic(T) T
#define _Alignas alignas
struct pv_pfdb;
struct pv_space;
struct pv_reader;
int bench_setup(unsigned regions, unsigned pages_each, unsigned long stride);
unsigned long bench_lookup(unsigned long address);
void bench_lock(void);
void bench_unlock(void);
}

namespace {
constexpr unsigned long page = 4096, total_pages = 1 << 20;

struct region { /* what a peer's entry leads to */
    unsigned long start, end, offset;
    char rest[8];
};

unsigned regions;
unsigned pages_each;
std::vector<region> sorted;
std::vector<unsigned long> starts;
std::map<unsigned long, region> tree;

unsigned long by_upper_bound(unsigned long address)
{
    auto i = std::upper_bound(starts.begin(), starts.end(), address) - starts.begin() - 1;
    const region &r = sorted[i];
    return r.offset + (address - r.start);
}

unsigned long by_branchless(unsigned long address)
{
    const unsigned long *base = starts.data();
    size_t count = starts.size();
    while (count > 1) {
        size_t half = count / 2;
        base += (base[half] <= address) * half;
        count -= half;
    }
    const region &r = sorted[base - starts.data()];
    return r.offset + (address - r.start);
}

unsigned long by_map(unsigned long address)
{
    const region &r = std::prev(tree.upper_bound(address))->second;
    return r.offset + (address - r.start);
}

double now()
{
    return std::chrono::duration<double, std::nano>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

unsigned long sink;

template <typename F> double time_independent(F f, const std::vector<unsigned long> &addresses)
{
    unsigned long sum = 0;
    bench_lock();
    double start = now();
    for (unsigned long a : addresses)
        sum += f(a);
    double spent = now() - start;
    bench_unlock();
    sink += sum;
    return spent / addresses.size();
}

template <typename F> double time_dependent(F f, const std::vector<unsigned long> &addresses)
{
    unsigned long last = 0;
    bench_lock();
    double start = now();
    for (unsigned long a : addresses)
        last = f(a ^ (last & page)); /* a neighbour page or the page itself: known only when the last result is */
    double spent = now() - start;
    bench_unlock();
    sink += last;
    return spent / addresses.size();
}

template <typename F> void report(const char *name, F f, const std::vector<unsigned long> &addresses)
{
    printf("%u %s independent %.2f\n", regions, name, time_independent(f, addresses));
    printf("%u %s dependent %.2f\n", regions, name, time_dependent(f, addresses));
}
} // namespace

int main(int argc, char **argv)
{
    std::mt19937_64 random(42);
    std::vector<unsigned long> addresses(1 << 21);

    regions = argc > 1 ? atoi(argv[1]) : 1;
    pages_each = total_pages / regions;
    for (unsigned i = 0; i < regions; i++) {
        region r = {i * pages_each * page, (i + 1) * pages_each * page, i * pages_each * page, {}};
        sorted.push_back(r);
        starts.push_back(r.start);
        tree[r.start] = r;
    }
    if (bench_setup(regions, pages_each, pages_each * page))
        return 1;
    for (auto &a : addresses)
        a = random() % (static_cast<unsigned long>(regions) * pages_each / 2 * 2) * page;
    for (unsigned long i = 0; i < 1000; i++)
        if (bench_lookup(addresses[i]) != by_map(addresses[i]) || by_upper_bound(addresses[i]) != by_branchless(addresses[i]))
            return 2;
    for (int round = 0; round < 3; round++) {
        report("page_table", bench_lookup, addresses);
        report("upper_bound", by_upper_bound, addresses);
        report("branchless", by_branchless, addresses);
        report("map", by_map, addresses);
    }
    return sink == 1;
}
