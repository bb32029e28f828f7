/*
 * The nursery: guards and envoys are forked from it. It is itself forked from the keeper, which is Python and writes to
 * most of its pages sooner or later, if only to count references: a child would be left with the old ones as its own, a
 * megabyte each. This process writes to none of them, so all that are forked from it share them with it.
 *
 * It has an empty mount namespace: what is forked from it copies that before it makes its own, and the workshop's has
 * mounts of every container.
 */
#include "guard.h"

#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { CHILD_FDS = 12 };

/* Where the nursery comes from, and cloners go back to. */
struct origin {
	int mounts, root;
};

static bool answer(int sock, int pid, int pidfd)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct iovec data = {.iov_base = &pid, .iov_len = sizeof(pid)};
	struct msghdr msg = {.msg_iov = &data, .msg_iovlen = 1};
	if (pidfd >= 0) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE(sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &pidfd, sizeof(int));
	}
	return sendmsg(sock, &msg, MSG_NOSIGNAL) >= 0;
}

/* The size of an order, 0 at the end; its descriptors in fds, as many as *count. */
static ssize_t receive(int sock, struct ix_birth *birth, int fds[CHILD_FDS], int *count)
{
	union {
		char bytes[CMSG_SPACE(CHILD_FDS * sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec data = {.iov_base = birth, .iov_len = sizeof(*birth)};
	struct msghdr msg = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes),
	};
	ssize_t n;
	*count = 0;
	do
		n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
	while (n < 0 && errno == EINTR);
	for (struct cmsghdr *c = n < 0 ? NULL : CMSG_FIRSTHDR(&msg); c; c = CMSG_NXTHDR(&msg, c)) {
		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		*count = (int)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(c), (size_t)*count * sizeof(int));
	}
	return n;
}

/*
 * Clones of the mounts at paths of the view. A process of its own does this, because it waits for the view: the daemon
 * kills it where that takes long.
 */
static void clone_parts(int sock)
{
	union {
		char bytes[CMSG_SPACE(IX_PARTS_MAX * sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	static char paths[IX_PARTS_MAX * PATH_MAX];
	int errors[IX_PARTS_MAX], fds[IX_PARTS_MAX], parts = 0, clones = 0;
	ssize_t size = recv(sock, paths, sizeof(paths), 0);
	if (size <= 0 || paths[size - 1] != '\0')
		return;
	for (const char *path = paths; path < paths + size && parts < IX_PARTS_MAX; path += strlen(path) + 1) {
		int fd = ix_open_tree(AT_FDCWD, path, OPEN_TREE_CLONE | AT_SYMLINK_NOFOLLOW);
		errors[parts++] = fd < 0 ? -fd : 0;
		if (fd >= 0)
			fds[clones++] = fd;
	}
	struct iovec data = {.iov_base = errors, .iov_len = (size_t)parts * sizeof(int)};
	struct msghdr msg = {.msg_iov = &data, .msg_iovlen = 1};
	if (clones > 0) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = CMSG_SPACE((size_t)clones * sizeof(int));
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN((size_t)clones * sizeof(int));
		memcpy(CMSG_DATA(c), fds, (size_t)clones * sizeof(int));
	}
	sendmsg(sock, &msg, MSG_NOSIGNAL);
}

static void become_cloner(int sock, const struct origin *workshop)
{
	if (setns(workshop->mounts, CLONE_NEWNS) < 0 || fchdir(workshop->root) < 0 || chroot(".") < 0)
		_exit(71);
	int keep = dup2(sock, 3);
	ix_close_range(4, ~0U);
	clone_parts(keep);
	_exit(0);
}

static void become(const struct ix_birth *birth, const int *fds, int count, int proc, const struct origin *workshop)
{
	if (birth->kind == IX_BIRTH_GUARD && count == 3)
		ix_become_guard(fds[0], proc, fds[1], fds[2], &birth->config);
	if (birth->kind == IX_BIRTH_ENVOY && count > 4)
		ix_become_envoy(fds + 4, count - 4, fds[0], fds[1], fds[2], fds[3]);
	if (birth->kind == IX_BIRTH_CLONER && count == 1)
		become_cloner(fds[0], workshop);
	_exit(70);
}

int ix_nursery(int sock, int proc)
{
	struct ix_birth birth;
	int fds[CHILD_FDS], count;
	const struct origin workshop = {
		.mounts = ix_result(openat(proc, "thread-self/ns/mnt", O_RDONLY | O_CLOEXEC)),
		.root = ix_result(open("/", O_PATH | O_DIRECTORY | O_CLOEXEC)),
	};
	if (workshop.mounts < 0 || workshop.root < 0)
		return -errno;
	/* What jails of its children are mounted on. */
	if (ix_leave_mounts("proc") < 0)
		return -errno;
	prctl(PR_SET_NAME, "interceptor-nur", 0, 0, 0);
	for (;;) {
		ssize_t n = receive(sock, &birth, fds, &count);
		if (n <= 0)
			return (int)n;
		/* Nobody waits for the children: the daemon watches them by pidfd. But until that is open a dead one keeps its PID. */
		signal(SIGCHLD, SIG_DFL);
		int pid = n == sizeof(birth) ? fork() : -1;
		if (pid == 0)
			become(&birth, fds, count, proc, &workshop);
		int failure = n == sizeof(birth) ? errno : EBADMSG;
		cleanup_close int pidfd = pid < 0 ? -1 : ix_result(syscall(SYS_pidfd_open, pid, 0));
		signal(SIGCHLD, SIG_IGN);
		while (waitpid(-1, NULL, WNOHANG) > 0)
			;
		for (int i = 0; i < count; i++)
			close(fds[i]);
		if (!answer(sock, pid < 0 ? -failure : pid, pidfd))
			return -EPIPE;
	}
}
