/*
 * openat2(2) across the seam of a composite. RESOLVE_NO_XDEV is how careful programs (libpathrs, runc 1.3) make sure that
 * nobody has mounted something between them and the procfs they have just made; the covers of a composite are part of
 * that filesystem to the container. So one step from a base onto a cover that stands where it belongs is no crossing;
 * before and after it the kernel holds the line as asked.
 */
#include "guard.h"

#include <linux/capability.h>
#include <linux/openat2.h>
#include <stdio.h>

enum { CARE = RESOLVE_BENEATH | RESOLVE_IN_ROOT, HOW_SIZE_VER0 = 24, HOW_SIZE_MAX = 4096 };

struct how {
	uint64_t flags, mode, resolve;
};

static bool read_how(const struct ix_call *call, struct how *how)
{
	struct iovec local = {.iov_base = how, .iov_len = sizeof(*how)};
	struct iovec remote = {.iov_base = (void *)(uintptr_t)call->args[2], .iov_len = sizeof(*how)};
	return call->args[3] >= HOW_SIZE_VER0 && call->args[3] <= HOW_SIZE_MAX &&
	       process_vm_readv(call->tid, &local, 1, &remote, 1, 0) == (ssize_t)sizeof(*how);
}

/* What is opened is opened with the guard's rights: only for who has them, in the container's own user namespace. */
static bool is_as_privileged(const struct ix_call *call)
{
	struct stat theirs, ours;
	char name[32];
	ix_caller_path(name, call->tid, "ns/user");
	return ix_caller_has_cap(call->tid, CAP_SYS_ADMIN) && ix_caller_has_cap(call->tid, CAP_DAC_OVERRIDE) &&
	       fstatat(ix_guard_state.proc, name, &theirs, 0) == 0 &&
	       fstatat(ix_guard_state.proc, "self/ns/user", &ours, 0) == 0 && theirs.st_dev == ours.st_dev &&
	       theirs.st_ino == ours.st_ino;
}

static bool is_of_view(const struct ix_stat *st)
{
	const struct ix_guard_config *c = &ix_guard_state.config;
	return st->dev_major == c->view_major && st->dev_minor == c->view_minor;
}

/* Whether `text` ends in "/" and `end`, so that a path of the view is the one for a place of a base. */
static bool ends_in(const char *text, const char *end)
{
	size_t n = strlen(text), m = strlen(end);
	return n > m && text[n - m - 1] == '/' && strcmp(text + n - m, end) == 0;
}

/*
 * Whether the cover's mount is on the base's, and of the view's part for that place: the container can mount any part of
 * the view anywhere. A tree of ours that is not attached yet has nothing else on it and is asked no further.
 */
static bool belongs(struct ix_call *call, const struct ix_stat *base, const struct ix_stat *cover)
{
	struct { struct ix_statmount sm; char strings[2 * PATH_MAX]; } b, c;
	uint64_t mask = IX_STATMOUNT_MNT_BASIC | IX_STATMOUNT_MNT_POINT | IX_STATMOUNT_MNT_ROOT;
	if (ix_is_held(base->mnt_id))
		return true;
	if (!ix_open_mount_namespace(call) || ix_enter(call) < 0)
		return false;
	bool found = ix_see_mount(base->mnt_id, mask, &b, sizeof(b)) == 0 &&
		     ix_see_mount(cover->mnt_id, mask, &c, sizeof(c)) == 0;
	ix_leave();
	if (!found || c.sm.mnt_parent_id != base->mnt_id)
		return false;
	const char *base_root = b.sm.str + b.sm.mnt_root, *base_point = b.sm.str + b.sm.mnt_point;
	const char *point = c.sm.str + c.sm.mnt_point, *root = c.sm.str + c.sm.mnt_root;
	size_t prefix = strcmp(base_point, "/") == 0 ? 0 : strlen(base_point);
	return strcmp(base_root, "/") == 0 && strncmp(point, base_point, prefix) == 0 && point[prefix] == '/' &&
	       ends_in(root, point + prefix + 1);
}

