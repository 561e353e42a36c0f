/* The sequences of sequences.h for aarch64. x9 is the CPU's number, then the room; x10 to x12 are scratch. */
#ifndef PV_SEQUENCES_AARCH64_H
#define PV_SEQUENCES_AARCH64_H

#define PV_HAS_SEQUENCES 1

#ifdef PV_PERCPU_INJECT
#define PV_SEQ_INJECT "mov x10, #" PV_STRINGIFY(PV_PERCPU_INJECT) "\n5:\tsubs x10, x10, #1\n\tb.ne 5b\n\t"
#else
#define PV_SEQ_INJECT
#endif

/* 99: the descriptor, 1: start, 2: behind the commit, 3: arm, 4: abort. */
#define PV_SEQ_START                                                                                     \
    ".pushsection pv_percpu_cs, \"aw\"\n\t.balign 32\n99:\n\t.word 0, 0\n\t.quad 1f, 2f - 1f, 4f\n\t"    \
    ".popsection\n"                                                                                      \
    "3:\n\tadrp x9, 99b\n\tadd x9, x9, :lo12:99b\n\t"                                                    \
    "str x9, [%[rseq], #" PV_STRINGIFY(PV_RSEQ_CS) "]\n"                                                 \
    "1:\n\t" PV_SEQ_INJECT                                                                               \
    "ldr w9, [%[rseq], #" PV_STRINGIFY(PV_RSEQ_CPU_ID) "]\n\t"                                           \
    "ldr w10, [%[limit]]\n\t"                                                                            \
    "cmp w9, w10\n\t"                                                                                    \
    "b.hs %l[slow]\n\t"                                                                                  \
    "add x9, %[base], x9, lsl #" PV_STRINGIFY(PV_PERCPU_SHIFT) "\n\t"
/* Closes the sequence behind its commit. The signature (a brk) is the kernel's condition for jumping there. */
#define PV_SEQ_END                                                                           \
    "\n2:\n\t"                                                                               \
    ".pushsection pv_percpu_abort, \"ax\"\n\t.inst 0xd428bc00\n"                             \
    "4:\n\tadrp x9, pv_percpu_aborts\n\tadd x9, x9, :lo12:pv_percpu_aborts\n"                \
    "6:\n\tldxr x10, [x9]\n\tadd x10, x10, #1\n\tstxr w11, x10, [x9]\n\tcbnz w11, 6b\n\t"    \
    "b 3b\n\t.popsection\n"
#define PV_SEQ_IN(ref)                                                                                \
    [rseq] "r"((char *)__builtin_thread_pointer() + pv_rseq_offset), [limit] "r"((ref).limit), [base] "r"((ref).base)
#define PV_SEQ_CLOBBERS "x9", "x10", "x11", "x12", "memory", "cc"

