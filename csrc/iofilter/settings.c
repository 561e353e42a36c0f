/* Readers of a filter's settings: every value is text that somebody typed, and every refusal names the setting. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "filter.h"

int pv_fail(struct pv_fail *fail, int error, const char *format, ...)
{
    va_list arguments;

    fail->error = error;
    va_start(arguments, format);
    vsnprintf(fail->text, sizeof fail->text, format, arguments);
    va_end(arguments);
    return -1;
}

static bool is_listed(const char *name, const char *const *names)
{
    for (; *names; names++)
        if (!strcmp(name, *names))
            return true;
    return false;
}

static int unknown(const char *name, const char *const *names, struct pv_fail *fail)
{
    char known[160] = "";
    size_t used = 0;

    for (; *names && used < sizeof known; names++)
        used += (size_t)snprintf(known + used, sizeof known - used, "%s%s", used ? ", " : "", *names);
    return pv_fail(fail, EINVAL, "there is no setting %.40s; there is: %s", name, known[0] ? known : "none");
}

int pv_settings_known(const struct pv_settings *settings, const char *const *names, struct pv_fail *fail)
{
    for (unsigned i = 0; i < settings->count; i++) {
        if (!is_listed(settings->list[i].name, names))
            return unknown(settings->list[i].name, names, fail);
        for (unsigned j = 0; j < i; j++)
            if (!strcmp(settings->list[i].name, settings->list[j].name))
                return pv_fail(fail, EINVAL, "the setting %s is given twice", settings->list[i].name);
    }
    return 0;
}

const char *pv_setting_text(const struct pv_settings *settings, const char *name, const char *otherwise)
{
    for (unsigned i = 0; i < settings->count; i++)
        if (!strcmp(settings->list[i].name, name))
            return settings->list[i].value;
    return otherwise;
}

/* Digits and at most one suffix; no sign, no blank. */
static bool parse_size(const char *text, uint64_t *out)
{
    static const char suffixes[] = "KMGT";
    uint64_t value = 0;
    const char *at = text;

    for (; *at >= '0' && *at <= '9'; at++)
        if (__builtin_mul_overflow(value, (uint64_t)10, &value) ||
            __builtin_add_overflow(value, (uint64_t)(*at - '0'), &value))
            return false;
    if (at == text)
        return false;
    if (*at) {
        const char *suffix = strchr(suffixes, *at);

        if (!suffix || at[1])
            return false;
        if (__builtin_mul_overflow(value, (uint64_t)1 << (10 * (suffix - suffixes + 1)), &value))
            return false;
    }
    *out = value;
    return true;
}

int pv_setting_size(const struct pv_settings *settings, const char *name, uint64_t otherwise, uint64_t low, uint64_t high,
    uint64_t *out, struct pv_fail *fail)
{
    const char *text = pv_setting_text(settings, name, NULL);
    uint64_t value;

    if (!text) {
        *out = otherwise;
        return 0;
    }
    if (!parse_size(text, &value))
        return pv_fail(fail, EINVAL, "%s=%.40s: a whole number is wanted, with K, M, G or T behind it or without", name,
            text);
    if (value < low || value > high)
        return pv_fail(fail, ERANGE, "%s=%.40s: must be from %llu to %llu", name, text, (unsigned long long)low,
            (unsigned long long)high);
    *out = value;
    return 0;
}

int pv_setting_real(const struct pv_settings *settings, const char *name, double otherwise, double low, double high,
    double *out, struct pv_fail *fail)
{
    const char *text = pv_setting_text(settings, name, NULL);
    char *end;
    double value;

    if (!text) {
        *out = otherwise;
        return 0;
    }
    errno = 0;
    value = strtod(text, &end);
    if (!*text || *end || errno || !isfinite(value) || strpbrk(text, " \txXnN"))
        return pv_fail(fail, EINVAL, "%s=%.40s: a decimal number is wanted", name, text);
    if (value < low || value > high)
        return pv_fail(fail, ERANGE, "%s=%.40s: must be from %g to %g", name, text, low, high);
    *out = value;
    return 0;
}
