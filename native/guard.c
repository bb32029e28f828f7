/* The guard: one process a container, in the container's user namespace; a call from its receipt to its reply. */
#include "guard.h"

#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/utsname.h>
#include <time.h>

struct ix_guard_state ix_guard_state;

enum { SLEEP_TRIES = 1000, LOCK_TRIES = 4, FRESH_NS = 10000 };

static struct ix_slot *slot_at(int i)
{
	return &ix_guard_state.journal->slots[i];
}

int ix_slots_used(void)
{
	uint64_t used = __atomic_load_n(&ix_guard_state.journal->slots_used, __ATOMIC_ACQUIRE);
	return used < IX_SLOTS ? (int)used : IX_SLOTS;
}

static struct seccomp_notif *notif_of(struct ix_slot *slot)
{
	return (struct seccomp_notif *)(void *)slot->notif;
}

static uint64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* Whether `a` is an earlier call of the same thread than `b`. IDs of a listener only grow (kernel/seccomp.c). */
static bool earlier(struct ix_slot *a, struct ix_slot *b)
{
	const struct seccomp_notif *x = notif_of(a), *y = notif_of(b);
	return a != b && x->id != 0 && x->pid == y->pid && a->listener == b->listener && (int64_t)(x->id - y->id) < 0;
}

static bool has_earlier(struct ix_slot *slot)
{
	for (int i = 0; i < ix_slots_used(); i++)
		if (earlier(slot_at(i), slot))
			return true;
	return false;
}

/*
 * A signal breaks a call off while we are at it, and the thread makes it again: now there are two, and no thread waits
 * for the first. What becomes of that must be known before the second is looked at. Returns whether its caller waits.
 */
static bool await_turn(struct ix_call *call)
{
	struct ix_guard_state *g = &ix_guard_state;
	bool *awaits = &g->awaits[call->slot - g->journal->slots];
	if (atomic_load(&g->busy) < 2)
		return true;
	ix_step_down(call);
	pthread_mutex_lock(&g->turn_lock);
	bool waited = false;
	while (has_earlier(call->slot)) {
		/* Of those that wait only the newest has a caller: the others need not go on. */
		if (!waited)
			pthread_cond_broadcast(&g->turn_over);
		waited = *awaits = true;
		pthread_cond_wait(&g->turn_over, &g->turn_lock);
		if (!ix_still_waiting(call))
			break;
	}
	*awaits = false;
	pthread_mutex_unlock(&g->turn_lock);
	return !waited || ix_still_waiting(call);
}

/* Whether somebody wants the effect: the caller, or the caller once more. That one gets the result as an orphan's. */
bool ix_still_wanted(struct ix_call *call)
{
	struct ix_guard_state *g = &ix_guard_state;
	const struct seccomp_notif *mine = notif_of(call->slot);
	if (ix_still_waiting(call))
		return true;
	struct ix_context here = ix_context_of(call->tid);
	if (!ix_same_context(&call->context, &here))
		return false;
	bool wanted = false;
	pthread_mutex_lock(&g->turn_lock);
	for (int i = 0; i < ix_slots_used() && !wanted; i++) {
		const struct seccomp_notif *again = notif_of(slot_at(i));
		uint64_t id = again->id;
		/* Equal in everything: architecture, number, arguments, and the instruction it comes from. */
		wanted = g->awaits[i] && earlier(call->slot, slot_at(i)) &&
			 memcmp(&again->data, &mine->data, sizeof(mine->data)) == 0 &&
			 ioctl(call->listener->fd, SECCOMP_IOCTL_NOTIF_ID_VALID, &id) == 0;
	}
	pthread_mutex_unlock(&g->turn_lock);
	return wanted;
}

static void count(uint64_t *counter)
{
	__atomic_add_fetch(counter, 1, __ATOMIC_RELAXED);
}

/* Eight buckets an octave from 256 ns on; interceptor/guards/journal.py reads them back. */
static void record(enum ix_kind kind, enum ix_outcome outcome, uint64_t ns)
{
	struct ix_histogram *h = &ix_guard_state.journal->latency[kind][outcome];
	unsigned int bucket = 0;
	if (ns >= 256) {
		unsigned int octave = 63 - (unsigned int)__builtin_clzll(ns);
		bucket = (octave - 8) * 8 + (unsigned int)((ns >> (octave - 3)) & 7);
	}
	if (bucket >= IX_BUCKETS)
		bucket = IX_BUCKETS - 1;
	__atomic_add_fetch(&h->sum_ns, ns, __ATOMIC_RELAXED);
	count(&h->buckets[bucket]);
}

