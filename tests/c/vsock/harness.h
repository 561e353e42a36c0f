/* A test is a function that returns when all is well and dies in CHECK when not; TEST registers it with the runner
 * (test_main.c). */
#ifndef TEST_HARNESS_H
#define TEST_HARNESS_H

#include <stdio.h>
#include <stdlib.h>

struct test {
    const char *name;
    void (*run)(void);
    struct test *next;
};

void test_register(struct test *test);

#define TEST(test_name)                                                                           \
    static void test_name(void);                                                                  \
    __attribute__((constructor)) static void register_##test_name(void)                           \
    {                                                                                             \
        static struct test entry = {.name = #test_name, .run = test_name};                        \
        test_register(&entry);                                                                    \
    }                                                                                             \
    static void test_name(void)

#define CHECK(condition)                                                                          \
    do {                                                                                          \
        if (!(condition)) {                                                                       \
            fprintf(stderr, "%s:%d: %s: not %s\n", __FILE__, __LINE__, __func__, #condition);     \
            abort();                                                                              \
        }                                                                                         \
    } while (0)

#define CHECK_EQ(a, b)                                                                            \
    do {                                                                                          \
        long long left_ = (long long)(a), right_ = (long long)(b);                                \
        if (left_ != right_) {                                                                    \
            fprintf(stderr, "%s:%d: %s: %s is %lld, not %lld\n", __FILE__, __LINE__, __func__, #a, left_, right_); \
            abort();                                                                              \
        }                                                                                         \
    } while (0)

#endif
