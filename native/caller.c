/* What the guard reads from and about a caller: each thing once, bounded, with the container's own rights. */
#include "guard.h"

#include <linux/capability.h>
#include <stdio.h>

/*
 * A string of the caller's memory. Read page by page, because it may end just before an unmapped one.
 * Returns its length, -EFAULT, or -ENAMETOOLONG if no NUL comes within `size` bytes.
 */
int ix_read_string(int tid, uint64_t address, char *out, size_t size)
{
	const size_t page = 4096;
	size_t have = 0;
	while (have < size) {
		size_t want = page - ((address + have) & (page - 1));
		if (want > size - have)
			want = size - have;
		struct iovec local = {.iov_base = out + have, .iov_len = want};
		struct iovec remote = {.iov_base = (void *)(uintptr_t)(address + have), .iov_len = want};
		ssize_t n = process_vm_readv(tid, &local, 1, &remote, 1, 0);
		if (n <= 0)
			return -EFAULT;
		char *end = memchr(out + have, '\0', (size_t)n);
		if (end)
			return (int)(end - out);
		have += (size_t)n;
	}
	return -ENAMETOOLONG;
}

bool ix_caller_has_cap(int tid, int capability)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3, .pid = tid};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {0};
	if (syscall(SYS_capget, &header, data) < 0)
		return false;
	return data[CAP_TO_INDEX(capability)].effective & CAP_TO_MASK(capability);
}

/* Whether the caller has CAP_SYS_ADMIN over the owner of a namespace: ns_capable() of kernel/capability.c, less the
 * rule for the owner's uid, whose holders have the capability after setns anyway. */
bool ix_caller_rules(const struct ix_call *call, int ns_fd)
{
	struct stat own, owner;
	if (!ix_caller_has_cap(call->tid, CAP_SYS_ADMIN))
		return false;
	char name[32];
	ix_caller_path(name, call->tid, "ns/user");
	cleanup_close int at = ix_result(ioctl(ns_fd, IX_NS_GET_USERNS));
	if (at < 0 || fstatat(ix_guard_state.proc, name, &own, 0) < 0)
		return false;
	for (int depth = 0; depth < 33; depth++) {
		if (fstat(at, &owner) < 0)
			return false;
		if (own.st_dev == owner.st_dev && own.st_ino == owner.st_ino)
			return true;
		int parent = ix_result(ioctl(at, IX_NS_GET_PARENT));
		if (parent < 0)
			return false;
		ix_close_fd(&at);
		at = parent;
	}
	return false;
}

/* Whether the caller is in another user namespace than the container's, which is the guard's own. */
bool ix_caller_is_nested(const struct ix_call *call)
{
	struct stat theirs, own;
	char name[32];
	ix_caller_path(name, call->tid, "ns/user");
	if (fstatat(ix_guard_state.proc, name, &theirs, 0) < 0)
		return false;
	ix_caller_path(name, getpid(), "ns/user");
	return fstatat(ix_guard_state.proc, name, &own, 0) < 0 || own.st_dev != theirs.st_dev || own.st_ino != theirs.st_ino;
}

/* The systemd unit in a cgroup file's last line: the last component that has a unit's ending. */
static void unit_of(const char *cgroups, char name[sizeof(((struct ix_unit *)0)->name)])
{
	const char *found = NULL;
	size_t length = 0;
	for (const char *p = cgroups; *p;) {
		size_t n = strcspn(p, "/\n");
		if ((n > 8 && memcmp(p + n - 8, ".service", 8) == 0) || (n > 6 && memcmp(p + n - 6, ".scope", 6) == 0)) {
			found = p;
			length = n;
		}
		p += n + (p[n] != '\0');
	}
	if (!found) {
		found = "-";
		length = 1;
	}
	size_t room = sizeof(((struct ix_unit *)0)->name) - 1;
	if (length > room)
		length = room;
	memcpy(name, found, length);
	name[length] = '\0';
}

/* The unit of a thread: an open and a read. */
void ix_unit_of(int tid, char name[sizeof(((struct ix_unit *)0)->name)])
{
	char text[4096];
	cleanup_close int fd = ix_open_caller(ix_guard_state.proc, tid, "cgroup", O_RDONLY);
	ssize_t n = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	text[n < 0 ? 0 : n] = '\0';
	unit_of(text, name);
}

/* Counts the call for the caller's unit. Off unless configured. */
void ix_account(const struct ix_call *call)
{
	char name[sizeof(((struct ix_unit *)0)->name)];
	struct ix_unit *units = ix_guard_state.journal->units;
	ix_unit_of(call->tid, name);
	pthread_mutex_lock(&ix_guard_state.stats_lock);
	for (int i = 0; i < IX_UNITS; i++) {
		if (units[i].name[0] == '\0')
			memcpy(units[i].name, name, sizeof(name));
		if (strcmp(units[i].name, name) == 0) {
			units[i].umounts++;
			break;
		}
	}
	pthread_mutex_unlock(&ix_guard_state.stats_lock);
}

/* Of an object of the thread's, by what it is called in procfs. */
static void identify(int tid, const char *what, uint64_t *mnt_id, uint64_t *ino)
{
	char name[64];
	struct ix_stat st;
	ix_caller_path(name, tid, what);
	if (ix_statx(ix_guard_state.proc, name, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, &st) < 0)
		return;
	*mnt_id = st.mnt_id;
	*ino = st.ino;
}

struct ix_context ix_context_of(int tid)
{
	struct ix_context c = {0};
	uint64_t of_nsfs;
	identify(tid, "root", &c.root_mnt_id, &c.root_ino);
	identify(tid, "cwd", &c.cwd_mnt_id, &c.cwd_ino);
	identify(tid, "ns/net", &of_nsfs, &c.netns_ino);
	return c;
}

/* Also where it is not known. */
bool ix_same_context(const struct ix_context *a, const struct ix_context *b)
{
	static const struct ix_context unknown;
	return memcmp(a, &unknown, sizeof(*a)) == 0 || memcmp(a, b, sizeof(*a)) == 0;
}
