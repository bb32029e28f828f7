/*
 * The envoy: reads and writes real procfs and sysfs nodes for the view (interceptor/view/envoy.py is the other end).
 *
 * It has joined the container's user, network, IPC and UTS namespaces as uid 0 there, which is the whole point: sysctl
 * looks its tables up by the namespaces of whoever opens the node (net/sysctl_net.c, ipc/ipc_sysctl.c,
 * kernel/utsname_sysctl.c), and the kernel checks the container root's own rights, not ours.
 *
 * One request, one reply, in order; both are one packet of a SOCK_SEQPACKET socket and in the machine's byte order.
 * Callers in namespaces further in are served there, if those belong to the container: it is setns(2) that judges.
 * Nothing is remembered between requests, nothing is allocated, and nothing may block: nodes are opened O_NONBLOCK and
 * anything but a regular file, directory or symbolic link is refused. Ends when the other end is closed, and with the
 * container's first process: the view waits for its envoys to end where nobody is left to end them.
 */
#include "compat.h"

#include <dirent.h>
#include <poll.h>
#include <sched.h>
#include <sys/wait.h>

enum { OP_GETATTR = 1, OP_LIST, OP_READ, OP_WRITE, OP_READLINK, OP_OPEN, OP_SETHOSTNAME, OP_SETDOMAINNAME };
enum { BASE_PROC, BASE_SYS, BASES };
enum { KEEP = 1, WITHIN_NET = 2, WITHIN_IPC = 4, WITHIN_UTS = 8, WITHIN_USER = 16, WITHIN = 30 };
enum { ENVOY_PATH_MAX = 4095, ENVOY_DATA_MAX = 65536, DENTS_MAX = 8192 };

struct request {
	uint32_t seq;
	uint8_t op;
	uint8_t base;
	uint16_t path_len;
	uint32_t size;         /* READ: bytes wanted; OPEN: O_RDONLY, O_WRONLY or O_RDWR */
	uint32_t flags;        /* KEEP: READ hands the open file over as well, beside the reply; WITHIN_*: in a namespace
				* of that kind, which comes beside the request, and not in ours */
	uint64_t offset;       /* READ, WRITE: position; LIST: cookie to go on from, 0 to begin */
};                             /* then path_len bytes of path, then what is to be written */

struct reply {
	uint32_t seq;
	int32_t error;         /* a positive errno, or 0 */
	uint64_t value;        /* WRITE: bytes taken; LIST: cookie to go on from, 0 at the end */
};                             /* then: struct attr, entries, data read, or the text of a link */

struct attr {
	uint32_t mode, nlink, uid, gid;    /* ids as seen in the container's user namespace */
	uint64_t size;
	int64_t atime_ns, mtime_ns, ctime_ns;
};

struct entry {
	struct attr attr;
	uint64_t cookie;       /* of what follows this entry */
	uint16_t name_len;
	uint16_t zero[3];
};                             /* then the name, padded with NUL to a multiple of 8 */

/* linux_dirent64 of getdents64(2). glibc's struct dirent64 is laid out alike, but promises 256 bytes of name. */
struct dent {
	uint64_t ino;
	int64_t off;
	uint16_t reclen;
	uint8_t type;
	char name[];
} __attribute__((packed));

_Static_assert(sizeof(struct request) == 24 && sizeof(struct reply) == 16, "protocol.py knows these sizes");
_Static_assert(sizeof(struct attr) == 48 && sizeof(struct entry) == 64, "protocol.py knows these sizes");
/* A directory entry takes 24 bytes or more in `dents` and at most 80 more than that here: a page always fits. */
_Static_assert(DENTS_MAX / 24 * 80 + DENTS_MAX <= ENVOY_DATA_MAX, "a page of entries fits into a reply");

static struct {
	struct request head;
	char rest[ENVOY_PATH_MAX + ENVOY_DATA_MAX];
} in;

static struct {
	struct reply head;
	char data[ENVOY_DATA_MAX] __attribute__((aligned(8)));
} out;

static char path[ENVOY_PATH_MAX + 1];
static int passed = -1;        /* what came beside the request */
static int given = -1;         /* what goes beside the reply */
static char dents[DENTS_MAX] __attribute__((aligned(8)));

/* Opens `path` below `base` without following a single link or crossing a mount; the last component may be a link
 * if `flags` has O_PATH. */
