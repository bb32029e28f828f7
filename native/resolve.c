/*
 * A path as the caller would resolve it, from a process that is not in the caller's PID namespace.
 *
 * The fast way is one openat2 in the caller's root. What it cannot do - /proc/self, magic links, `..` from a working
 * directory - the walker does, component by component. A wrong answer costs function, never protection, so a path that
 * neither resolves is left to the kernel.
 */
#include "guard.h"

#include <stdio.h>

enum { MAX_LINKS = 40, PROC_ROOT_INO = 1, TOP_TRIES = 10000 };

struct walk {
	int proc_fd;                   /* the host's procfs */
	int tid;
	int root;                      /* the caller's root */
	int at;                        /* where we are */
	int hop, hop_parent;           /* what stood in for self, and the procfs root `..` leads back to; -1: none yet */
	int links;
	char rest[2 * PATH_MAX];       /* what is still to be walked */
};

/* By hand: snprintf costs as much as a system call, and this is in the way of each. */
int ix_caller_path(char *name, int tid, const char *what)
{
	char digits[12], *d = digits + sizeof(digits);
	do
		*--d = (char)('0' + tid % 10);
	while ((tid /= 10) > 0);
	size_t count = (size_t)(digits + sizeof(digits) - d), length = strlen(what);
	memcpy(name, d, count);
	name[count] = '/';
	memcpy(name + count + 1, what, length + 1);
	return (int)(count + 1 + length);
}

static int open_of(int proc_fd, int tid, const char *what, int flags)
{
	char name[64];
	ix_caller_path(name, tid, what);
	return ix_result(openat(proc_fd, name, flags | O_CLOEXEC));
}

int ix_open_caller(int proc_fd, int tid, const char *what, int flags)
{
	return open_of(proc_fd, tid, what, flags);
}

static int start_of(int proc_fd, int tid, int dirfd)
{
	char what[32];
	if (dirfd == AT_FDCWD)
		return open_of(proc_fd, tid, "cwd", O_PATH);
	snprintf(what, sizeof(what), "fd/%d", dirfd);
	return open_of(proc_fd, tid, what, O_PATH);
}

static bool same_place(int a, int b)
{
	struct ix_stat x, y;
	return ix_statx(a, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &x) == 0 &&
	       ix_statx(b, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &y) == 0 && x.mnt_id == y.mnt_id &&
	       x.ino == y.ino && x.dev_major == y.dev_major && x.dev_minor == y.dev_minor;
}

/*
 * The root of the top mount at a directory. `..` of a root stays there, but steps onto what is mounted on it. The kernel
 * gives that up with EAGAIN when anybody on the machine mounts or renames meanwhile: then once more.
 */
int ix_top_of(int directory)
{
	int fd = -EAGAIN;
	for (int tries = 0; tries < TOP_TRIES && fd == -EAGAIN; tries++)
		fd = ix_openat2(directory, "/..", O_PATH | O_DIRECTORY, 0, RESOLVE_IN_ROOT);
	return fd;
}

static void step_to(struct walk *w, int fd)
{
	ix_close_fd(&w->at);
	w->at = fd;
}

static bool is_procfs(int fd, struct ix_stat *st)
{
	uint64_t magic;
	/* Only an anonymous device can be procfs; asking anything else could wait for a filesystem of the caller's. */
	return ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, st) == 0 && st->dev_major == 0 &&
	       ix_fs_magic(fd, &magic) == 0 && magic == IX_PROC_SUPER_MAGIC;
}

/* Puts a link's text before what is still to be walked. */
static int prepend_link(struct walk *w, const char *text, size_t length)
{
	size_t rest = strlen(w->rest);
	if (length + 1 + rest >= sizeof(w->rest))
		return -ENAMETOOLONG;
	memmove(w->rest + length + 1, w->rest, rest + 1);
	memcpy(w->rest, text, length);
	w->rest[length] = '/';
	if (rest == 0)
		w->rest[length] = '\0';
	if (text[0] == '/') {
		int root = fcntl(w->root, F_DUPFD_CLOEXEC, 0);
		if (root < 0)
			return -errno;
		step_to(w, root);
	}
	return 0;
}

