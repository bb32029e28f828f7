/*
 * Verdicts that hold for a mount and an operation until the policy changes. Unique mount IDs are never reused, so an
 * entry can be forgotten but never be wrong. Where IDs are reused, there are none. Direct-mapped: a collision costs a
 * question, nothing else.
 */
#include "guard.h"

enum { ENTRIES = 1024, FOREIGN = 256, OPS = 4, VERDICT_CONTINUE = 255 };

struct entry {
	uint64_t mnt_id;
	uint8_t verdict[OPS];          /* 0: not known; 255: CONTINUE; else an errno */
};

static struct entry entries[ENTRIES];

/*
 * Devices that carry nothing of ours, by the low bits of their number. The kernel gives the number of a dead anonymous
 * device to a later one, so an entry goes when we attach a composite of that device: nobody else brings a procfs or
 * sysfs here.
 */
static atomic_uint foreign[FOREIGN];

/* Devices that are a procfs or a sysfs, the same way; for a dead one's successor a question is asked in vain. */
static atomic_uint bases[FOREIGN];

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
	if (ix_guard_state.ids_return || (int)op < 1 || (int)op > OPS || error < 0 || error >= VERDICT_CONTINUE)
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
	for (int i = 0; i < FOREIGN; i++) {
		atomic_store(&foreign[i], 0);
		atomic_store(&bases[i], 0);
	}
	pthread_mutex_unlock(&ix_guard_state.cache_lock);
}

/* Only an anonymous device, whose major number is 0, can be a procfs, a sysfs, the view or a tmpfs of shields. */
bool ix_cache_is_foreign(const struct ix_stat *st)
{
	return st->dev_major != 0 || (st->dev_minor != 0 && atomic_load(&foreign[st->dev_minor % FOREIGN]) == st->dev_minor);
}

void ix_cache_put_foreign(const struct ix_stat *st)
{
	if (st->dev_major == 0)
		atomic_store(&foreign[st->dev_minor % FOREIGN], st->dev_minor);
}

bool ix_cache_is_base(const struct ix_stat *st)
{
	return st->dev_major == 0 && st->dev_minor != 0 && atomic_load(&bases[st->dev_minor % FOREIGN]) == st->dev_minor;
}

void ix_cache_put_base(const struct ix_stat *st)
{
	if (st->dev_major == 0)
		atomic_store(&bases[st->dev_minor % FOREIGN], st->dev_minor);
}

void ix_cache_forget_foreign(const struct ix_stat *st)
{
	atomic_store(&foreign[st->dev_minor % FOREIGN], 0);
}
