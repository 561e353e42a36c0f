/* Fails requests on purpose: by type, range and probability, with an errno of choice. For tests of what lies above. */
#include <errno.h>
#include <string.h>

#include "../all.h"
#include "../common/select.h"

struct error {
    struct pv_filter filter;
    struct pv_select select;
    int error;
    uint64_t skip, left; /* requests that match: pass the first `skip`, fail `left`, pass the rest */
    bool after;          /* the request is carried out and then reported as failed */
    uint64_t failed;
};

static const char *const names[] = {PV_SELECT_SETTINGS, "error", "skip", "count", "when", NULL};

static const struct {
    const char *name;
    int error;
} errors[] = {{"EIO", EIO}, {"ENOSPC", ENOSPC}, {"EROFS", EROFS}, {"ENOMEM", ENOMEM}, {"EPERM", EPERM}, {"ETIMEDOUT", ETIMEDOUT},
    {"ENOTSUP", ENOTSUP}, {"EINVAL", EINVAL}};

static int read_error(const char *text, int *out, struct pv_fail *fail)
{
    for (unsigned i = 0; i < sizeof errors / sizeof *errors; i++)
        if (!strcmp(errors[i].name, text)) {
            *out = errors[i].error;
            return 0;
        }
    return pv_fail(fail, EINVAL, "error=%.40s: must be EIO, ENOSPC, EROFS, ENOMEM, EPERM, ETIMEDOUT, ENOTSUP or EINVAL", text);
}

static int read_when(const char *text, bool *after, struct pv_fail *fail)
{
    *after = !strcmp(text, "after");
    if (*after || !strcmp(text, "before"))
        return 0;
    return pv_fail(fail, EINVAL, "when=%.40s: must be before (the request is not carried out) or after (it is)", text);
}

static int error_open(struct pv_filter *filter, const struct pv_settings *settings, struct pv_fail *fail)
{
    struct error *self = (struct error *)filter, asked = *self;

    if (pv_settings_known(settings, names, fail) || pv_select_read(&asked.select, settings, fail) ||
        read_error(pv_setting_text(settings, "error", "EIO"), &asked.error, fail) ||
        read_when(pv_setting_text(settings, "when", "before"), &asked.after, fail) ||
        pv_setting_size(settings, "skip", 0, 0, UINT64_MAX, &asked.skip, fail) ||
        pv_setting_size(settings, "count", UINT64_MAX, 0, UINT64_MAX, &asked.left, fail))
        return -1;
    *self = asked;
    return 0;
}

static bool fails(struct error *self, const struct pv_io *io)
{
    if (!pv_select_hit(&self->select, io))
        return false;
    if (self->skip) {
        self->skip--;
        return false;
    }
    if (!self->left)
        return false;
    if (self->left != UINT64_MAX)
        self->left--;
    pv_add(&self->failed, 1);
    return true;
}

static void error_request(struct pv_filter *filter, struct pv_io *io)
{
    struct error *self = (struct error *)filter;

    if (!fails(self, io)) {
        pv_io_pass(filter, io);
        return;
    }
    if (!self->after) {
        pv_io_end(io, self->error);
        return;
    }
    io->frames[filter->at].word = 1;
    pv_io_pass(filter, io);
}

static void error_completed(struct pv_filter *filter, struct pv_io *io)
{
    if (io->frames[filter->at].word)
        io->error = ((struct error *)filter)->error;
}

static unsigned error_figures(const struct pv_filter *filter, struct pv_figure *out, unsigned max)
{
    unsigned count = 0;

    pv_figure(out, &count, max, "failed", pv_get(&((const struct error *)filter)->failed));
    return count;
}

const struct pv_filter_class pv_error_class = {
    .name = "error",
    .order = PV_ANYWHERE,
    .size = sizeof(struct error),
    .types = PV_ALL_TYPES,
    .open = error_open,
    .request = error_request,
    .completed = error_completed,
    .set = error_open,
    .figures = error_figures,
};
