/* The page table's side of page_table.cc. */
#ifndef PAGE_TABLE_OURS_H
#define PAGE_TABLE_OURS_H

#ifdef __cplusplus
extern "C" {
#endif

/* Maps `regions` VADs of `pages_each` pages, one every `stride` bytes, each at its address as the offset. 0, or -1. */
int bench_setup(unsigned regions, unsigned pages_each, unsigned long stride);
unsigned long bench_lookup(unsigned long address);
/* The timed loops, with the walk inlined as in the fault server: the sum of all answers, and the last answer when each address is
 * changed by the bits of `mask` that the answer before it has. Inside bench_lock. */
unsigned long bench_sum(const unsigned long *addresses, unsigned long count);
unsigned long bench_chase(const unsigned long *addresses, unsigned long count, unsigned long mask);
void bench_lock(void);
void bench_unlock(void);
/* Lines "regions memory WHAT parts-of-mapped-memory". */
void bench_print_memory(unsigned regions);

#ifdef __cplusplus
}
#endif
#endif