/* The last number of a "Name:\t1\t2\t3" line of /proc/TID/status: the caller's own number in its own PID namespace. */
static int own_number(const struct walk *w, const char *name)
{
	char text[4096];
	cleanup_close int fd = open_of(w->proc_fd, w->tid, "status", O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	if (n < 0)
		return -ESRCH;
	text[n] = '\0';
	char *line = strstr(text, name);
	if (!line)
		return -ESRCH;
	line[strcspn(line, "\n")] = '\0';
	char *last = strrchr(line, '\t');
	return last ? atoi(last + 1) : -ESRCH;
}

/*
 * What is below self/task is numbered in the caller's own PID namespace, so there the caller's own number stands in for
 * self. (For everything else the host's procfs does, which is right from whatever PID namespace the procfs is.)
 */
static int prepend_own(struct walk *w, const char *before, const char *number_name)
{
	char name[32];
	int number = own_number(w, number_name);
	if (number <= 0)
		return -ESRCH;
	snprintf(name, sizeof(name), "%s%d", before, number);
	return prepend_link(w, name, strlen(name));
}

/* /proc/self and /proc/thread-self mean nothing to us; the same directory of the host's procfs stands in for them. */
static int hop_to_caller(struct walk *w)
{
	char name[16];
	snprintf(name, sizeof(name), "%d", w->tid);
	int fd = ix_result(openat(w->proc_fd, name, O_PATH | O_DIRECTORY | O_CLOEXEC));
	int hop = fd < 0 ? -1 : fcntl(fd, F_DUPFD_CLOEXEC, 0);
	if (hop < 0) {
		ix_close_fd(&fd);
		return -ENOENT;
	}
	ix_close_fd(&w->hop);
	ix_close_fd(&w->hop_parent);
	w->hop = hop;
	w->hop_parent = ix_take_fd(&w->at);
	step_to(w, fd);
	return 0;
}

static int follow_link(struct walk *w, const char *name, int link_fd)
{
	char text[PATH_MAX];
	struct ix_stat here, link;
	if (++w->links > MAX_LINKS)
		return -ELOOP;
	if (is_procfs(link_fd, &link) && is_procfs(w->at, &here)) {
		/* procfs' textual links (mounts, net) stand in its root; every one below is magic: the kernel's to follow. */
		if (here.ino != PROC_ROOT_INO) {
			int target = ix_result(openat(w->at, name, O_PATH | O_CLOEXEC));
			if (target < 0)
				return target;
			step_to(w, target);
			return 0;
		}
		size_t slashes = strspn(w->rest, "/");
		if (strcmp(name, "self") == 0 && strncmp(w->rest + slashes, "task", 4) == 0)
			return prepend_own(w, "", "NStgid:");
		if (strcmp(name, "thread-self") == 0 && strncmp(w->rest + slashes, "..", 2) == 0)
			/* What is above thread-self is self/task, not the procfs. */
			return prepend_own(w, "self/task/", "NSpid:");
		if (strcmp(name, "self") == 0 || strcmp(name, "thread-self") == 0)
			return hop_to_caller(w);
	}
	ssize_t n = readlinkat(link_fd, "", text, sizeof(text));
	if (n < 0)
		return -errno;
	if ((size_t)n == sizeof(text))
		return -ENAMETOOLONG;
	text[n] = '\0';
	return n == 0 ? -ENOENT : prepend_link(w, text, (size_t)n);
}

static int walk_up(struct walk *w)
{
	if (w->hop >= 0 && same_place(w->at, w->hop)) {
		int parent = fcntl(w->hop_parent, F_DUPFD_CLOEXEC, 0);
		if (parent < 0)
			return -errno;
		step_to(w, parent);
		return 0;
	}
	if (same_place(w->at, w->root))
		return 0;
	int fd = ix_result(openat(w->at, "..", O_PATH | O_DIRECTORY | O_CLOEXEC));
	if (fd < 0)
		return fd;
	step_to(w, fd);
	return 0;
}

/* Takes the next component off w->rest; an empty name means that nothing is left. `more`: something follows. */
static int next_component(struct walk *w, char name[NAME_MAX + 1], bool *more)
{
	char *p = w->rest;
	while (*p == '/')
		p++;
	size_t n = strcspn(p, "/");
	if (n > NAME_MAX)
		return -ENAMETOOLONG;
	memcpy(name, p, n);
	name[n] = '\0';
	*more = p[n] == '/';
	memmove(w->rest, p + n, strlen(p + n) + 1);
	return 0;
}

static bool is_directory(int fd)
{
	struct ix_stat st;
	return ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) == 0 && S_ISDIR(st.mode);
}