/* One plain component after the other, until one leads onto a cover. Leaves in *rest what follows it. */
static int step_onto_cover(struct ix_call *call, int start, const char **rest)
{
	struct ix_stat from, to;
	char name[NAME_MAX + 1];
	cleanup_close int at = fcntl(start, F_DUPFD_CLOEXEC, 0);
	if (at < 0 || ix_statx(at, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &from) < 0)
		return -EXDEV;
	for (const char *p = *rest;;) {
		p += strspn(p, "/");
		size_t n = strcspn(p, "/");
		if (n == 0 || n > NAME_MAX || (n == 2 && memcmp(p, "..", 2) == 0))
			return -EXDEV;
		memcpy(name, p, n);
		name[n] = '\0';
		p += n;
		int next = ix_openat2(at, name, O_PATH | O_NOFOLLOW, 0, RESOLVE_NO_MAGICLINKS);
		if (next < 0)
			return next;
		ix_close_fd(&at);
		at = next;
		if (ix_statx(at, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &to) < 0)
			return -EXDEV;
		if (to.mnt_id == from.mnt_id)
			continue;
		if (!to.mount_root || !is_of_view(&to) || !belongs(call, &from, &to))
			return -EXDEV;
		*rest = p + strspn(p, "/");
		return ix_take_fd(&at);
	}
}

/* SECCOMP_IOCTL_NOTIF_ADDFD takes no O_PATH descriptors: who asks for one gets one that reads. */
static int open_beyond(int cover, const char *rest, const struct how *how)
{
	uint64_t care = RESOLVE_NO_XDEV | RESOLVE_BENEATH | RESOLVE_NO_MAGICLINKS | (how->resolve & RESOLVE_NO_SYMLINKS);
	uint64_t flags = how->flags;
	char self[32];
	if (flags & O_PATH)
		flags &= (uint64_t)(O_NOFOLLOW | O_DIRECTORY | O_CLOEXEC);
	snprintf(self, sizeof(self), "self/fd/%d", cover);
	for (;;) {
		int fd = *rest ? ix_openat2(cover, rest, flags, 0, care)
			       : ix_result(openat(ix_guard_state.proc, self, (int)(flags & ~(uint64_t)O_NOFOLLOW) | O_CLOEXEC));
		/* A node that is for writing only has to be opened so; that has no effect yet. */
		if (fd != -EACCES || !(how->flags & O_PATH) || flags & O_ACCMODE)
			return fd;
		flags |= O_WRONLY;
	}
}

static int open_start(const struct ix_call *call, int dirfd)
{
	char name[32] = "cwd";
	if (dirfd != AT_FDCWD)
		snprintf(name, sizeof(name), "fd/%d", dirfd);
	return ix_open_caller(ix_guard_state.proc, call->tid, name, O_PATH);
}

struct ix_reply ix_handle_openat2(struct ix_call *call)
{
	struct how how;
	struct ix_stat st;
	if (!read_how(call, &how) || !(how.resolve & RESOLVE_NO_XDEV) || !(how.resolve & CARE))
		return ix_let_kernel_run("no seam matters to it");
	if (how.flags & ~(uint64_t)(O_ACCMODE | O_PATH | O_CLOEXEC | O_NOFOLLOW | O_DIRECTORY | O_NONBLOCK | O_TRUNC |
				    O_APPEND | O_LARGEFILE | O_NOCTTY) || how.mode)
		return ix_let_kernel_run("flags that no node of ours is opened with");
	if (ix_read_string(call->tid, call->args[1], call->path, sizeof(call->path)) < 0)
		return ix_let_kernel_run("a path that the kernel refuses");
	cleanup_close int start = open_start(call, (int)call->args[0]);
	if (start < 0 || ix_statx(start, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0 || is_of_view(&st) ||
	    !ix_is_ours(call, start, &st))
		return ix_let_kernel_run("it does not start on a base");
	if (call->path[0] == '/' && !(how.resolve & RESOLVE_IN_ROOT))
		return ix_let_kernel_run("EXDEV is the kernel's");
	if (!is_as_privileged(call))
		return ix_let_kernel_run("the caller has less rights than we");
	cleanup_close int alone = ix_openat2(start, call->path, O_PATH | O_NOFOLLOW, 0, how.resolve);
	if (alone != -EXDEV)
		return ix_let_kernel_run("no seam is in its way");
	/* Opening asks the view. */
	ix_step_down(call);
	const char *rest = call->path;
	cleanup_close int cover = step_onto_cover(call, start, &rest);
	if (cover < 0)
		return ix_let_kernel_run("no cover on the way");
	size_t length = strlen(call->path);
	if (length && call->path[length - 1] == '/')
		how.flags |= O_DIRECTORY;
	int fd = open_beyond(cover, rest, &how);
	if (fd == -EXDEV || fd == -ELOOP)
		return ix_let_kernel_run("what is beyond is the kernel's");
	if (fd < 0)
		return ix_deny(-fd);
	return (struct ix_reply){.outcome = IX_HANDLED, .give = fd + 1, .give_cloexec = how.flags & O_CLOEXEC};
}
