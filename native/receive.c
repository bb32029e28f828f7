/*
 * Who receives. The kernel wakes everyone who waits in SECCOMP_IOCTL_NOTIF_RECV for every call, so one thread of a
 * listener leads: it alone waits there, and serves what it receives itself, without a wake-up of any other. Before it
 * waits for the daemon it steps down, and another thread leads. Where it is stuck without having known (a page or a
 * directory of the container's own FUSE server), the watchdog deposes it, so that nobody else is delayed for long.
 */
#include "guard.h"

#include <linux/futex.h>
#include <poll.h>
#include <time.h>

/*
 * A stuck call delays others between one and two ticks. Where one is stuck there may be more: for so many calls the
 * leader then steps down as soon as it has received, so that they do not add up.
 */
enum { WATCHDOG_TICK_NS = 5000000, WARY_CALLS = 256 };

struct receiver {
	struct ix_listener *listener;
	int slot;
	bool recover;
};

static __thread int own_tid;

static void wait_while(atomic_int *word, int value)
{
	syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(atomic_int *word, int count)
{
	syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, count, NULL, NULL, 0);
}

/* ---- the lease: `turn` is odd while the leader serves a call, and whoever makes it even disposes of the lead ------- */

static bool end_turn(struct ix_listener *l, int turn)
{
	return atomic_compare_exchange_strong(&l->turn, &turn, turn + 1);
}

/* Waits until this thread leads; false once the listener has ended. */
static bool lead(struct ix_listener *l)
{
	while (!atomic_load(&l->dropped)) {
		int leader = 0;
		if (atomic_compare_exchange_strong(&l->leader, &leader, 1)) {
			atomic_store(&l->leader_tid, own_tid);
			return true;
		}
		atomic_fetch_add(&l->followers, 1);
		wait_while(&l->leader, 1);
		atomic_fetch_sub(&l->followers, 1);
	}
	return false;
}

static void hand_on(struct ix_listener *l)
{
	atomic_store(&l->leader, 0);
	if (atomic_load(&l->followers) > 0)
		wake(&l->leader, 1);
	else if (atomic_load(&l->serving) >= atomic_load(&l->receivers))
		ix_start_receiver(l, -1, false);
	/* Else one is on its way back, and leads when it arrives. */
}

void ix_step_down(struct ix_call *call)
{
	if (call->turn && end_turn(call->listener, call->turn))
		hand_on(call->listener);
	call->turn = 0;
}

/* For good: those who wait for the lead leave, and so does the leader when it comes back. */
void ix_end_listener(struct ix_listener *l)
{
	atomic_store(&l->dropped, 1);
	atomic_store(&l->leader, 0);
	wake(&l->leader, INT_MAX);
}

/* ---- the watchdog: asleep while nothing is called ---------------------------------------------------------- */

/* The state in a thread's proc_pid_stat(5): R for one that runs, or only waits for a processor. 0: it is gone. */
char ix_read_state(int stat_fd)
{
	char text[512];
	ssize_t n = pread(stat_fd, text, sizeof(text) - 1, 0);
	text[n < 0 ? 0 : n] = '\0';
	const char *name_end = strrchr(text, ')');
	return name_end && name_end[1] == ' ' ? name_end[2] : 0;
}

static bool is_running(int tid)
{
	cleanup_close int fd = ix_open_caller(ix_guard_state.proc, tid, "stat", O_RDONLY);
	return ix_read_state(fd) == 'R';
}

/* Deposes leaders that have been stuck in one call for a whole tick. Returns whether anything was called since the last time. */
static bool look_around(int seen[IX_LISTENERS])
{
	bool busy = false;
	for (int i = 0; i < IX_LISTENERS; i++) {
		struct ix_listener *l = &ix_guard_state.listeners[i];
		int turn = atomic_load(&l->turn);
		/* One that runs is not stuck, and nobody else would be faster. */
		if (turn == seen[i] && (turn & 1) && !is_running(atomic_load(&l->leader_tid)) && end_turn(l, turn)) {
			atomic_store(&l->wary, WARY_CALLS);
			hand_on(l);
		}
		busy = busy || turn != seen[i] || (turn & 1);
		seen[i] = turn;
	}
	return busy;
}

static void *watchdog_main(void *unused)
{
	static int seen[IX_LISTENERS];
	const struct timespec tick = {.tv_nsec = WATCHDOG_TICK_NS};
	for (;;) {
		while (!atomic_load(&ix_guard_state.watching))
			wait_while(&ix_guard_state.watching, 0);
		while (look_around(seen))
			clock_nanosleep(CLOCK_MONOTONIC, 0, &tick, NULL);
		atomic_store(&ix_guard_state.watching, 0);
		/* A call that came in between found us watching, and did not wake us. */
		if (look_around(seen))
			atomic_store(&ix_guard_state.watching, 1);
	}
	return unused;
}

static int begin_turn(struct ix_listener *l)
{
	int turn = atomic_fetch_add(&l->turn, 1) + 1;
	if (!atomic_load(&ix_guard_state.watching) && !atomic_exchange(&ix_guard_state.watching, 1))
		wake(&ix_guard_state.watching, 1);
	return turn;
}

