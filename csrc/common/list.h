/* Doubly linked lists whose links lie in their members: no allocation, and a member can leave without knowing its
 * list. */
#ifndef PV_LIST_H
#define PV_LIST_H

#include <stdbool.h>
#include <stddef.h>

struct pv_link {
    struct pv_link *next, *prev; /* both NULL: on no list */
};

static inline void pv_list_init(struct pv_link *head)
{
    head->next = head->prev = head;
}

static inline bool pv_list_empty(const struct pv_link *head)
{
    return head->next == head;
}

static inline bool pv_linked(const struct pv_link *link)
{
    return link->next != NULL;
}

static inline void pv_list_append(struct pv_link *head, struct pv_link *link)
{
    link->prev = head->prev;
    link->next = head;
    head->prev->next = link;
    head->prev = link;
}

static inline void pv_list_remove(struct pv_link *link)
{
    if (!pv_linked(link))
        return;
    link->prev->next = link->next;
    link->next->prev = link->prev;
    link->next = link->prev = NULL;
}

#define pv_member(link, type, field) ((type *)((char *)(link) - offsetof(type, field)))

#endif
