/* For tests of filters: puts filters into chains, with settings as a person types them. */
#ifndef TEST_CHAIN_H
#define TEST_CHAIN_H

#include "disk.h"
#include "iofilter/filters/all.h"

/* "name=value name=value"; the text is cut up. */
struct settings_text {
    char text[1024];
    struct pv_setting list[32];
    struct pv_settings settings;
};

static inline const struct pv_settings *settings_of(struct settings_text *parsed, const char *text)
{
    char *save = NULL;

    CHECK(strlen(text) < sizeof(parsed->text));
    strcpy(parsed->text, text);
    parsed->settings = (struct pv_settings){parsed->list, 0};
    for (char *word = strtok_r(parsed->text, " ", &save); word; word = strtok_r(NULL, " ", &save)) {
        char *value = strchr(word, '=');

        CHECK(value && parsed->settings.count < 32);
        *value++ = 0;
        parsed->list[parsed->settings.count++] = (struct pv_setting){word, value};
    }
    return &parsed->settings;
}

/* Opens a filter and puts it first (at the guest's end). NULL: *fail. */
static inline struct pv_filter *try_attach(struct pv_instance *disk, const char *class, const char *name, const char *settings,
    struct pv_fail *fail)
{
    struct settings_text parsed;
    struct pv_filter *filter = pv_filter_open(disk, class, name, settings_of(&parsed, settings), fail);

    if (!filter)
        return NULL;
    disk_quiesce(disk);
    CHECK(!pv_instance_insert(disk, filter, 0, fail));
    pv_instance_resume(disk);
    return filter;
}

static inline struct pv_filter *attach(struct pv_instance *disk, const char *class, const char *settings)
{
    struct pv_fail fail = {0};
    struct pv_filter *filter = try_attach(disk, class, class, settings, &fail);

    if (!filter) {
        fprintf(stderr, "%s: %s\n", class, fail.text);
        abort();
    }
    return filter;
}

static inline void detach(struct pv_instance *disk, unsigned at)
{
    struct pv_fail fail;
    struct pv_filter *filter;

    disk_quiesce(disk);
    filter = pv_instance_remove(disk, at, &fail);
    CHECK(filter);
    pv_instance_resume(disk);
    pv_filter_close(filter);
}

/* The settings are refused, and the reason has this in it. */
static inline void refused(struct pv_instance *disk, const char *class, const char *settings, const char *reason)
{
    struct pv_fail fail = {0};

    if (try_attach(disk, class, class, settings, &fail)) {
        fprintf(stderr, "%s %s: was taken\n", class, settings);
        abort();
    }
    if (!strstr(fail.text, reason) || fail.error <= 0) {
        fprintf(stderr, "%s %s: error %d, \"%s\" has no \"%s\"\n", class, settings, fail.error, fail.text, reason);
        abort();
    }
}

static inline uint64_t figure(const struct pv_filter *filter, const char *name)
{
    struct pv_figure figures[64];
    unsigned count = filter->class->figures(filter, figures, 64);

    for (unsigned i = 0; i < count; i++)
        if (!strcmp(figures[i].name, name))
            return figures[i].value;
    fprintf(stderr, "%s has no figure %s\n", filter->class->name, name);
    abort();
}

#endif