bool ix_still_waiting(const struct ix_call *call)
{
	uint64_t id = call->id;
	return ioctl(call->listener->fd, SECCOMP_IOCTL_NOTIF_ID_VALID, &id) == 0;
}

bool ix_question(struct ix_call *call, struct ix_ask *ask, const int *fds, int fd_count)
{
	struct ix_question *q = call->question;
	struct timespec deadline;
	uint64_t ms = ix_guard_state.config.question_timeout_ms;
	clock_gettime(CLOCK_MONOTONIC, &deadline);
	deadline.tv_sec += (time_t)(ms / 1000);
	deadline.tv_nsec += (long)(ms % 1000) * 1000000;
	if (deadline.tv_nsec >= 1000000000) {
		deadline.tv_sec++;
		deadline.tv_nsec -= 1000000000;
	}
	count(&ix_guard_state.journal->asked);
	count(&ix_guard_state.journal->waiting);
	pthread_mutex_lock(&q->lock);
	uint64_t turn = atomic_fetch_add(&ix_guard_state.next_seq, 1);
	ask->seq = turn * IX_SLOTS + (uint64_t)(q - ix_guard_state.questions);
	q->ask = *ask;
	memcpy(q->fds, fds, (size_t)fd_count * sizeof(int));
	q->fd_count = fd_count;
	q->seq = ask->seq;
	q->done = false;
	q->answer_fd = -1;
	/* A full link means that nobody reads it: then the deadline decides, and a successor is asked again. */
	ix_link_send(&q->ask, sizeof(q->ask), fds, fd_count);
	pthread_mutex_unlock(&q->lock);
	/* Somebody else receives meanwhile; after the daemon was woken, since that is the longer way. */
	ix_step_down(call);
	pthread_mutex_lock(&q->lock);
	while (!q->done && pthread_cond_clockwait(&q->answered, &q->lock, CLOCK_MONOTONIC, &deadline) == 0)
		;
	bool answered = q->done;
	q->seq = 0;
	pthread_mutex_unlock(&q->lock);
	__atomic_sub_fetch(&ix_guard_state.journal->waiting, 1, __ATOMIC_RELAXED);
	return answered;
}

/* ---- orphans: effects whose caller was interrupted before it could be told --------------------------------- */

/*
 * The mount that stands where the effect took place: for mount and umount what the target leads to, for move_mount what
 * was moved. 0 where nothing is there.
 */
static uint64_t mount_after(struct ix_call *call, const struct seccomp_notif *n)
{
	struct ix_stat st;
	cleanup_close int fd = -1;
	uint64_t path = call->args[n->data.nr == SYS_mount];
	if (n->data.nr == SYS_move_mount)
		fd = ix_resolve_moved(call);
	/* A successor has not read the path yet. */
	else if (call->path[0] || ix_read_string(call->tid, path, call->path, sizeof(call->path)) >= 0)
		fd = ix_resolve(ix_guard_state.proc, call->tid, AT_FDCWD, call->path, true);
	return fd < 0 || ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0 ? 0 : st.mnt_id;
}

/* A place for an orphan of this thread: the one it has, a free one, the oldest. Under orphan_lock. */
static struct ix_orphan *place_of(int tid)
{
	struct ix_orphan *orphans = ix_guard_state.journal->orphans, *found = &orphans[0];
	for (int i = 0; i < IX_ORPHANS; i++) {
		if (orphans[i].tid == tid)
			return &orphans[i];
		if (found->tid != 0 && (orphans[i].tid == 0 || (int32_t)(orphans[i].order - found->order) < 0))
			found = &orphans[i];
	}
	return found;
}

/* Frees an orphan's place; a descriptor that was kept for it is the caller's, or -1. Under orphan_lock. */
static int clear_orphan(struct ix_orphan *o, int *placed)
{
	ptrdiff_t i = o - ix_guard_state.journal->orphans;
	int *kept = &ix_guard_state.orphan_fds[i], fd = *kept - 1;
	*kept = 0;
	*placed = ix_guard_state.orphan_placed[i];
	ix_guard_state.orphan_placed[i] = 0;
	memset(o, 0, sizeof(*o));
	return fd;
}

