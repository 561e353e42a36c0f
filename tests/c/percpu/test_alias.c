/* The model of true aliases: contexts that are moved between processes at any instruction add through one address, and nothing is lost. */
#include "check.h"
#include "percpu/alias.h"

static void test_model(unsigned cpus, unsigned contexts, uint64_t adds)
{
    const struct pv_alias_plan plan = {cpus, contexts, adds};
    struct pv_alias_result result;
    uint64_t sum = 0;
    unsigned used = 0;
    int err;

    CHECK(!pv_alias_run(&plan, &result, &err));
    for (unsigned i = 0; i < cpus; i++) {
        sum += result.area[i];
        used += result.area[i] != 0;
    }
    printf("%u processes, %u contexts: %lu adds through one address, %lu preemptions, %lu moves, %u areas\n", cpus, contexts,
           (unsigned long)sum, (unsigned long)result.preemptions, (unsigned long)result.moves, used);
    CHECK(sum == adds * contexts && result.address);
    CHECK(cpus == 1 || (used > 1 && result.moves && result.preemptions));
}

int main(void)
{
    const struct pv_alias_plan bad[] = {{0, 1, 1}, {1, 0, 1}, {1, 1, 0}, {PV_ALIAS_CPUS + 1, 1, 1}, {1, PV_ALIAS_CONTEXTS + 1, 1}};
    struct pv_alias_result result;
    int err;

    setvbuf(stdout, NULL, _IOLBF, 0);
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
        CHECK(pv_alias_run(&bad[i], &result, &err) == -1 && err == EINVAL);
    test_model(1, 3, SOME(1000000));
    test_model(2, 5, SOME(40000000));
    test_model(4, 9, SOME(20000000));
    return 0;
}
