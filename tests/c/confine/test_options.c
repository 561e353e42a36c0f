/* hv-confine's command line: what is accepted, and that everything else is refused with a message that names it. */
#include "confine/options.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_WORDS = 300 };

static int failures;

#define CHECK(condition)                                                              \
    do {                                                                              \
        if (!(condition)) {                                                           \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
            failures++;                                                               \
        }                                                                             \
    } while (0)

struct command_line {
    char text[8192];
    char *words[MAX_WORDS];
    int count;
};

/* Words are split at single spaces. */
static int parse(struct command_line *line, const char *text, struct options *o, struct failure *f)
{
    line->count = 0;
    snprintf(line->text, sizeof line->text, "hv-confine %s", text);
    for (char *word = strtok(line->text, " "); word; word = strtok(NULL, " "))
        line->words[line->count++] = word;
    line->words[line->count] = NULL;
    memset(f, 0, sizeof *f);
    return options_parse(line->count, line->words, o, f);
}

static void accepts_everything_together(void)
{
    struct command_line line;
    struct options o;
    struct failure f;

    CHECK(parse(&line,
                "--uid 1000 --gid 1001 --cgroup /a --cgroup /b "
                "--rlimit core=0 --rlimit nofile=10:20 --rlimit as=unlimited "
                "--oom-score-adj -5 --private-root --ro /usr --rw /vm --dev kvm --dev net/tun --new-network --filter "
                "--stdin 7 --stdout 8 --stderr 9 --keep-fd 12 --keep-fd 3 --chdir /vm --env A=b --env C= "
                "-- /bin/x -- y",
                &o, &f) == 0);
    CHECK(o.has_identity && o.uid == 1000 && o.gid == 1001);
    CHECK(o.cgroups.count == 2 && strcmp(o.cgroups.items[1], "/b") == 0);
    CHECK(o.limit_count == 3 && o.limits[1].value.rlim_cur == 10 && o.limits[1].value.rlim_max == 20);
    CHECK(o.limits[2].resource == RLIMIT_AS && o.limits[2].value.rlim_max == RLIM_INFINITY);
    CHECK(o.has_oom_score && o.oom_score == -5);
    CHECK(o.bind_count == 2 && !o.binds[0].writable && o.binds[1].writable);
    CHECK(o.devices.count == 2 && o.private_root && o.new_network && o.filter && !o.user_namespace);
    CHECK(o.stdio[0] == 7 && o.stdio[1] == 8 && o.stdio[2] == 9);
    CHECK(o.keep_count == 2 && o.keep[0] == 12);
    CHECK(o.environment_count == 2 && o.environment[2] == NULL);
    CHECK(strcmp(o.program[0], "/bin/x") == 0 && strcmp(o.program[1], "--") == 0 && o.program[3] == NULL);
}

static void has_plain_defaults(void)
{
    struct command_line line;
    struct options o;
    struct failure f;

    CHECK(parse(&line, "-- /bin/x", &o, &f) == 0);
    CHECK(!o.has_identity && !o.private_root && !o.filter && o.keep_count == 0);
    CHECK(o.stdio[0] == -1 && strcmp(o.directory, "/") == 0 && o.environment[0] == NULL);
}

static void refuses(const char *text, const char *expected)
{
    struct command_line line;
    struct options o;
    struct failure f;

    if (parse(&line, text, &o, &f) == 0 || f.err != 0 || !strstr(f.what, expected)) {
        fprintf(stderr, "'%.200s' should be refused with '%s', got '%s'\n", text, expected, f.what);
        failures++;
    }
}

static void refuses_mistakes(void)
{
    refuses("", "no program");
    refuses("--filter", "no program");
    refuses("--filter --", "no program");
    refuses("-- bin/x", "absolute path");
    refuses("--what 1 -- /x", "--what");
    refuses("--uid", "--uid");
    refuses("--uid 5 -- /x", "belong together");
    refuses("--uid 0 --gid 5 -- /x", "number from 1");
    refuses("--uid 4294967295 --gid 5 -- /x", "number from 1");
    refuses("--uid 5x --gid 5 -- /x", "5x");
    refuses("--uid 5 --gid 5 --user-namespace --private-root -- /x", "excludes --uid");
    refuses("--user-namespace -- /x", "needs --private-root");
    refuses("--ro /usr -- /x", "need --private-root");
    refuses("--private-root --ro usr -- /x", "absolute path");
    refuses("--private-root --ro /a/../b -- /x", "'..'");
    refuses("--private-root --rw /a/.. -- /x", "'..'");
    refuses("--private-root --ro // -- /x", "whole root");
    refuses("--private-root --dev sda -- /x", "sda");
    refuses("--private-root --dev ../etc -- /x", "../etc");
    refuses("--cgroup sys -- /x", "absolute path");
    refuses("--rlimit core -- /x", "core");
    refuses("--rlimit cores=1 -- /x", "cores=1");
    refuses("--rlimit core=-1 -- /x", "-1");
    refuses("--rlimit core=5:2 -- /x", "above the hard one");
    refuses("--rlimit core=99999999999999999999999999999999999999999999:2 -- /x", "no number");
    refuses("--rlimit core=99999999999999999999 -- /x", "number from");
    refuses("--oom-score-adj 1001 -- /x", "1000");
    refuses("--keep-fd 2 -- /x", "number from 3");
    refuses("--stdout -1 -- /x", "number from 0");
    refuses("--env A -- /x", "NAME=VALUE");
    refuses("--env =A -- /x", "NAME=VALUE");
    refuses("--chdir x -- /x", "absolute path");
}

static void refuses_overlong_list(const char *option)
{
    char text[8192] = "--private-root";
    size_t used = strlen(text);

    for (int i = 0; i <= CONFINE_MAX_LIST; i++)
        used += (size_t)snprintf(text + used, sizeof text - used, " %s", option);
    snprintf(text + used, sizeof text - used, " -- /x");
    refuses(text, "more than");
}

static void refuses_overlong_lists(void)
{
    refuses_overlong_list("--ro /a");
    refuses_overlong_list("--dev kvm");
    refuses_overlong_list("--cgroup /c");
    refuses_overlong_list("--keep-fd 9");
    refuses_overlong_list("--env A=b");
    refuses_overlong_list("--rlimit core=0");
}

int main(void)
{
    accepts_everything_together();
    has_plain_defaults();
    refuses_mistakes();
    refuses_overlong_lists();
    if (failures)
        return EXIT_FAILURE;
    puts("ok: hv-confine options");
    return EXIT_SUCCESS;
}
