/* Every call, while somebody follows (`interceptor events`): counted in the journal, where the daemon looks now and then. */
#include "guard.h"

enum { PROBES = 8 };

static bool alike(const struct ix_seen *a, const struct ix_seen *b)
{
	return a->tid == b->tid && a->kind == b->kind && a->verdict == b->verdict && a->error == b->error &&
	       strcmp(a->path, b->path) == 0;
}

static uint64_t hash_of(const struct ix_seen *row)
{
	uint64_t h = 0xcbf29ce484222325ULL ^ ((uint64_t)row->tid << 16) ^ (row->kind << 8) ^ row->verdict;
	for (const char *p = row->path; *p; p++)
		h = (h ^ (uint8_t)*p) * 0x100000001b3ULL;
	return h >> 32;
}

/* The row for calls like this one, or that of the oldest in reach, which has to go. Under stats_lock. */
static struct ix_seen *row_for(const struct ix_seen *wanted, bool *found)
{
	struct ix_seen *rows = ix_guard_state.journal->seen, *oldest = NULL;
	uint64_t start = hash_of(wanted);
	*found = true;
	for (uint64_t i = 0; i < PROBES; i++) {
		struct ix_seen *row = &rows[(start + i) % IX_SEEN];
		if (row->done && alike(row, wanted))
			return row;
		if (!oldest || row->last_ns < oldest->last_ns)
			oldest = row;
	}
	*found = false;
	return oldest;
}

static void say_who(struct ix_seen *row)
{
	cleanup_close int fd = ix_open_caller(ix_guard_state.proc, row->tid, "comm", O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, row->comm, sizeof(row->comm) - 1);
	row->comm[n < 0 ? 0 : n] = '\0';
	row->comm[strcspn(row->comm, "\n")] = '\0';
	ix_unit_of(row->tid, row->unit);
}

/* Whoever reads meanwhile sees by `begun` that the row is not as `done` says: they lie at its ends. */
static void write_row(struct ix_seen *row, const struct ix_seen *from)
{
	uint64_t version = ++ix_guard_state.journal->versions;
	__atomic_store_n(&row->begun, version, __ATOMIC_RELEASE);
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	memcpy(&row->count, &from->count, offsetof(struct ix_seen, begun) - offsetof(struct ix_seen, count));
	__atomic_store_n(&row->done, version, __ATOMIC_RELEASE);
}

static bool add(const struct ix_seen *seen, bool is_known)
{
	struct ix_journal *journal = ix_guard_state.journal;
	bool found;
	pthread_mutex_lock(&ix_guard_state.stats_lock);
	struct ix_seen *row = row_for(seen, &found);
	if (found) {
		__atomic_store_n(&row->count, row->count + 1, __ATOMIC_RELAXED);
		row->last_ns = seen->last_ns;
	} else if (is_known) {
		write_row(row, seen);
	}
	if (found || is_known)
		__atomic_add_fetch(&journal->noted, 1, __ATOMIC_RELAXED);
	pthread_mutex_unlock(&ix_guard_state.stats_lock);
	return found || is_known;
}

void ix_tally(const struct ix_call *call, const struct ix_reply *reply)
{
	if (!atomic_load_explicit(&ix_guard_state.followed, memory_order_relaxed))
		return;
	struct ix_seen seen = {
		.count = 1, .last_ns = call->slot->since_ns, .tid = call->tid, .kind = call->kind,
		.verdict = reply->outcome, .error = reply->outcome == IX_CONTINUED ? 0 : reply->error,
	};
	const char *path = call->path[0] ? call->path : call->text, *reason = reply->reason ? reply->reason : "";
	memcpy(seen.path, path, strnlen(path, sizeof(seen.path) - 1));
	memcpy(seen.reason, reason, strnlen(reason, sizeof(seen.reason) - 1));
	if (add(&seen, false))
		return;
	/* What makes a call stand out is looked up once, and not under the lock. */
	say_who(&seen);
	add(&seen, true);
}
