/*
 * Verdicts that hold for a mount and an operation until the policy changes. Unique mount IDs are never reused, so an
 * entry can be forgotten but never be wrong. Direct-mapped: a collision costs a question, nothing else.
 */
#include "guard.h"

enum { ENTRIES = 1024, OPS = 4, VERDICT_CONTINUE = 255 };

struct entry {
	uint64_t mnt_id;
	uint8_t verdict[OPS];          /* 0: not known; 255: CONTINUE; else an errno */
};

static struct entry entries[ENTRIES];

static struct entry *entry_of(uint64_t mnt_id)
{
	return &entries[(mnt_id * 0x9e3779b97f4a7c15ULL) >> 54];
}

/* 0: not known, 1: CONTINUE, 2: *error. */
int ix_cache_get(uint64_t mnt_id, enum ix_op op, int *error)
{
	struct entry *e = entry_of(mnt_id);
	int found = 0;
	pthread_mutex_lock(&ix_guard_state.cache_lock);
	if (e->mnt_id == mnt_id)
		found = e->verdict[op - 1];
	pthread_mutex_unlock(&ix_guard_state.cache_lock);
	if (found == 0)
		return 0;
	*error = found;
	return found == VERDICT_CONTINUE ? 1 : 2;
}

/* error 0: CONTINUE. */
void ix_cache_put(uint64_t mnt_id, enum ix_op op, int error)
{
	struct entry *e = entry_of(mnt_id);
	if ((int)op < 1 || (int)op > OPS || error < 0 || error >= VERDICT_CONTINUE)
		return;
	pthread_mutex_lock(&ix_guard_state.cache_lock);
	if (e->mnt_id != mnt_id)
		*e = (struct entry){.mnt_id = mnt_id};
	e->verdict[op - 1] = error ? (uint8_t)error : VERDICT_CONTINUE;
	pthread_mutex_unlock(&ix_guard_state.cache_lock);
}

void ix_cache_flush(void)
{
	pthread_mutex_lock(&ix_guard_state.cache_lock);
	memset(entries, 0, sizeof(entries));
	pthread_mutex_unlock(&ix_guard_state.cache_lock);
}
