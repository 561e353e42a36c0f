/* Runs every registered test, or those whose names contain an argument, each under a time limit. */
#include <signal.h>
#include <string.h>
#include <unistd.h>

#include "harness.h"

#define SECONDS_A_TEST 60

static struct test *tests;

void test_register(struct test *test)
{
    test->next = tests;
    tests = test;
}

static int wanted(const struct test *test, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strstr(test->name, argv[i]))
            return 1;
    return argc == 1;
}

int main(int argc, char **argv)
{
    unsigned count = 0;

    signal(SIGPIPE, SIG_IGN);
    for (struct test *test = tests; test; test = test->next) {
        if (!wanted(test, argc, argv))
            continue;
        fprintf(stderr, "%s\n", test->name);
        alarm(SECONDS_A_TEST);
        test->run();
        count++;
    }
    fprintf(stderr, "%u tests passed\n", count);
    return 0;
}
