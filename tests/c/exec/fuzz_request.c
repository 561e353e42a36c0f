/* Any bytes are a request or EINVAL. */
#include "exec/exec.h"

#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct hv_exec_request request;
    char *copy = malloc(size ? size : 1);
    int err = 0;

    if (!copy)
        return 0;
    memcpy(copy, data, size);
    if (!hv_exec_request_parse(copy, size, &request, &err) && (!request.argc || request.argv[request.argc]))
        abort();
    hv_exec_request_destroy(&request);
    return 0;
}
