/* The sequences of sequences.h for x86-64. rax is the CPU's number, then the room; rcx and rdx are scratch. */
#ifndef PV_SEQUENCES_X86_64_H
#define PV_SEQUENCES_X86_64_H

#define PV_HAS_SEQUENCES 1

#ifdef PV_PERCPU_INJECT
#define PV_SEQ_INJECT "movl $" PV_STRINGIFY(PV_PERCPU_INJECT) ", %%ecx\n5:\tdecl %%ecx\n\tjnz 5b\n\t"
#else
#define PV_SEQ_INJECT
#endif

/* 99: the descriptor, 1: start, 2: behind the commit, 3: arm, 4: abort. */
#define PV_SEQ_START                                                                                  \
    ".pushsection pv_percpu_cs, \"aw\"\n\t.balign 32\n99:\n\t.long 0, 0\n\t.quad 1f, 2f - 1f, 4f\n\t" \
    ".popsection\n"                                                                                   \
    "3:\n\tleaq 99b(%%rip), %%rax\n\t"                                                                \
    "movq %%rax, %%fs:" PV_STRINGIFY(PV_RSEQ_CS) "(%[offset])\n"                                      \
    "1:\n\t" PV_SEQ_INJECT                                                                            \
    "movl %%fs:" PV_STRINGIFY(PV_RSEQ_CPU_ID) "(%[offset]), %%eax\n\t"                                \
    "cmpl %[limit], %%eax\n\t"                                                                        \
    "jae %l[slow]\n\t" PV_SEQ_INJECT                                                                  \
    "shlq $" PV_STRINGIFY(PV_PERCPU_SHIFT) ", %%rax\n\t"
#define PV_SEQ_ROOM PV_SEQ_START "addq %[base], %%rax\n\t"
/* Closes the sequence behind its commit. The signature is the kernel's condition for jumping there; its first bytes make it ud1. */
#define PV_SEQ_END                                                                   \
    "\n2:\n\t"                                                                       \
    ".pushsection pv_percpu_abort, \"ax\"\n\t.byte 0x0f, 0xb9, 0x3d\n\t.long 0x53053053\n" \
    "4:\n\tlock incq pv_percpu_aborts(%%rip)\n\tjmp 3b\n\t.popsection\n"
#define PV_SEQ_IN(ref) [offset] "r"(pv_rseq_offset), [limit] "m"(*(ref).limit), [base] "r"((ref).base)
#define PV_SEQ_CLOBBERS "rax", "rcx", "rdx", "memory", "cc"

#ifdef PV_PERCPU_INJECT
#define PV_SEQ_FEW_CLOBBERS "rax", "rcx", "memory", "cc"
#else
#define PV_SEQ_FEW_CLOBBERS "rax", "memory", "cc"
#endif

