/* One wrapper a system call, named after it; the only place where Python's system calls are made. */
#include "compat.h"

#include <linux/filter.h>
#include <linux/mount.h>
#include <sys/prctl.h>
#include <sys/sysmacros.h>

int ix_open_tree(int dirfd, const char *path, unsigned int flags)
{
	return ix_result(syscall(SYS_open_tree, dirfd, path, flags | OPEN_TREE_CLOEXEC));
}

int ix_move_mount(int from_fd, const char *from, int to_fd, const char *to, unsigned int flags)
{
	return ix_result(syscall(SYS_move_mount, from_fd, from, to_fd, to, flags));
}

int ix_fspick(int dirfd, const char *path, unsigned int flags)
{
	return ix_result(syscall(SYS_fspick, dirfd, path, flags | FSPICK_CLOEXEC));
}

int ix_fsopen(const char *fstype, unsigned int flags)
{
	return ix_result(syscall(SYS_fsopen, fstype, flags | FSOPEN_CLOEXEC));
}

int ix_fsconfig(int fd, unsigned int cmd, const char *key, const char *value, int aux)
{
	return ix_result(syscall(SYS_fsconfig, fd, cmd, key, value, aux));
}

int ix_fsmount(int fd, unsigned int flags, unsigned int attrs)
{
	return ix_result(syscall(SYS_fsmount, fd, flags | FSMOUNT_CLOEXEC, attrs));
}

int ix_mount_setattr(int dirfd, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
		     uint64_t propagation, int userns_fd)
{
	struct mount_attr attr = {
		.attr_set = set,
		.attr_clr = clear,
		.propagation = propagation,
		.userns_fd = userns_fd < 0 ? 0 : (uint64_t)userns_fd,
	};
	return ix_result(syscall(SYS_mount_setattr, dirfd, path, flags, &attr, sizeof(attr)));
}

int ix_mount(const char *source, const char *target, const char *fstype, unsigned long flags, const char *data)
{
	return ix_result(mount(source, target, fstype, flags, data));
}

int ix_umount2(const char *target, int flags)
{
	return ix_result(umount2(target, flags));
}

int ix_pivot_root(const char *new_root, const char *put_old)
{
	return ix_result(syscall(SYS_pivot_root, new_root, put_old));
}

int ix_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve)
{
	struct open_how how = {.flags = flags | O_CLOEXEC, .mode = mode, .resolve = resolve};
	return ix_result(syscall(SYS_openat2, dirfd, path, &how, sizeof(how)));
}

int ix_statx(int dirfd, const char *path, int flags, struct ix_stat *out)
{
	const unsigned int wanted = STATX_TYPE | STATX_MODE | STATX_INO;
	struct statx sx = {0};
	int r = ix_result(statx(dirfd, path, flags, wanted | STATX_MNT_ID_UNIQUE, &sx));
	/* Before Linux 6.8 a kernel gives the other ID, a filter may refuse. */
	if (r == -EINVAL || (r == 0 && !(sx.stx_mask & (STATX_MNT_ID_UNIQUE | STATX_MNT_ID))))
		r = ix_result(statx(dirfd, path, flags, wanted | STATX_MNT_ID, &sx));
	if (r < 0)
		return r;
	*out = (struct ix_stat){
		.mnt_id = sx.stx_mnt_id,
		.ino = sx.stx_ino,
		.dev_major = sx.stx_dev_major,
		.dev_minor = sx.stx_dev_minor,
		.mode = sx.stx_mode,
		.mount_root = (sx.stx_attributes & STATX_ATTR_MOUNT_ROOT) != 0,
		.unique = (sx.stx_mask & STATX_MNT_ID_UNIQUE) != 0,
		.uid = sx.stx_uid,
		.gid = sx.stx_gid,
	};
	return 0;
}

int ix_fs_magic(int fd, uint64_t *magic)
{
	struct statfs fs;
	if (fstatfs(fd, &fs) < 0)
		return -errno;
	*magic = (uint64_t)fs.f_type;
	return 0;
}

int ix_statmount(uint64_t mnt_id, uint64_t ns_id, uint64_t mask, void *buf, size_t size)
{
	struct ix_mnt_id_req req = {
		.size = ns_id ? sizeof(req) : offsetof(struct ix_mnt_id_req, mnt_ns_id),
		.mnt_id = mnt_id,
		.param = mask,
		.mnt_ns_id = ns_id,
	};
	return ix_result(syscall(SYS_statmount, &req, buf, size, 0));
}

int64_t ix_listmount(uint64_t mnt_id, uint64_t ns_id, uint64_t last, uint64_t *ids, size_t count)
{
	struct ix_mnt_id_req req = {
		.size = ns_id ? sizeof(req) : offsetof(struct ix_mnt_id_req, mnt_ns_id),
		.mnt_id = mnt_id,
		.param = last,
		.mnt_ns_id = ns_id,
	};
	long n = syscall(SYS_listmount, &req, ids, count, 0);
	return n < 0 ? -errno : n;
}