static int open_node(int base, uint64_t flags)
{
	struct open_how how = {
		.flags = flags | O_CLOEXEC | O_NOFOLLOW,
		.resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV,
	};
	long fd;
	/* `..` is given up with EAGAIN when anybody on the machine mounts or renames meanwhile. */
	int tries = 10000;
	do
		fd = syscall(SYS_openat2, base, path, &how, sizeof(how));
	while (fd < 0 && (errno == EINTR || (errno == EAGAIN && tries-- > 0)));
	return ix_result(fd);
}

/* For reading or writing. Opening cannot block (O_NONBLOCK), nor can what is left after the check for a file. */
static int open_data(int base, uint64_t flags)
{
	struct stat st;
	cleanup_close int fd = open_node(base, flags | O_NONBLOCK | O_NOCTTY);
	if (fd < 0)
		return fd;
	if (fstat(fd, &st) < 0)
		return -errno;
	if (S_ISDIR(st.st_mode))
		return -EISDIR;
	if (!S_ISREG(st.st_mode))
		return -EACCES;
	return ix_take_fd(&fd);
}

static int64_t nanoseconds(const struct timespec *t)
{
	return (int64_t)t->tv_sec * 1000000000 + t->tv_nsec;
}

/* 0, or -EACCES for a kind of node that the view does not pass on (devices, sockets, FIFOs). */
static int fill_attr(struct attr *attr, const struct stat *st)
{
	if (!S_ISREG(st->st_mode) && !S_ISDIR(st->st_mode) && !S_ISLNK(st->st_mode))
		return -EACCES;
	*attr = (struct attr){
		.mode = st->st_mode,
		.nlink = (uint32_t)st->st_nlink,
		.uid = st->st_uid,
		.gid = st->st_gid,
		.size = (uint64_t)st->st_size,
		.atime_ns = nanoseconds(&st->st_atim),
		.mtime_ns = nanoseconds(&st->st_mtim),
		.ctime_ns = nanoseconds(&st->st_ctim),
	};
	return 0;
}

/* The operations return the number of bytes put into out.data, or -errno. */

static int op_getattr(int base)
{
	struct stat st;
	struct attr attr;
	cleanup_close int fd = open_node(base, O_PATH);
	if (fd < 0)
		return fd;
	if (fstat(fd, &st) < 0)
		return -errno;
	int error = fill_attr(&attr, &st);
	if (error < 0)
		return error;
	memcpy(out.data, &attr, sizeof(attr));
	return sizeof(attr);
}

/* Appends one entry at out.data + at and returns where the next one goes. Names that vanished since are left out, and
 * so are those that may not be looked at: without attributes the view could not answer for them. */
static size_t put_entry(int dir, const struct dent *dent, size_t at)
{
	struct stat st;
	struct entry entry = {.cookie = (uint64_t)dent->off};
	size_t len = strlen(dent->name), padded = (len + 7) & ~(size_t)7;

	if (!strcmp(dent->name, ".") || !strcmp(dent->name, "..") || len > NAME_MAX)
		return at;
	if (fstatat(dir, dent->name, &st, AT_SYMLINK_NOFOLLOW | AT_NO_AUTOMOUNT) < 0 || fill_attr(&entry.attr, &st) < 0)
		return at;
	if (at + sizeof(entry) + padded > sizeof(out.data))
		return at;     /* cannot be: see the assertion above */
	entry.name_len = (uint16_t)len;
	memcpy(out.data + at, &entry, sizeof(entry));
	memset(out.data + at + sizeof(entry), 0, padded);
	memcpy(out.data + at + sizeof(entry), dent->name, len);
	return at + sizeof(entry) + padded;
}

static int op_list(int base)
{
	size_t at = 0;
	uint64_t next = 0;
	cleanup_close int dir = open_node(base, O_RDONLY | O_DIRECTORY);
	if (dir < 0)
		return dir;
	if (in.head.offset > INT64_MAX)
		return -EINVAL;
	if (in.head.offset && lseek(dir, (off_t)in.head.offset, SEEK_SET) < 0)
		return -errno;

	long n = syscall(SYS_getdents64, dir, dents, sizeof(dents));
	if (n < 0)
		return -errno;
	for (long i = 0; i < n;) {
		const struct dent *dent = (const void *)(dents + i);
		at = put_entry(dir, dent, at);
		next = (uint64_t)dent->off;
		i += dent->reclen;
	}
	/* To be asked again for nothing costs more than to look. */
	n = syscall(SYS_getdents64, dir, dents, sizeof(dents));
	out.head.value = n == 0 ? 0 : next;
	return (int)at;
}