/* ---- threads ------------------------------------------------------------------------------------------------- */

static int start_thread(void *(*body)(void *), void *argument)
{
	pthread_attr_t attr;
	pthread_t thread;
	pthread_attr_init(&attr);
	pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attr, 256 * 1024);
	int failed = pthread_create(&thread, &attr, body, argument);
	pthread_attr_destroy(&attr);
	return -failed;
}

int ix_start_watchdog(void)
{
	return start_thread(watchdog_main, NULL);
}

static bool exhausted(const struct ix_listener *listener)
{
	struct pollfd p = {.fd = listener->fd, .events = POLLIN};
	return atomic_load(&listener->dropped) || poll(&p, 1, 0) < 0 || (p.revents & (POLLHUP | POLLERR | POLLNVAL));
}

static void receive_calls(struct ix_listener *l, struct ix_slot *slot)
{
	bool leads = lead(l);
	while (leads) {
		slot->listener = l->index;
		/* The kernel writes into the journal itself: no instant at which a received call is on no record. */
		if (ioctl(l->fd, SECCOMP_IOCTL_NOTIF_RECV, slot->notif) < 0) {
			int failure = errno;
			ix_forget(slot);
			if ((failure != EINTR && failure != ENOENT) || exhausted(l)) {
				ix_end_listener(l);
				return;
			}
			continue;
		}
		atomic_fetch_add(&ix_guard_state.busy, 1);
		slot->phase = IX_PHASE_RECEIVED;
		int turn = begin_turn(l);
		/* Nobody would be left to lead. Only calls that are being looked at count, however late their threads return. */
		bool overloaded = atomic_fetch_add(&l->serving, 1) + 1 >= IX_RECEIVERS_PER_LISTENER;
		if (atomic_load(&l->wary) > 0 && end_turn(l, turn)) {
			atomic_fetch_sub(&l->wary, 1);
			hand_on(l);
			turn = 0;
		}
		ix_serve_call(l, slot, turn, overloaded, false);
		leads = (turn && end_turn(l, turn)) || lead(l);
	}
}

/* The last to go closes it; only then can its place be taken. Who starts a receiver holds the listener meanwhile. */
void ix_release_listener(struct ix_listener *listener)
{
	pthread_mutex_lock(&ix_guard_state.turn_lock);
	if (atomic_load(&listener->receivers) == 1)
		ix_close_fd(&listener->fd);
	atomic_fetch_sub(&listener->receivers, 1);
	pthread_cond_broadcast(&ix_guard_state.turn_over);
	pthread_mutex_unlock(&ix_guard_state.turn_lock);
}

static void *receiver_main(void *argument)
{
	struct receiver mine = *(struct receiver *)argument;
	struct ix_slot *slot = &ix_guard_state.journal->slots[mine.slot];
	free(argument);
	own_tid = (int)syscall(SYS_gettid);
	/* Own root and working directory, as setns to a mount namespace demands. */
	if (unshare(CLONE_FS) == 0) {
		if (mine.recover) {
			atomic_fetch_add(&mine.listener->serving, 1);
			ix_serve_call(mine.listener, slot, 0, false, true);
		}
		receive_calls(mine.listener, slot);
	}
	atomic_store(&ix_guard_state.slot_taken[mine.slot], 0);
	ix_release_listener(mine.listener);
	return NULL;
}

static int take_slot(void)
{
	for (int i = 0; i < IX_SLOTS; i++) {
		struct ix_journal *journal = ix_guard_state.journal;
		if (atomic_exchange(&ix_guard_state.slot_taken[i], 1))
			continue;
		uint64_t used = __atomic_load_n(&journal->slots_used, __ATOMIC_ACQUIRE);
		while (used <= (uint64_t)i && !__atomic_compare_exchange_n(&journal->slots_used, &used, (uint64_t)i + 1, false,
									   __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
			;
		const struct seccomp_notif *n = (const void *)journal->slots[i].notif;
		if (n->id == 0)
			return i;
		atomic_store(&ix_guard_state.slot_taken[i], 0);
	}
	return -EAGAIN;
}

/* slot -1: any free one. Returns 0, or -EAGAIN where this listener has had its share. */
int ix_start_receiver(struct ix_listener *listener, int slot, bool recover)
{
	if (atomic_fetch_add(&listener->receivers, 1) >= IX_RECEIVERS_PER_LISTENER && !recover)
		goto no;
	if (slot < 0)
		slot = take_slot();
	struct receiver *r = slot < 0 ? NULL : malloc(sizeof(*r));
	if (!r)
		goto no;
	*r = (struct receiver){.listener = listener, .slot = slot, .recover = recover};
	if (recover)
		atomic_fetch_add(&ix_guard_state.busy, 1);
	if (start_thread(receiver_main, r) == 0)
		return 0;
	free(r);
	if (recover)
		atomic_fetch_sub(&ix_guard_state.busy, 1);
	atomic_store(&ix_guard_state.slot_taken[slot], 0);
no:
	atomic_fetch_sub(&listener->receivers, 1);
	return -EAGAIN;
}