int ix_look_at_mount(uint64_t mnt_id, uint64_t ns_id, void *buf, size_t size, struct ix_mount_view *out)
{
	const uint64_t mask = IX_STATMOUNT_SB_BASIC | IX_STATMOUNT_MNT_BASIC | IX_STATMOUNT_MNT_ROOT |
			      IX_STATMOUNT_MNT_POINT | IX_STATMOUNT_FS_TYPE;
	int r = ix_statmount(mnt_id, ns_id, mask, buf, size);
	if (r == 0)
		ix_view_of(buf, out);
	return r;
}

void ix_view_of(const void *buf, struct ix_mount_view *out)
{
	const struct ix_statmount *s = buf;
	*out = (struct ix_mount_view){
		.mnt_id = s->mnt_id,
		.parent_id = s->mnt_parent_id,
		.magic = s->sb_magic,
		.attributes = s->mnt_attr,
		.propagation = s->mnt_propagation,
		.peer_group = s->mnt_peer_group,
		.master = s->mnt_master,
		.dev_major = s->sb_dev_major,
		.dev_minor = s->sb_dev_minor,
		.root = s->mask & IX_STATMOUNT_MNT_ROOT ? s->str + s->mnt_root : NULL,
		.point = s->mask & IX_STATMOUNT_MNT_POINT ? s->str + s->mnt_point : NULL,
		.fstype = s->mask & IX_STATMOUNT_FS_TYPE ? s->str + s->fs_type : NULL,
	};
}

int ix_setns(int fd, int nstype)
{
	return ix_result(setns(fd, nstype));
}

int ix_unshare(int flags)
{
	return ix_result(unshare(flags));
}

int ix_mntns_id(int fd, uint64_t *id)
{
	struct stat st;
	int r = ix_result(ioctl(fd, IX_NS_GET_MNTNS_ID, id));
	if (r != -ENOTTY)
		return r;
	r = ix_result(fstat(fd, &st));
	if (r == 0)
		*id = IX_NS_BY_INODE | (uint64_t)st.st_ino;
	return r;
}

enum { NESTING_MAX = 33 };

/* A descriptor that is of no namespace is asked nothing: behind it may be a server that never answers. */
int ix_belongs_to(int fd, int userns_fd)
{
	struct ix_stat found;
	struct stat wanted, owner;
	int r = ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &found);
	if (r < 0 || (r = ix_result(fstat(userns_fd, &wanted))) < 0)
		return r;
	if (found.dev_major != major(wanted.st_dev) || found.dev_minor != minor(wanted.st_dev))
		return 0;
	cleanup_close int at = ix_result(ioctl(fd, IX_NS_GET_USERNS));
	for (int depth = 0; at >= 0 && depth < NESTING_MAX; depth++) {
		if (fstat(at, &owner) < 0)
			return 0;
		if (owner.st_ino == wanted.st_ino)
			return 1;
		/* EPERM: above the initial one there is none. */
		int parent = ix_result(ioctl(at, IX_NS_GET_PARENT));
		ix_close_fd(&at);
		at = parent;
	}
	return 0;
}

int ix_pidfd_getfd(int pidfd, int fd)
{
	return ix_result(syscall(SYS_pidfd_getfd, pidfd, fd, 0));
}

int ix_seccomp_listen(const void *program, unsigned short instructions, unsigned int flags)
{
	struct sock_fprog prog = {.len = instructions, .filter = (struct sock_filter *)(uintptr_t)program};
	return ix_result(syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_NEW_LISTENER, &prog));
}

int ix_seccomp_notif_sizes(void)
{
	struct seccomp_notif_sizes sizes;
	return ix_result(syscall(SYS_seccomp, SECCOMP_GET_NOTIF_SIZES, 0, &sizes));
}

/* Only a listener knows this request; an ID that is not waiting is ENOENT to it, and ENOTTY to anything else. */
int ix_is_listener(int fd)
{
	uint64_t id = 0;
	return ioctl(fd, SECCOMP_IOCTL_NOTIF_ID_VALID, &id) == 0 || errno == ENOENT;
}

int ix_close_range(unsigned int first, unsigned int last)
{
	return ix_result(syscall(SYS_close_range, first, last, 0));
}

int ix_chroot_fd(int fd)
{
	if (fchdir(fd) < 0 || chroot(".") < 0)
		return -errno;
	return 0;
}

enum { IX_F_DUPFD_QUERY = 1024 + 3, IX_KCMP_FILE = 0 };

/* F_DUPFD_QUERY is of Linux 6.10; kcmp(2) is not in every kernel. */
int ix_same_file(int a, int b)
{
	int r = ix_result(fcntl(a, IX_F_DUPFD_QUERY, b));
	if (r >= 0)
		return r;
	r = ix_result(syscall(SYS_kcmp, getpid(), getpid(), IX_KCMP_FILE, a, b));
	return r < 0 ? r : r == 0;
}