static int op_read(int base)
{
	uint32_t size = in.head.size < ENVOY_DATA_MAX ? in.head.size : ENVOY_DATA_MAX;
	if (in.head.offset > INT64_MAX)
		return -EINVAL;
	cleanup_close int fd = open_data(base, O_RDONLY);
	if (fd < 0)
		return fd;
	ssize_t n;
	do     /* read(2) where it will do: some nodes are not seekable */
		n = in.head.offset ? pread(fd, out.data, size, (off_t)in.head.offset) : read(fd, out.data, size);
	while (n < 0 && errno == EINTR);
	if (n >= 0 && in.head.flags & KEEP)
		given = ix_take_fd(&fd);
	return ix_result(n);
}

static int op_write(int base, const char *data, size_t len)
{
	if (in.head.offset > INT64_MAX)
		return -EINVAL;
	/* A sysctl takes its value from one write(2) at 0: never split, never truncated first. */
	cleanup_close int fd = open_data(base, O_WRONLY);
	if (fd < 0)
		return fd;
	ssize_t n;
	do
		n = in.head.offset ? pwrite(fd, data, len, (off_t)in.head.offset) : write(fd, data, len);
	while (n < 0 && errno == EINTR);
	if (n < 0)
		return -errno;
	out.head.value = (uint64_t)n;
	return 0;
}

static int op_readlink(int base)
{
	cleanup_close int fd = open_node(base, O_PATH);
	if (fd < 0)
		return fd;
	/* ENOENT is readlinkat's word for an empty path on something that is no link (readlink(2)). */
	ssize_t n = readlinkat(fd, "", out.data, ENVOY_PATH_MAX);
	if (n < 0)
		return errno == ENOENT ? -EINVAL : -errno;
	return (int)n;
}

/* Only whether it can be opened: procfs refuses there what the mode of a node seems to allow (proc_sys_permission). */
static int op_open(int base)
{
	cleanup_close int fd = -1;
	if (in.head.size > O_RDWR)
		return -EINVAL;
	fd = open_data(base, in.head.size);
	return fd < 0 ? fd : 0;
}

/* The nodes of these names take writes from the initial root alone; the system calls ask for a capability. */
static int op_setname(int op, const char *name, size_t len)
{
	return ix_result(op == OP_SETHOSTNAME ? sethostname(name, len) : setdomainname(name, len));
}

static int has_data(int op)
{
	return op == OP_WRITE || op == OP_SETHOSTNAME || op == OP_SETDOMAINNAME;
}

/* Whether a request with these flags can be meant: at most one namespace, and none of another's to keep. */
static bool flags_are_sound(uint32_t flags, int op)
{
	if (flags & KEEP)
		return flags == KEEP && op == OP_READ;
	return !(flags & ~(uint32_t)WITHIN) && !(flags & (flags - 1));
}

static int operate(int base, size_t len, size_t body)
{
	switch (in.head.op) {
	case OP_GETATTR:
		return op_getattr(base);
	case OP_LIST:
		return op_list(base);
	case OP_READ:
		return op_read(base);
	case OP_WRITE:
		return op_write(base, in.rest + len, body - len);
	case OP_READLINK:
		return op_readlink(base);
	case OP_OPEN:
		return op_open(base);
	case OP_SETHOSTNAME:
	case OP_SETDOMAINNAME:
		return op_setname(in.head.op, in.rest + len, body - len);
	default:
		return -EINVAL;
	}
}

struct visit {
	int base, result;
	size_t len, body;
};

static int operate_and_end(void *argument)
{
	struct visit *visit = argument;
	visit->result = setns(passed, CLONE_NEWUSER) < 0 ? -errno : operate(visit->base, visit->len, visit->body);
	return 0;
}

/*
 * There is no way back from a user namespace, so a child goes there. It shares our memory, and we wait: nothing is
 * copied, and what it answers is in `out`.
 */
static int operate_within_user(int base, size_t len, size_t body)
{
	static char stack[65536] __attribute__((aligned(16)));
	struct visit visit = {.base = base, .result = -ECHILD, .len = len, .body = body};
	pid_t child = clone(operate_and_end, stack + sizeof(stack), CLONE_VM | CLONE_VFORK | SIGCHLD, &visit);
	if (child < 0)
		return -errno;
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return visit.result;
}

/* `own`: our namespaces by the numbers of WITHIN_*, to come back to. */
static int operate_within(int base, size_t len, size_t body, const int *own)
{
	static const struct { uint32_t flag; int kind; } kinds[] = {
		{WITHIN_NET, CLONE_NEWNET}, {WITHIN_IPC, CLONE_NEWIPC}, {WITHIN_UTS, CLONE_NEWUTS}};
	int which = 0;

	if (!own || passed < 0)
		return -EINVAL;
	if (in.head.flags == WITHIN_USER)
		return operate_within_user(base, len, body);
	while (kinds[which].flag != in.head.flags)
		which++;
	if (setns(passed, kinds[which].kind) < 0)
		return -errno;                  /* EPERM: not the container's */
	int result = operate(base, len, body);
	if (setns(own[which], kinds[which].kind) < 0)
		_exit(1);
	return result;
}

