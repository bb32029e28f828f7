/*
 * Kernel interfaces that are younger than the headers of the oldest supported distribution (Debian 12: Linux 6.1).
 * Values are the kernel's own (include/uapi/linux/{mount,stat,seccomp,nsfs}.h).
 */
#ifndef IX_COMPAT_H
#define IX_COMPAT_H
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <sched.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <sys/vfs.h>

#include "api.h"

#ifndef OPEN_TREE_CLONE
#define OPEN_TREE_CLONE 1
#endif
#ifndef OPEN_TREE_CLOEXEC
#define OPEN_TREE_CLOEXEC O_CLOEXEC
#endif
#ifndef AT_RECURSIVE
#define AT_RECURSIVE 0x8000
#endif
#ifndef MOVE_MOUNT_F_EMPTY_PATH
#define MOVE_MOUNT_F_EMPTY_PATH 0x00000004
#define MOVE_MOUNT_T_EMPTY_PATH 0x00000040
#endif
#ifndef MOVE_MOUNT_BENEATH
#define MOVE_MOUNT_BENEATH 0x00000200
#endif
#ifndef FSCONFIG_SET_FLAG
#define FSCONFIG_SET_FLAG 0
#define FSCONFIG_SET_STRING 1
#define FSCONFIG_SET_FD 5
#define FSCONFIG_CMD_CREATE 6
#endif
#ifndef FSMOUNT_CLOEXEC
#define FSMOUNT_CLOEXEC 1
#endif
#ifndef FSOPEN_CLOEXEC
#define FSOPEN_CLOEXEC 1
#endif
#ifndef MOUNT_ATTR_RDONLY
#define MOUNT_ATTR_RDONLY 1
#endif
#ifndef STATX_MNT_ID
#define STATX_MNT_ID 0x1000U
#endif
#ifndef STATX_MNT_ID_UNIQUE
#define STATX_MNT_ID_UNIQUE 0x4000U
#endif
#ifndef STATX_ATTR_MOUNT_ROOT
#define STATX_ATTR_MOUNT_ROOT 0x2000
#endif
#ifndef SYS_statmount
#define SYS_statmount 457
#define SYS_listmount 458
#endif
#ifndef SYS_open_tree_attr
#define SYS_open_tree_attr 467
#endif
#ifndef SECCOMP_ADDFD_FLAG_SEND
#define SECCOMP_ADDFD_FLAG_SEND 2
#endif
/*
 * SECCOMP_IOCTL_NOTIF_ADDFD without an answer. The kernel heeds neither direction nor size of this request (EA_IOCTL() of
 * kernel/seccomp.c), so with another direction it is the same, but for filters, which do not see the flags in memory.
 */
#define IX_NOTIF_ADDFD_ALONE SECCOMP_IOWR(3, struct seccomp_notif_addfd)
#define IX_PIDFD_THREAD O_EXCL
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif
#define IX_NS_GET_USERNS _IO(0xb7, 0x1)
#define IX_NS_GET_PARENT _IO(0xb7, 0x2)
#define IX_NS_GET_MNTNS_ID _IOR(0xb7, 0x5, uint64_t)
#define IX_NS_BY_INODE (UINT64_C(1) << 62)
#define IX_PROC_SUPER_MAGIC 0x9fa0
#define IX_SYSFS_MAGIC 0x62656572
#define IX_FUSE_SUPER_MAGIC 0x65735546

/* Ownership by attribute: a descriptor that closes itself when its scope ends. */
static inline void ix_close_fd(int *fd)
{
	if (*fd >= 0) {
		int saved = errno;
		close(*fd);
		*fd = -1;
		errno = saved;
	}
}
#define cleanup_close __attribute__((cleanup(ix_close_fd)))

static inline int ix_take_fd(int *fd)
{
	int taken = *fd;
	*fd = -1;
	return taken;
}

/* The result of a system call as the rest of the module passes it on: the value, or -errno. */
static inline int ix_result(long value)
{
	return value < 0 ? -errno : (int)value;
}

/* statmount(2) and listmount(2), 6.8+. The kernel checks `size`, so later fields may be absent. */
struct ix_mnt_id_req {
	uint32_t size;
	uint32_t spare;
	uint64_t mnt_id;
	uint64_t param;
	uint64_t mnt_ns_id;    /* 6.11+ */
};

struct ix_statmount {
	uint32_t size;
	uint32_t mnt_opts;
	uint64_t mask;
	uint32_t sb_dev_major;
	uint32_t sb_dev_minor;
	uint64_t sb_magic;
	uint32_t sb_flags;
	uint32_t fs_type;
	uint64_t mnt_id;
	uint64_t mnt_parent_id;
	uint32_t mnt_id_old;
	uint32_t mnt_parent_id_old;
	uint64_t mnt_attr;
	uint64_t mnt_propagation;
	uint64_t mnt_peer_group;
	uint64_t mnt_master;
	uint64_t propagate_from;
	uint32_t mnt_root;
	uint32_t mnt_point;
	uint64_t mnt_ns_id;
	uint64_t spare[49];
	char str[];
};
#define IX_STATMOUNT_SB_BASIC 0x1U
#define IX_STATMOUNT_MNT_BASIC 0x2U
#define IX_STATMOUNT_MNT_ROOT 0x8U
#define IX_STATMOUNT_MNT_POINT 0x10U
#define IX_STATMOUNT_FS_TYPE 0x20U

#endif
