/* Calls that are repeated without effect, many a second: told to the daemon now and then, for its log. */
#include "guard.h"

static const uint64_t WINDOW_NS = 1000000000, SILENCE_NS = 10000000000;
enum { STORM_CALLS = 100 };            /* in WINDOW_NS */

void ix_count_repetition(const struct ix_call *call, enum ix_op op, uint64_t mnt_id)
{
	struct ix_repetition *r = &ix_guard_state.repetitions[mnt_id % IX_REPETITIONS];
	uint64_t now = call->slot->since_ns;
	/* Receivers that come here at the same time miscount; that is all the harm they do. */
	if (atomic_exchange_explicit(&r->mnt_id, mnt_id, memory_order_relaxed) != mnt_id) {
		atomic_store_explicit(&r->since_ns, now, memory_order_relaxed);
		atomic_store_explicit(&r->told_ns, 0, memory_order_relaxed);
		atomic_store_explicit(&r->recent, 0, memory_order_relaxed);
		atomic_store_explicit(&r->untold, 0, memory_order_relaxed);
	}
	atomic_fetch_add_explicit(&r->untold, 1, memory_order_relaxed);
	if (atomic_fetch_add_explicit(&r->recent, 1, memory_order_relaxed) + 1 < STORM_CALLS)
		return;
	atomic_store_explicit(&r->recent, 0, memory_order_relaxed);
	uint64_t since = atomic_exchange_explicit(&r->since_ns, now, memory_order_relaxed);
	uint64_t told = atomic_load_explicit(&r->told_ns, memory_order_relaxed);
	if (now - since > WINDOW_NS || (told && now - told < SILENCE_NS))
		return;
	atomic_store_explicit(&r->told_ns, now, memory_order_relaxed);
	struct ix_storm storm = {
		.type = IX_MSG_STORM, .op = op, .mnt_id = mnt_id, .tid = call->tid,
		.calls = atomic_exchange_explicit(&r->untold, 0, memory_order_relaxed),
	};
	ix_link_send(&storm, sizeof(storm), NULL, 0);
}