static int walk_step(struct walk *w, const char *name, bool follow)
{
	struct ix_stat st;
	if (strcmp(name, ".") == 0)
		return is_directory(w->at) ? 0 : -ENOTDIR;
	if (strcmp(name, "..") == 0)
		return walk_up(w);
	cleanup_close int fd = ix_result(openat(w->at, name, O_PATH | O_NOFOLLOW | O_CLOEXEC));
	if (fd < 0)
		return fd;
	if (ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0)
		return -ENOENT;
	if (S_ISLNK(st.mode) && follow)
		return follow_link(w, name, fd);
	step_to(w, ix_take_fd(&fd));
	return 0;
}

static int walk_path(struct walk *w, bool follow)
{
	for (bool slash = false;;) {
		char name[NAME_MAX + 1];
		bool more;
		int r = next_component(w, name, &more);
		if (r < 0)
			return r;
		if (name[0] == '\0')
			return slash && !is_directory(w->at) ? -ENOTDIR : 0;
		r = walk_step(w, name, more || follow);
		if (r < 0)
			return r;
		slash = more;
	}
}

/* What stood in for self is a directory of another procfs: good to go on from, but nothing can be mounted there. */
static int land(struct walk *w)
{
	char number[16];
	if (w->hop < 0 || !same_place(w->at, w->hop))
		return 0;
	int pid = own_number(w, "NStgid:");
	snprintf(number, sizeof(number), "%d", pid);
	int fd = pid <= 0 ? -ESRCH : ix_result(openat(w->hop_parent, number, O_PATH | O_NOFOLLOW | O_CLOEXEC));
	if (fd < 0)
		return fd;
	step_to(w, fd);
	return 0;
}

static int walk_slowly(int proc_fd, int tid, int root, int start, const char *path, bool follow)
{
	struct walk w = {.proc_fd = proc_fd, .tid = tid, .root = root, .hop = -1, .hop_parent = -1};
	size_t n = strlen(path);
	if (n >= PATH_MAX)
		return -ENAMETOOLONG;
	memcpy(w.rest, path, n + 1);
	w.at = fcntl(start, F_DUPFD_CLOEXEC, 0);
	if (w.at < 0)
		return -errno;
	int r = walk_path(&w, follow);
	if (r == 0)
		r = land(&w);
	ix_close_fd(&w.hop);
	ix_close_fd(&w.hop_parent);
	if (r < 0) {
		ix_close_fd(&w.at);
		return r;
	}
	return w.at;
}

int ix_resolve(int proc_fd, int tid, int dirfd, const char *path, int follow)
{
	if (path[0] == '\0')
		return -ENOENT;
	cleanup_close int root = open_of(proc_fd, tid, "root", O_PATH | O_DIRECTORY);
	if (root < 0)
		return root;
	uint64_t flags = O_PATH | (follow ? 0 : O_NOFOLLOW);
	if (path[0] == '/') {
		int fd = ix_openat2(root, path, flags, 0, RESOLVE_IN_ROOT);
		return fd >= 0 ? fd : walk_slowly(proc_fd, tid, root, root, path, follow);
	}
	cleanup_close int start = start_of(proc_fd, tid, dirfd);
	if (start < 0)
		return start;
	int fd = ix_openat2(start, path, flags, 0, RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS);
	return fd >= 0 ? fd : walk_slowly(proc_fd, tid, root, start, path, follow);
}
