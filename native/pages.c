/*
 * Parts of directories as interceptor/view/filesystem.py has listed them a moment ago, to be given out again without it.
 * Each time counts as a lookup of every node in it, which whoever keeps the counts learns of by ix_pump_page_given.
 *
 * A part has one slot that it can be in: keeping it drops what is there.
 */
#include "pump.h"

enum { SLOTS = 4096, BYTES_MAX = 16 << 20 };

struct page {
	uint64_t directory, offset, given;
	int64_t until_ns;
	uint32_t size, len;
	char *data;            /* NULL: empty slot */
};

struct ix_pages {
	bool given;
	size_t bytes;
	struct page slots[SLOTS];
};

struct ix_pages *ix_pages_new(void)
{
	return calloc(1, sizeof(struct ix_pages));
}

void ix_pages_free(struct ix_pages *pages)
{
	if (!pages)
		return;
	for (int i = 0; i < SLOTS; i++)
		free(pages->slots[i].data);
	free(pages);
}

int ix_pump_page_slot(uint64_t directory, uint64_t offset)
{
	return (int)((directory * 0x9E3779B97F4A7C15ULL ^ (offset * 0xC2B2AE3D27D4EB4FULL)) >> 48) % SLOTS;
}

const char *ix_pages_give(struct ix_pages *pages, uint64_t directory, uint64_t offset, uint32_t size, int64_t now_ns,
			  size_t *len)
{
	struct page *page = &pages->slots[ix_pump_page_slot(directory, offset)];
	if (!page->data || page->directory != directory || page->offset != offset || page->size != size ||
	    now_ns >= page->until_ns)
		return NULL;
	page->given++;
	pages->given = true;
	*len = page->len;
	return page->data;
}

void ix_pump_page_drop(struct ix_pump *pump, int slot)
{
	struct ix_pages *pages = ix_pump_pages(pump);
	pages->bytes -= pages->slots[slot].len;
	free(pages->slots[slot].data);
	pages->slots[slot] = (struct page){.data = NULL};
}

/* The slot that it is in now, -ENOSPC where there is too much already, -ENOMEM. */
int ix_pump_page_keep(struct ix_pump *pump, uint64_t directory, uint64_t offset, uint32_t size, int64_t life_ns,
		      const char *data, size_t len)
{
	struct ix_pages *pages = ix_pump_pages(pump);
	int slot = ix_pump_page_slot(directory, offset);
	ix_pump_page_drop(pump, slot);
	if (len > size || pages->bytes + len > BYTES_MAX)
		return -ENOSPC;
	char *copy = malloc(len + 1);
	if (!copy)
		return -ENOMEM;
	memcpy(copy, data, len);
	pages->bytes += len;
	pages->slots[slot] = (struct page){.directory = directory, .offset = offset, .size = size, .len = (uint32_t)len,
					   .data = copy, .until_ns = ix_pump_now_ns() + life_ns};
	return slot;
}

/* How often it was given out since this was asked last. */
uint64_t ix_pump_page_given(struct ix_pump *pump, int slot)
{
	struct page *page = &ix_pump_pages(pump)->slots[slot];
	uint64_t given = page->given;
	page->given = 0;
	return given;
}

/* Whether any was since this was asked last. */
bool ix_pump_pages_given(struct ix_pump *pump)
{
	struct ix_pages *pages = ix_pump_pages(pump);
	bool given = pages->given;
	pages->given = false;
	return given;
}