/* Takes the descriptor that the call was to return, if any, and maybe has put into the caller's table. */
static void remember_orphan(struct ix_call *call, const struct seccomp_notif *n, int result, int given, int placed)
{
	struct ix_guard_state *g = &ix_guard_state;
	cleanup_close int fd = given;
	uint64_t after_id = given < 0 ? mount_after(call, n) : 0;
	/* A context or a clone is made again as well; a context that was mounted is used up. */
	if (given < 0 ? after_id == 0 : n->data.nr != SYS_fsmount && !placed)
		return;
	pthread_mutex_lock(&g->orphan_lock);
	struct ix_orphan *o = place_of(call->tid);
	int former, old = clear_orphan(o, &former);
	*o = (struct ix_orphan){
		.tid = call->tid, .nr = n->data.nr, .instruction_pointer = n->data.instruction_pointer,
		.after_id = after_id, .context = call->context, .result = result,
		.order = (uint32_t)__atomic_add_fetch(&g->journal->orphaned, 1, __ATOMIC_RELEASE),
	};
	memcpy(o->args, n->data.args, sizeof(o->args));
	if (fd >= 0) {
		g->orphan_fds[o - g->journal->orphans] = ix_take_fd(&fd) + 1;
		g->orphan_placed[o - g->journal->orphans] = placed;
	}
	pthread_mutex_unlock(&g->orphan_lock);
	ix_close_fd(&old);
}

/* Whether a descriptor is in the caller's table still, where it was put before. */
static bool is_still_there(const struct ix_call *call, int placed, int fd)
{
	cleanup_close int theirs = placed ? ix_fetch_fd(call, placed - 1) : -1;
	return theirs >= 0 && ix_same_file(theirs, fd) == 1;
}

/*
 * Whether this is a restart of a call whose effect has taken place. It must be the thread's very next call, with the
 * same arguments from the same instruction and the same place, and lead to what the effect left there.
 */
static bool adopt_orphan(struct ix_call *call, const struct seccomp_notif *n, struct ix_reply *reply)
{
	struct ix_guard_state *g = &ix_guard_state;
	pthread_mutex_lock(&g->orphan_lock);
	struct ix_orphan *o = place_of(call->tid), found = *o;
	int placed = 0;
	cleanup_close int fd = found.tid == call->tid ? clear_orphan(o, &placed) : -1;
	pthread_mutex_unlock(&g->orphan_lock);
	if (found.tid != call->tid || found.nr != n->data.nr || found.instruction_pointer != n->data.instruction_pointer ||
	    memcmp(found.args, n->data.args, sizeof(found.args)) != 0)
		return false;
	struct ix_context here = ix_context_of(call->tid);
	if (!ix_same_context(&found.context, &here))
		return false;
	if (found.after_id == 0) {
		if (fd < 0)
			return false;
		*reply = (struct ix_reply){.outcome = IX_HANDLED, .give_cloexec = found.result};
		reply->placed = is_still_there(call, placed, fd) ? placed : 0;
		reply->give = ix_take_fd(&fd) + 1;
		return true;
	}
	if (mount_after(call, n) != found.after_id)
		return false;
	*reply = ix_acted(call, found.result);
	return true;
}

/* ---- a call from receipt to reply -------------------------------------------------------------------------- */

static struct ix_reply answer_at_random(struct ix_call *call, const struct seccomp_notif *n)
{
	static const int errors[] = {0, EPERM, EINVAL, EBUSY, ENOENT};
	unsigned int r = (unsigned int)random();
	if (r % 4 == 0)
		return ix_handle(call, n->data.arch, n->data.nr);
	if (r % 4 == 1)
		return ix_deny(errors[(r / 4) % 5]);
	return ix_let_kernel_run("a test guard that decides at random");
}

static struct ix_reply examine(struct ix_call *call, const struct seccomp_notif *n, bool recover)
{
	int result;
	if (ix_guard_state.config.mode == 1)
		return ix_let_kernel_run("a test guard that lets everything through");
	if (recover && call->slot->phase >= IX_PHASE_ACTING) {
		call->mntns = ix_open_caller(ix_guard_state.proc, call->tid, "ns/mnt", O_RDONLY);
		call->context = ix_context_of(call->tid);
		if (!ix_still_waiting(call))
			memset(&call->context, 0, sizeof(call->context));
		if (ix_act_recover(call, &result))
			return ix_acted(call, result);
	}
	call->slot->phase = IX_PHASE_RECEIVED;
	if (!await_turn(call))
		return ix_deny(EINTR);
	struct ix_reply reply;
	if (__atomic_load_n(&ix_guard_state.journal->orphaned, __ATOMIC_ACQUIRE) && adopt_orphan(call, n, &reply))
		return reply;
	if (ix_guard_state.config.mode == 2)
		return answer_at_random(call, n);
	return ix_handle(call, n->data.arch, n->data.nr);
}

void ix_forget(struct ix_slot *slot)
{
	slot->phase = IX_PHASE_IDLE;
	slot->since_ns = 0;
	memset(slot->notif, 0, sizeof(slot->notif));
}

