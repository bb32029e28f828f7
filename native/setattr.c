/*
 * What mount_setattr(2) does to trees that nobody sees yet, on kernels before 5.12. There is only mount(2), which changes
 * what stands in the caller's mount namespace: a detached tree is put into one of its own for that, and cloned out again.
 */
#include "compat.h"

#include <linux/mount.h>
#include <pthread.h>
#include <stdio.h>

enum { MOUNTS_MAX = 256 };

/* One call, and its result. */
struct change {
	int proc, tree;   /* proc: a procfs of this thread's PID namespace */
	bool recursive;
	uint64_t set, clear, propagation;
	int result;
};

struct facts {
	struct ix_statmount sm;
	char strings[2 * PATH_MAX];
};

static int open_table(int proc)
{
	return ix_result(openat(proc, "thread-self/mountinfo", O_RDONLY | O_CLOEXEC));
}

static int look(int proc, uint64_t id, struct facts *facts)
{
	cleanup_close int table = open_table(proc);
	return table < 0 ? table
			 : ix_mountinfo_look(table, id, IX_STATMOUNT_MNT_BASIC | IX_STATMOUNT_MNT_POINT, facts, sizeof(*facts));
}

/* The reusable ID, which is what mountinfo has. */
static int id_of(int tree, uint64_t *id)
{
	struct statx stx;
	int r = ix_result(statx(tree, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_MNT_ID, &stx));
	*id = stx.stx_mnt_id;
	return r;
}

static unsigned long flags_of(uint64_t attributes)
{
	static const struct { uint64_t attribute; unsigned long flag; } names[] = {
		{MOUNT_ATTR_RDONLY, MS_RDONLY}, {MOUNT_ATTR_NOSUID, MS_NOSUID}, {MOUNT_ATTR_NODEV, MS_NODEV},
		{MOUNT_ATTR_NOEXEC, MS_NOEXEC}, {MOUNT_ATTR_NODIRATIME, MS_NODIRATIME}, {0x200000, 256},
	};
	uint64_t atime = attributes & MOUNT_ATTR__ATIME;
	unsigned long flags = atime == MOUNT_ATTR_NOATIME	? MS_NOATIME
			      : atime == MOUNT_ATTR_STRICTATIME ? MS_STRICTATIME
								: MS_RELATIME;
	for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++)
		if (attributes & names[i].attribute)
			flags |= names[i].flag;
	return flags;
}

static int change_one(const struct change *c, const char *path, uint64_t attributes)
{
	attributes = (attributes & ~c->clear) | c->set;
	return ix_mount(NULL, path, NULL, MS_REMOUNT | MS_BIND | flags_of(attributes), NULL);
}

/* What stands on it. Nothing of it is hidden by something else: it is ours, and just made. */
static int change_below(const struct change *c, uint64_t id)
{
	uint64_t ids[MOUNTS_MAX];
	struct facts facts;
	cleanup_close int table = open_table(c->proc);
	int64_t count = table < 0 ? table : ix_mountinfo_list(table, id, 0, ids, MOUNTS_MAX);
	if (count == MOUNTS_MAX)
		return -E2BIG;
	int r = count < 0 ? (int)count : 0;
	for (int64_t i = 0; i < count && r >= 0; i++)
		if ((r = look(c->proc, ids[i], &facts)) >= 0)
			r = change_one(c, facts.sm.str + facts.sm.mnt_point, facts.sm.mnt_attr);
	return r;
}

static int change_at(const struct change *c, const char *path)
{
	struct facts facts;
	uint64_t id;
	int r = 0;
	if (c->set || c->clear) {
		if ((r = id_of(c->tree, &id)) < 0 || (r = look(c->proc, id, &facts)) < 0)
			return r == -ENOENT ? -EINVAL : r;
		if ((r = change_one(c, path, facts.sm.mnt_attr)) >= 0 && c->recursive)
			r = change_below(c, id);
	}
	if (r >= 0 && c->propagation)
		r = ix_mount(NULL, path, NULL, c->propagation | (c->recursive ? MS_REC : 0), NULL);
	return r;
}

/*
 * -EINVAL where it does not stand in this thread's mount namespace. A descriptor's name leads to the very mount, whatever
 * is mounted on top, and asks nobody who serves it. While a container is visited, this thread may not be in its procfs.
 */
static int change_here(const struct change *c)
{
	char path[48];
	cleanup_close int before = ix_result(open(".", O_PATH | O_DIRECTORY | O_CLOEXEC));
	if (before < 0)
		return before;
	snprintf(path, sizeof(path), "thread-self/fd/%d", c->tree);
	int r = c->proc < 0 ? -ENOENT : fchdir(c->proc) < 0 ? -errno : change_at(c, path);
	if (r == -ENOENT && !c->set && !c->clear)
		r = fchdir(c->tree) < 0 ? -errno : change_at(c, ".");
	return fchdir(before) < 0 && r >= 0 ? -errno : r;
}

/* A file can only stand on a file. */
static int stand(int tree)
{
	struct ix_stat st;
	int r = ix_statx(tree, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st);
	if (r < 0)
		return r;
	if (mount("scratch", "/scratch", "tmpfs", 0, "size=4k,nr_inodes=2") < 0 ||
	    (S_ISDIR(st.mode) ? mkdir("/scratch/it", 0700) : mknod("/scratch/it", S_IFREG, 0)) < 0)
		return -errno;
	return ix_move_mount(tree, "", AT_FDCWD, "/scratch/it", MOVE_MOUNT_F_EMPTY_PATH);
}

static void *change_elsewhere(void *argument)
{
	struct change *c = argument;
	c->result = ix_leave_mounts("scratch") < 0 ? -errno : stand(c->tree);
	if (c->result < 0 || (c->result = change_here(c)) < 0)
		return NULL;
	int clone = ix_open_tree(AT_FDCWD, "/scratch/it", OPEN_TREE_CLONE | AT_RECURSIVE | AT_SYMLINK_NOFOLLOW);
	c->result = clone < 0 ? clone : ix_result(dup3(clone, c->tree, O_CLOEXEC));
	ix_close_fd(&clone);
	return NULL;
}

/* A thread of its own: with a working directory and, if need be, a mount namespace that nobody else has. */
static void *change_anywhere(void *argument)
{
	struct change *c = argument;
	c->result = unshare(CLONE_FS) < 0 ? -errno : change_here(c);
	return c->result == -EINVAL ? change_elsewhere(c) : NULL;
}

int ix_set_attributes_here(int proc, int tree, int recursive, uint64_t set, uint64_t clear, uint64_t propagation)
{
	unsigned int flags = AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0);
	int r = ix_mount_setattr(tree, "", flags, set, clear, propagation, -1);
	const struct change c = {proc, tree, recursive, set, clear, propagation, 0};
	return r == -ENOSYS ? change_here(&c) : r;
}

int ix_set_attributes(int tree, int recursive, uint64_t set, uint64_t clear, uint64_t propagation)
{
	unsigned int flags = AT_EMPTY_PATH | (recursive ? AT_RECURSIVE : 0);
	int r = ix_mount_setattr(tree, "", flags, set, clear, propagation, -1);
	if (r != -ENOSYS)
		return r;
	/* A container that is visited may have none. */
	cleanup_close int proc = ix_result(open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC));
	struct change c = {proc, tree, recursive, set, clear, propagation, 0};
	pthread_t thread;
	if ((r = pthread_create(&thread, NULL, change_anywhere, &c)) != 0)
		return -r;
	pthread_join(thread, NULL);
	return c.result < 0 ? c.result : 0;
}
