/* No sequences for this architecture (or -DPV_PERCPU_PORTABLE): every operation takes the slow way, by atomic instructions. */
#ifndef PV_SEQUENCES_NONE_H
#define PV_SEQUENCES_NONE_H

#define PV_HAS_SEQUENCES 0

#define PV_NO_SEQUENCE(name, ...)                       \
    static inline enum pv_sequence name(__VA_ARGS__)    \
    {                                                   \
        return PV_SLOW;                                 \
    }
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
PV_NO_SEQUENCE(pv_seq_add, struct pv_percpu_ref ref, int64_t n)
PV_NO_SEQUENCE(pv_seq_load, struct pv_percpu_ref ref, uint64_t *out)
PV_NO_SEQUENCE(pv_seq_store, struct pv_percpu_ref ref, uint64_t value)
PV_NO_SEQUENCE(pv_seq_cas, struct pv_percpu_ref ref, uint64_t expected, uint64_t desired, uint64_t *seen)
PV_NO_SEQUENCE(pv_seq_push, struct pv_percpu_ref ref, struct pv_percpu_node *node)
PV_NO_SEQUENCE(pv_seq_pop, struct pv_percpu_ref ref, struct pv_percpu_node **out)
PV_NO_SEQUENCE(pv_seq_take, struct pv_percpu_ref ref, struct pv_percpu_node **out)
PV_NO_SEQUENCE(pv_seq_stack_push, struct pv_percpu_ref ref, uint64_t capacity, void *item)
PV_NO_SEQUENCE(pv_seq_stack_pop, struct pv_percpu_ref ref, void **out)
PV_NO_SEQUENCE(pv_seq_reserve, const struct pv_ring_shape *ring, uint64_t bytes, uint64_t header, char **out, uint64_t *head_out)
PV_NO_SEQUENCE(pv_seq_pad, const struct pv_ring_shape *ring, uint64_t head, uint64_t new_head, uint64_t header)
PV_NO_SEQUENCE(pv_seq_put4, struct pv_percpu_ref ref, int64_t data, uint64_t records, const uint64_t words[4])
#pragma GCC diagnostic pop

#endif