static inline enum pv_sequence pv_seq_add(struct pv_percpu_ref ref, int64_t n)
{
    asm volatile goto(PV_SEQ_START "addq %[n], (%[base], %%rax)" PV_SEQ_END
             : : PV_SEQ_IN(ref), [n] "er"(n) : PV_SEQ_FEW_CLOBBERS : slow);
    return PV_DONE;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_load(struct pv_percpu_ref ref, uint64_t *out)
{
    uint64_t value;

    asm volatile goto(PV_SEQ_START "movq (%[base], %%rax), %[value]" PV_SEQ_END
             : [value] "=&r"(value) : PV_SEQ_IN(ref) : PV_SEQ_FEW_CLOBBERS : slow);
    *out = value;
    return PV_DONE;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_store(struct pv_percpu_ref ref, uint64_t value)
{
    asm volatile goto(PV_SEQ_START "movq %[value], (%[base], %%rax)" PV_SEQ_END
             : : PV_SEQ_IN(ref), [value] "er"(value) : PV_SEQ_FEW_CLOBBERS : slow);
    return PV_DONE;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_cas(struct pv_percpu_ref ref, uint64_t expected, uint64_t desired, uint64_t *seen)
{
    asm volatile goto(PV_SEQ_ROOM "movq (%%rax), %%rcx\n\t"
             "movq %%rcx, (%[seen])\n\t" /* the caller's own: nobody else looks */
             "cmpq %[expected], %%rcx\n\t"
             "jne %l[differs]\n\t"
             "movq %[desired], (%%rax)" PV_SEQ_END
             : : PV_SEQ_IN(ref), [expected] "r"(expected), [desired] "r"(desired), [seen] "r"(seen)
             : PV_SEQ_CLOBBERS : slow, differs);
    return PV_DONE;
differs:
    return PV_DIFFERS;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_push(struct pv_percpu_ref ref, struct pv_percpu_node *node)
{
    asm volatile goto(PV_SEQ_ROOM "movq (%%rax), %%rcx\n\t"
             "movq %%rcx, (%[node])\n\t"
             "movq %[node], (%%rax)" PV_SEQ_END
             : : PV_SEQ_IN(ref), [node] "r"(node) : PV_SEQ_CLOBBERS : slow);
    return PV_DONE;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_pop(struct pv_percpu_ref ref, struct pv_percpu_node **out)
{
    struct pv_percpu_node *node;

    asm volatile goto(PV_SEQ_ROOM "movq (%%rax), %[node]\n\t"
             "testq %[node], %[node]\n\t"
             "jz %l[empty]\n\t"
             "movq (%[node]), %%rcx\n\t"
             "movq %%rcx, (%%rax)" PV_SEQ_END
             : [node] "=&r"(node) : PV_SEQ_IN(ref) : PV_SEQ_CLOBBERS : slow, empty);
    *out = node;
    return PV_DONE;
empty:
    return PV_EMPTY;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_take(struct pv_percpu_ref ref, struct pv_percpu_node **out)
{
    struct pv_percpu_node *node;

    asm volatile goto(PV_SEQ_ROOM "movq (%%rax), %[node]\n\t"
             "testq %[node], %[node]\n\t"
             "jz %l[empty]\n\t"
             "movq $0, (%%rax)" PV_SEQ_END
             : [node] "=&r"(node) : PV_SEQ_IN(ref) : PV_SEQ_CLOBBERS : slow, empty);
    *out = node;
    return PV_DONE;
empty:
    return PV_EMPTY;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_stack_push(struct pv_percpu_ref ref, uint64_t capacity, void *item)
{
    asm volatile goto(PV_SEQ_ROOM "movq (%%rax), %%rcx\n\t"
             "cmpq %[capacity], %%rcx\n\t"
             "jae %l[full]\n\t"
             "movq %[item], 8(%%rax, %%rcx, 8)\n\t"
             "incq %%rcx\n\t"
             "movq %%rcx, (%%rax)" PV_SEQ_END
             : : PV_SEQ_IN(ref), [capacity] "er"(capacity), [item] "r"(item) : PV_SEQ_CLOBBERS : slow, full);
    return PV_DONE;
full:
    return PV_FULL;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_stack_pop(struct pv_percpu_ref ref, void **out)
{
    void *item;

    asm volatile goto(PV_SEQ_ROOM "movq (%%rax), %%rcx\n\t"
             "testq %%rcx, %%rcx\n\t"
             "jz %l[empty]\n\t"
             "movq (%%rax, %%rcx, 8), %[item]\n\t"
             "decq %%rcx\n\t"
             "movq %%rcx, (%%rax)" PV_SEQ_END
             : [item] "=&r"(item) : PV_SEQ_IN(ref) : PV_SEQ_CLOBBERS : slow, empty);
    *out = item;
    return PV_DONE;
empty:
    return PV_EMPTY;
slow:
    return PV_SLOW;
}

/* Out: the record; on PV_WRAPS *head_out is the head that did not fit before the ring's end. */
static inline enum pv_sequence pv_seq_reserve(const struct pv_ring_shape *ring, uint64_t bytes, uint64_t header, char **out,
                                              uint64_t *head_out)
{
    char *record;

    asm volatile goto(PV_SEQ_ROOM "movq (%%rax), %%rcx\n\t"
             "leaq (%%rcx, %[bytes]), %%rdx\n\t"
             "subq " PV_STRINGIFY(PV_RING_TAIL) "(%%rax), %%rdx\n\t"
             "cmpq %[size], %%rdx\n\t"
             "ja %l[full]\n\t"
             "leaq -8(%[size]), %[record]\n\t"
             "andq %%rcx, %[record]\n\t"
             "leaq (%[record], %[bytes]), %%rdx\n\t"
             "movq %%rcx, (%[head_out])\n\t"
             "cmpq %[size], %%rdx\n\t"
             "ja %l[wraps]\n\t"
             "addq %[data], %[record]\n\t"
             "addq %%rax, %[record]\n\t"
             "movq %[header], (%[record])\n\t"
             "addq %[bytes], %%rcx\n\t"
             "movq %%rcx, (%%rax)" PV_SEQ_END
             : [record] "=&r"(record)
             : PV_SEQ_IN(ring->control), [bytes] "r"(bytes), [header] "r"(header), [size] "r"(ring->size),
               [data] "r"(ring->data), [head_out] "r"(head_out)
             : PV_SEQ_CLOBBERS : slow, full, wraps);
    *out = record;
    return PV_DONE;
full:
    return PV_FULL;
wraps:
    return PV_WRAPS;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_pad(const struct pv_ring_shape *ring, uint64_t head, uint64_t new_head, uint64_t header)
{
    int64_t at = ring->data + (int64_t)(head & (ring->size - 8));

    asm volatile goto(PV_SEQ_ROOM "cmpq %[head], (%%rax)\n\t"
             "jne %l[lost]\n\t"
             "movq %[new_head], %%rdx\n\t"
             "subq " PV_STRINGIFY(PV_RING_TAIL) "(%%rax), %%rdx\n\t"
             "cmpq %[size], %%rdx\n\t"
             "ja %l[lost]\n\t"
             "movq %[header], (%%rax, %[at])\n\t"
             "movq %[new_head], (%%rax)" PV_SEQ_END
             : : PV_SEQ_IN(ring->control), [head] "r"(head), [new_head] "r"(new_head), [header] "r"(header),
                 [size] "r"(ring->size), [at] "r"(at)
             : PV_SEQ_CLOBBERS : slow, lost);
    return PV_DONE;
lost:
    return PV_LOST;
slow:
    return PV_SLOW;
}

/* `records`: of 32 bytes each, a power of two. */
static inline enum pv_sequence pv_seq_put4(struct pv_percpu_ref ref, int64_t data, uint64_t records, const uint64_t words[4])
{
    asm volatile goto(PV_SEQ_ROOM "movq (%%rax), %%rcx\n\t"
             "leaq -1(%[records]), %%rdx\n\t"
             "andq %%rcx, %%rdx\n\t"
             "shlq $5, %%rdx\n\t"
             "addq %[data], %%rdx\n\t"
             "addq %%rax, %%rdx\n\t"
             "movq %[w0], (%%rdx)\n\t"
             "movq %[w1], 8(%%rdx)\n\t"
             "movq %[w2], 16(%%rdx)\n\t"
             "movq %[w3], 24(%%rdx)\n\t"
             "incq %%rcx\n\t"
             "movq %%rcx, (%%rax)" PV_SEQ_END
             : : PV_SEQ_IN(ref), [data] "r"(data), [records] "r"(records), [w0] "r"(words[0]), [w1] "r"(words[1]),
                 [w2] "r"(words[2]), [w3] "r"(words[3])
             : PV_SEQ_CLOBBERS : slow);
    return PV_DONE;
slow:
    return PV_SLOW;
}

#endif