static inline enum pv_sequence pv_seq_add(struct pv_percpu_ref ref, int64_t n)
{
    asm volatile goto(PV_SEQ_START "ldr x10, [x9]\n\tadd x10, x10, %[n]\n\tstr x10, [x9]" PV_SEQ_END
                      : : PV_SEQ_IN(ref), [n] "r"(n) : PV_SEQ_CLOBBERS : slow);
    return PV_DONE;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_load(struct pv_percpu_ref ref, uint64_t *out)
{
    uint64_t value;

    asm volatile goto(PV_SEQ_START "ldr %[value], [x9]" PV_SEQ_END
                      : [value] "=&r"(value) : PV_SEQ_IN(ref) : PV_SEQ_CLOBBERS : slow);
    *out = value;
    return PV_DONE;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_store(struct pv_percpu_ref ref, uint64_t value)
{
    asm volatile goto(PV_SEQ_START "stlr %[value], [x9]" PV_SEQ_END
                      : : PV_SEQ_IN(ref), [value] "r"(value) : PV_SEQ_CLOBBERS : slow);
    return PV_DONE;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_cas(struct pv_percpu_ref ref, uint64_t expected, uint64_t desired, uint64_t *seen)
{
    asm volatile goto(PV_SEQ_START "ldr x10, [x9]\n\t"
                      "str x10, [%[seen]]\n\t" /* the caller's own: nobody else looks */
                      "cmp x10, %[expected]\n\t"
                      "b.ne %l[differs]\n\t"
                      "stlr %[desired], [x9]" PV_SEQ_END
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
    asm volatile goto(PV_SEQ_START "ldr x10, [x9]\n\tstr x10, [%[node]]\n\tstlr %[node], [x9]" PV_SEQ_END
                      : : PV_SEQ_IN(ref), [node] "r"(node) : PV_SEQ_CLOBBERS : slow);
    return PV_DONE;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_pop(struct pv_percpu_ref ref, struct pv_percpu_node **out)
{
    struct pv_percpu_node *node;

    asm volatile goto(PV_SEQ_START "ldr %[node], [x9]\n\t"
                      "cbz %[node], %l[empty]\n\t"
                      "ldr x10, [%[node]]\n\t"
                      "str x10, [x9]" PV_SEQ_END
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

    asm volatile goto(PV_SEQ_START "ldr %[node], [x9]\n\tcbz %[node], %l[empty]\n\tstr xzr, [x9]" PV_SEQ_END
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
    asm volatile goto(PV_SEQ_START "ldr x10, [x9]\n\t"
                      "cmp x10, %[capacity]\n\t"
                      "b.hs %l[full]\n\t"
                      "add x10, x10, #1\n\t"
                      "str %[item], [x9, x10, lsl #3]\n\t"
                      "str x10, [x9]" PV_SEQ_END
                      : : PV_SEQ_IN(ref), [capacity] "r"(capacity), [item] "r"(item) : PV_SEQ_CLOBBERS : slow, full);
    return PV_DONE;
full:
    return PV_FULL;
slow:
    return PV_SLOW;
}

static inline enum pv_sequence pv_seq_stack_pop(struct pv_percpu_ref ref, void **out)
{
    void *item;

    asm volatile goto(PV_SEQ_START "ldr x10, [x9]\n\t"
                      "cbz x10, %l[empty]\n\t"
                      "ldr %[item], [x9, x10, lsl #3]\n\t"
                      "sub x10, x10, #1\n\t"
                      "str x10, [x9]" PV_SEQ_END
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

    asm volatile goto(PV_SEQ_START "ldr x10, [x9]\n\t"
                      "add x11, x9, #" PV_STRINGIFY(PV_RING_TAIL) "\n\t"
                      "ldar x11, [x11]\n\t"
                      "add x12, x10, %[bytes]\n\t"
                      "sub x11, x12, x11\n\t"
                      "cmp x11, %[size]\n\t"
                      "b.hi %l[full]\n\t"
                      "sub x11, %[size], #8\n\t"
                      "and %[record], x10, x11\n\t"
                      "add x11, %[record], %[bytes]\n\t"
                      "str x10, [%[head_out]]\n\t"
                      "cmp x11, %[size]\n\t"
                      "b.hi %l[wraps]\n\t"
                      "add %[record], %[record], %[data]\n\t"
                      "add %[record], %[record], x9\n\t"
                      "str %[header], [%[record]]\n\t"
                      "stlr x12, [x9]" PV_SEQ_END
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

    asm volatile goto(PV_SEQ_START "ldr x10, [x9]\n\t"
                      "cmp x10, %[head]\n\t"
                      "b.ne %l[lost]\n\t"
                      "add x11, x9, #" PV_STRINGIFY(PV_RING_TAIL) "\n\t"
                      "ldar x11, [x11]\n\t"
                      "sub x11, %[new_head], x11\n\t"
                      "cmp x11, %[size]\n\t"
                      "b.hi %l[lost]\n\t"
                      "str %[header], [x9, %[at]]\n\t"
                      "stlr %[new_head], [x9]" PV_SEQ_END
                      : : PV_SEQ_IN(ring->control), [head] "r"(head), [new_head] "r"(new_head), [header] "r"(header),
                          [size] "r"(ring->size), [at] "r"(at)
                      : PV_SEQ_CLOBBERS : slow, lost);
    return PV_DONE;
lost:
    return PV_LOST;
slow:
    return PV_SLOW;
}

/* `records`: of 32 bytes each, a power of two. The barrier keeps the words behind the head that the last event left: a reader relies
 * on it. */
static inline enum pv_sequence pv_seq_put4(struct pv_percpu_ref ref, int64_t data, uint64_t records, const uint64_t words[4])
{
    asm volatile goto(PV_SEQ_START "dmb ishst\n\t"
                      "ldr x10, [x9]\n\t"
                      "sub x11, %[records], #1\n\t"
                      "and x11, x11, x10\n\t"
                      "add x11, %[data], x11, lsl #5\n\t"
                      "add x11, x11, x9\n\t"
                      "stp %[w0], %[w1], [x11]\n\t"
                      "stp %[w2], %[w3], [x11, #16]\n\t"
                      "add x10, x10, #1\n\t"
                      "stlr x10, [x9]" PV_SEQ_END
                      : : PV_SEQ_IN(ref), [data] "r"(data), [records] "r"(records), [w0] "r"(words[0]), [w1] "r"(words[1]),
                          [w2] "r"(words[2]), [w3] "r"(words[3])
                      : PV_SEQ_CLOBBERS : slow);
    return PV_DONE;
slow:
    return PV_SLOW;
}

#endif
