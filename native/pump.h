/* What the pump's own files share; Python sees none of it. */
#ifndef IX_PUMP_H
#define IX_PUMP_H

#include "compat.h"

/* Listings that were made a moment ago. All of this is the pump's thread's alone. */
struct ix_pages;
struct ix_pages *ix_pages_new(void);
void ix_pages_free(struct ix_pages *pages);
/* The part of `directory` from `offset` on, as it was asked for with that size; NULL if there is none any more. */
const char *ix_pages_give(struct ix_pages *pages, uint64_t directory, uint64_t offset, uint32_t size, int64_t now_ns,
			  size_t *len);
struct ix_pages *ix_pump_pages(struct ix_pump *pump);
int64_t ix_pump_now_ns(void);

#endif