static void end_call(struct ix_slot *slot)
{
	struct ix_guard_state *g = &ix_guard_state;
	ix_forget(slot);
	/* Who waits for this one's end was busy before it looked for it. */
	if (atomic_fetch_sub(&g->busy, 1) == 1)
		return;
	pthread_mutex_lock(&g->turn_lock);
	pthread_cond_broadcast(&g->turn_over);
	pthread_mutex_unlock(&g->turn_lock);
}

static int ask_listener(const struct ix_call *call, unsigned long request, void *argument)
{
	int r;
	do
		r = ix_result(ioctl(call->listener->fd, request, argument));
	while (r == -EINTR);
	return r;
}

/*
 * Linux 5.19 to 6.16: a caller with WAIT_KILLABLE_RECV that slept before its call was received wakes up at one signal
 * more, which can meet the reply. It lies down anew, for good, when it was handed a descriptor; even one that has no
 * place: newfd is more than fs.nr_open can be, so that it fails with EBADF (kernel/seccomp.c:should_sleep_killable,
 * fs/file.c:replace_fd).
 */
void ix_settle(const struct ix_call *call)
{
	struct seccomp_notif_addfd add = {
		.id = call->id,
		.flags = SECCOMP_ADDFD_FLAG_SETFD,
		.srcfd = (uint32_t)ix_guard_state.pebble,
		.newfd = INT_MAX,
		.newfd_flags = O_CLOEXEC,
	};
	if (ix_guard_state.pebble >= 0)
		ask_listener(call, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
}

/* What ix_settle throws: nothing where the kernel needs none. */
static int make_pebble(void)
{
	struct utsname kernel;
	unsigned int major, minor;
	if (uname(&kernel) < 0 || sscanf(kernel.release, "%u.%u", &major, &minor) != 2)
		major = minor = 0;
	return major > 6 || (major == 6 && minor >= 17) ? -1 : eventfd(0, EFD_CLOEXEC);
}

/*
 * A reply that meets the caller on its way out of an interrupted wait is thrown away, though SECCOMP_IOCTL_NOTIF_SEND
 * reports success (kernel/seccomp.c:seccomp_do_user_notification), unless it has WAIT_KILLABLE_RECV and is settled. A
 * caller that sleeps is not on its way; one that was woken is soon asleep or gone, and then the reply finds nobody. One
 * that sleeps uninterruptibly may do so on its way, for the listener's lock; for long only where it waits for the reply.
 * Less time passes between look and reply than a woken caller needs to get there: the file is open before the look, and
 * what was seen before somebody else had this processor is looked at once more.
 */
static void await_sleep(const struct ix_call *call)
{
	cleanup_close int fd = ix_open_caller(ix_guard_state.proc, call->tid, "stat", O_RDONLY);
	for (int tries = 0; tries < SLEEP_TRIES; tries++) {
		uint64_t since = now_ns();
		char state = ix_read_state(fd);
		bool sleeps = state != 'R' && (state != 'D' || tries >= LOCK_TRIES);
		if (sleeps ? now_ns() - since < FRESH_NS : !ix_still_waiting(call))
			return;
		if (!sleeps)
			sched_yield();
	}
}

/*
 * Puts a descriptor into the caller's table and ends its call with the number: in one step, or, before 5.14, in two. A
 * caller that is interrupted between these has the descriptor already when it makes the call again.
 */
static int give(const struct ix_call *call, struct ix_reply *reply)
{
	struct seccomp_notif_addfd add = {
		.id = call->id,
		.flags = SECCOMP_ADDFD_FLAG_SEND,
		.srcfd = (uint32_t)(reply->give - 1),
		.newfd_flags = reply->give_cloexec ? O_CLOEXEC : 0,
	};
	int r = reply->placed ? -EINVAL : ask_listener(call, SECCOMP_IOCTL_NOTIF_ADDFD, &add);
	if (r != -EINVAL)
		return r;
	add.flags = 0;
	r = reply->placed ? reply->placed - 1 : ask_listener(call, IX_NOTIF_ADDFD_ALONE, &add);
	if (r < 0)
		return r;
	reply->placed = r + 1;
	struct seccomp_notif_resp resp = {.id = call->id, .val = r};
	await_sleep(call);
	return ask_listener(call, SECCOMP_IOCTL_NOTIF_SEND, &resp);
}

/* Takes reply->give. */
static void send_reply(struct ix_call *call, struct ix_reply *reply)
{
	if (call->slot->phase == IX_PHASE_ACTED)
		await_sleep(call);
	struct seccomp_notif n = *notif_of(call->slot);
	struct seccomp_notif_resp resp = {.id = n.id};
	if (reply->outcome == IX_CONTINUED)
		resp.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
	else
		resp.error = -reply->error;
	cleanup_close int given = reply->give - 1;
	int r = -1;
	if (given >= 0 && reply->error == 0) {
		r = give(call, reply);
		resp.error = -EMFILE;  /* what is left to say if the caller's table is full */
	}
	if (r < 0 && !reply->placed)
		r = ask_listener(call, SECCOMP_IOCTL_NOTIF_SEND, &resp);
	if (r >= 0)
		return;
	count(&ix_guard_state.journal->lost);
	if (given >= 0 && reply->error == 0)
		remember_orphan(call, &n, reply->give_cloexec, ix_take_fd(&given), reply->placed);
	else if (reply->outcome == IX_HANDLED && call->slot->phase == IX_PHASE_ACTED)
		remember_orphan(call, &n, -reply->error, -1, 0);
}

/* After the reply: the daemon then makes another one. */
static void tell_taken(const struct ix_call *call)
{
	struct ix_note note = {.type = IX_MSG_TAKEN, .value = call->taken};
	if (call->taken)
		ix_link_send(&note, sizeof(note), NULL, 0);
}

void ix_serve_call(struct ix_listener *listener, struct ix_slot *slot, int turn, bool overloaded, bool recover)
{
	struct ix_call call;
	const struct seccomp_notif *n = notif_of(slot);
	call.slot = slot;
	call.question = &ix_guard_state.questions[slot - ix_guard_state.journal->slots];
	call.question->answer_fd = -1;
	call.listener = listener;
	call.turn = turn;
	call.tid = (int)n->pid;
	call.id = n->id;
	memcpy(call.args, n->data.args, sizeof(call.args));
	call.mntns = call.target = -1;
	memset(&call.context, 0, sizeof(call.context));
	call.kind = IX_KIND_OTHER;
	call.taken = 0;
	call.path[0] = call.text[0] = '\0';
	uint64_t start = now_ns();
	slot->since_ns = start;
	struct ix_reply reply = overloaded ? ix_let_kernel_run("every receiver is stuck: the welds hold")
					   : examine(&call, n, recover);
	/* Before the reply: a descriptor of ours on the mount would make the caller's umount fail with EBUSY. */
	ix_close_fd(&call.target);
	ix_close_fd(&call.mntns);
	ix_close_fd(&call.question->answer_fd);
	call.question->answer_fd = -1;
	atomic_fetch_sub(&listener->serving, 1);
	/* Before the reply: afterwards the caller may be gone, and its unit with it. */
	ix_tally(&call, &reply);
	send_reply(&call, &reply);
	tell_taken(&call);
	record(call.kind, reply.outcome, now_ns() - start);
	if (overloaded)
		count(&ix_guard_state.journal->overloaded);
	end_call(slot);
}

int ix_guard(int link_fd, int journal_fd, int proc_fd, const struct ix_guard_config *config)
{
	struct ix_guard_state *g = &ix_guard_state;
	g->config = *config;
	g->link = link_fd;
	g->proc = proc_fd;
	g->home = ix_open_caller(proc_fd, getpid(), "ns/mnt", O_RDONLY);
	g->journal = mmap(NULL, sizeof(struct ix_journal), PROT_READ | PROT_WRITE, MAP_SHARED, journal_fd, 0);
	struct ix_stat home;
	if (g->home < 0 || g->journal == MAP_FAILED || ix_statx(g->home, "", AT_EMPTY_PATH, &home) < 0)
		return -1;
	g->ids_return = !home.unique;
	g->pebble = make_pebble();
	close(journal_fd);
	/* Those that a predecessor waited for. */
	__atomic_store_n(&g->journal->waiting, 0, __ATOMIC_RELAXED);
	pthread_mutex_init(&g->cache_lock, NULL);
	pthread_mutex_init(&g->stats_lock, NULL);
	pthread_mutex_init(&g->turn_lock, NULL);
	pthread_mutex_init(&g->orphan_lock, NULL);
	pthread_cond_init(&g->turn_over, NULL);
	atomic_store(&g->next_seq, now_ns() >> 16);
	if (ix_start_watchdog() < 0)
		return -1;
	srandom((unsigned int)now_ns());
	ix_link_serve();
	/* Without a daemon for good: the receivers go on until their listeners end. */
	pthread_mutex_lock(&g->turn_lock);
	for (int i = 0; i < IX_LISTENERS; i++)
		while (atomic_load(&g->listeners[i].receivers) > 0)
			pthread_cond_wait(&g->turn_over, &g->turn_lock);
	return 0;
}