static int serve(const int *bases, size_t received, const int *own)
{
	size_t len = in.head.path_len, body = received - sizeof(in.head);

	if (received > sizeof(in))      /* MSG_TRUNC gave the true length; the rest is lost */
		return -EMSGSIZE;
	if (len > ENVOY_PATH_MAX || len > body || in.head.base >= BASES || memchr(in.rest, '\0', len) ||
	    !flags_are_sound(in.head.flags, in.head.op))
		return -EINVAL;
	if (body - len > (has_data(in.head.op) ? ENVOY_DATA_MAX : 0))
		return -EINVAL;
	memcpy(path, len ? in.rest : ".", len ? len : 1);
	path[len ? len : 1] = '\0';
	if (in.head.flags & WITHIN)
		return operate_within(bases[in.head.base], len, body, own);
	return operate(bases[in.head.base], len, body);
}

/* As recv(2), with the descriptor that came along in `passed`. What is more than one the kernel drops. */
static ssize_t receive(int sock)
{
	union { struct cmsghdr align; char room[CMSG_SPACE(sizeof(int))]; } control;
	struct iovec data = {&in, sizeof(in)};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control,
				 .msg_controllen = sizeof(control)};
	ssize_t n = recvmsg(sock, &message, MSG_TRUNC | MSG_CMSG_CLOEXEC);
	struct cmsghdr *head = n >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS &&
	    head->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(&passed, CMSG_DATA(head), sizeof(int));
	return n;
}

/* As send(2), with `given` beside it. That one is left out where too many descriptors of the user's are on their way. */
static ssize_t reply(int sock, size_t len)
{
	union { struct cmsghdr align; char room[CMSG_SPACE(sizeof(int))]; } control = {0};
	struct iovec data = {&out, len};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1};
	if (given >= 0) {
		message.msg_control = &control;
		message.msg_controllen = sizeof(control);
		control.align = (struct cmsghdr){.cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS,
						 .cmsg_len = CMSG_LEN(sizeof(int))};
		memcpy(CMSG_DATA(&control.align), &given, sizeof(int));
	}
	ssize_t n = sendmsg(sock, &message, MSG_NOSIGNAL);
	if (n < 0 && errno == ETOOMANYREFS) {
		message.msg_controllen = 0;
		n = sendmsg(sock, &message, MSG_NOSIGNAL);
	}
	return n;
}

static void close_both(void)
{
	ix_close_fd(&passed);
	ix_close_fd(&given);
	passed = given = -1;
}

/* Whether a request can be received, or the socket's end; false once the process of `pidfd` has ended. */
static bool await_request(int sock, int pidfd)
{
	struct pollfd p[] = {{.fd = sock, .events = POLLIN}, {.fd = pidfd, .events = POLLIN}};
	while (poll(p, 2, -1) < 0 && errno == EINTR)
		;
	return !p[1].revents;
}

/* Serves requests on `sock` until it is closed or a process ends (pidfd; -1: none): 0 then, -errno when something is
 * wrong with the socket itself. `own`: our network, IPC and UTS namespaces, NULL if nobody is served in others. */
int ix_envoy(int sock, int proc_fd, int sys_fd, int pidfd, const int *own)
{
	const int bases[BASES] = {[BASE_PROC] = proc_fd, [BASE_SYS] = sys_fd};

	while (await_request(sock, pidfd)) {
		ssize_t n = receive(sock);
		if (n < 0 && errno == EINTR)
			continue;
		if (n == 0 || (n < 0 && errno == ECONNRESET))
			return 0;
		if (n < 0)
			return -errno;
		if ((size_t)n < sizeof(in.head))
			return -EBADMSG;

		out.head = (struct reply){.seq = in.head.seq};
		int len = serve(bases, (size_t)n, own);
		if (len < 0) {
			out.head.error = -len;
			out.head.value = 0;
			len = 0;
		}
		do
			n = reply(sock, sizeof(out.head) + (size_t)len);
		while (n < 0 && errno == EINTR);
		close_both();
		if (n < 0)
			return errno == EPIPE || errno == ECONNRESET ? 0 : -errno;
	}
	return 0;
}
