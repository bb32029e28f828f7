/* The guard's end of the link to the daemon: descriptors and answers in, questions out. */
#include "guard.h"

#include <poll.h>

bool ix_link_send(const void *message, size_t size, const int *fds, int fd_count)
{
	union {
		char bytes[CMSG_SPACE(3 * sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct iovec data = {.iov_base = (void *)(uintptr_t)message, .iov_len = size};
	struct msghdr msg = {.msg_iov = &data, .msg_iovlen = 1};
	if (fd_count > 0) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE((size_t)fd_count * sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN((size_t)fd_count * sizeof(int));
		memcpy(CMSG_DATA(c), fds, (size_t)fd_count * sizeof(int));
	}
	ssize_t n;
	do
		n = sendmsg(ix_guard_state.link, &msg, MSG_NOSIGNAL | MSG_DONTWAIT);
	while (n < 0 && errno == EINTR);
	return n >= 0;
}

union message {
	uint32_t type;
	struct ix_note note;
	struct ix_answer answer;
	struct ix_facts facts;
	struct ix_ahead ahead;
};

/* Returns the size of the message, 0 at end of file, -1 on failure; *fd is the first descriptor, others are closed. */
static ssize_t receive(union message *message, int *fd)
{
	union {
		char bytes[CMSG_SPACE(4 * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec data = {.iov_base = message, .iov_len = sizeof(*message)};
	struct msghdr msg = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes),
	};
	ssize_t n;
	*fd = -1;
	do
		n = recvmsg(ix_guard_state.link, &msg, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -1;
	for (struct cmsghdr *c = CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < count; i++) {
			int got;
			memcpy(&got, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
			if (*fd < 0)
				*fd = got;
			else
				close(got);
		}
	}
	return n;
}

static void take_answer(const struct ix_answer *answer, int *fd)
{
	struct ix_question *q = &ix_guard_state.questions[answer->seq % IX_SLOTS];
	pthread_mutex_lock(&q->lock);
	bool wanted = q->seq != 0 && q->seq == answer->seq && !q->done;
	if (wanted) {
		q->answer = *answer;
		q->answer_fd = ix_take_fd(fd);
		q->done = true;
	}
	pthread_mutex_unlock(&q->lock);
	/* Not before: it would wake up into the lock. */
	if (wanted)
		pthread_cond_signal(&q->answered);
}

/* A new daemon does not know what its predecessor was asked. */
static void ask_again(void)
{
	for (int i = 0; i < ix_slots_used(); i++) {
		struct ix_question *q = &ix_guard_state.questions[i];
		pthread_mutex_lock(&q->lock);
		if (q->seq != 0 && !q->done)
			ix_link_send(&q->ask, sizeof(q->ask), q->fds, q->fd_count);
		pthread_mutex_unlock(&q->lock);
	}
}

static bool alive(int listener)
{
	struct pollfd p = {.fd = listener, .events = POLLIN};
	return poll(&p, 1, 0) >= 0 && !(p.revents & (POLLHUP | POLLNVAL | POLLERR));
}

/* Whether the listener is served: false where there is no room, of listeners or of slots, for it. */
static bool take_listener(uint32_t index, int *fd)
{
	struct ix_guard_state *g = &ix_guard_state;
	struct ix_listener *l = NULL;
	for (int i = 0; i < IX_LISTENERS; i++) {
		struct ix_listener *at = &g->listeners[i];
		if (atomic_load(&at->receivers) == 0)
			l = l ? l : at;
		else if (at->index == index)
			return true;
	}
	if (!l)
		return false;
	atomic_store(&l->receivers, 1);
	l->fd = ix_take_fd(fd);
	l->index = index;
	atomic_store(&l->dropped, 0);
	atomic_store(&l->leader, 0);
	atomic_store(&l->wary, 0);
	atomic_store(&l->serving, 0);
	/* Six times faster where the kernel has it (6.6+). */
	ioctl(l->fd, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
	/* What a predecessor had received and not answered comes first. */
	for (int slot = 0; slot < ix_slots_used(); slot++) {
		const struct seccomp_notif *n = (const void *)g->journal->slots[slot].notif;
		if (n->id != 0 && g->journal->slots[slot].listener == index && !atomic_exchange(&g->slot_taken[slot], 1))
			ix_start_receiver(l, slot, true);
	}
	bool served = ix_start_receiver(l, -1, false) == 0 || atomic_load(&l->receivers) > 1;
	ix_release_listener(l);
	return served;
}

static void serve_listener(uint32_t index, int *fd)
{
	/* One that is dead already needs no word: the daemon sees it hang up itself. */
	if (*fd < 0 || !alive(*fd))
		return;
	/* Who refuses must say so: as long as anybody holds the listener, its callers wait. */
	struct ix_note note = {.type = take_listener(index, fd) ? IX_MSG_READY : IX_MSG_REFUSED, .value = index};
	ix_link_send(&note, sizeof(note), NULL, 0);
}

/* For kernels before 6.11, whose SECCOMP_IOCTL_NOTIF_RECV does not end with its last caller. */
static void drop_listener(uint32_t index)
{
	for (int i = 0; i < IX_LISTENERS; i++) {
		struct ix_listener *l = &ix_guard_state.listeners[i];
		if (atomic_load(&l->receivers) > 0 && l->index == index)
			ix_end_listener(l);
	}
}

static void flush(void)
{
	ix_cache_flush();
	ix_forget_ahead();
}

int ix_link_serve(void)
{
	for (;;) {
		union message m = {0};
		int fd;
		ssize_t n = receive(&m, &fd);
		/* End of file: daemon and keeper are gone for good. Calls that need no daemon go on being answered. */
		if (n <= 0)
			return 0;
		if (n == sizeof(m.answer) && m.type == IX_MSG_ANSWER)
			take_answer(&m.answer, &fd);
		else if (n == sizeof(m.facts) && m.type == IX_MSG_FACTS)
			ix_take_facts(&m.facts);
		else if (n == sizeof(m.ahead) && m.type == IX_MSG_AHEAD)
			ix_take_ahead(&m.ahead, &fd);
		else if (n == sizeof(m.note) && m.type == IX_MSG_LISTENER)
			serve_listener(m.note.value, &fd);
		else if (n == sizeof(m.note) && m.type == IX_MSG_DROP)
			drop_listener(m.note.value);
		else if (n == sizeof(m.note) && m.type == IX_MSG_FLUSH)
			flush();
		else if (n == sizeof(m.note) && m.type == IX_MSG_FOLLOW)
			atomic_store(&ix_guard_state.followed, m.note.value != 0);
		else if (n == sizeof(m.note) && m.type == IX_MSG_HELLO)
			ask_again();
		ix_close_fd(&fd);
	}
}
