/* What each trapped call gets: its arguments copied once, its objects resolved once, then a reply or a question. */
#include "guard.h"

#include <linux/audit.h>
#include <linux/capability.h>

enum family { FAMILY_UNKNOWN, FAMILY_MOUNT, FAMILY_UMOUNT, FAMILY_UMOUNT_OLD,
	FAMILY_FSOPEN, FAMILY_FSMOUNT, FAMILY_OPEN_TREE, FAMILY_OPEN_TREE_ATTR, FAMILY_MOVE_MOUNT,
	FAMILY_OPENAT2 };

struct syscall_row {
	uint32_t arch;
	int nr;
	enum family family;
};

#if defined(__x86_64__)
enum { ARCH_NATIVE = AUDIT_ARCH_X86_64, ARCH_COMPAT = AUDIT_ARCH_I386, X32_BIT = 0x40000000 };
enum { COMPAT_MOUNT = 21, COMPAT_UMOUNT = 22, COMPAT_UMOUNT2 = 52 };
#elif defined(__aarch64__)
enum { ARCH_NATIVE = AUDIT_ARCH_AARCH64, ARCH_COMPAT = AUDIT_ARCH_ARM, X32_BIT = 0 };
enum { COMPAT_MOUNT = 21, COMPAT_UMOUNT = -1, COMPAT_UMOUNT2 = 52 };
#else
#error "no system call table for this architecture"
#endif

/* The numbers from 403 on are the same on every architecture. */
static const struct syscall_row syscalls[] = {
	{ARCH_NATIVE, SYS_umount2, FAMILY_UMOUNT},
	{ARCH_NATIVE, SYS_mount, FAMILY_MOUNT},
	{ARCH_NATIVE, SYS_open_tree, FAMILY_OPEN_TREE},
	{ARCH_NATIVE, SYS_open_tree_attr, FAMILY_OPEN_TREE_ATTR},
	{ARCH_NATIVE, SYS_move_mount, FAMILY_MOVE_MOUNT},
	{ARCH_NATIVE, SYS_fsopen, FAMILY_FSOPEN},
	{ARCH_NATIVE, SYS_fsmount, FAMILY_FSMOUNT},
	{ARCH_NATIVE, SYS_openat2, FAMILY_OPENAT2},
	{ARCH_COMPAT, SYS_openat2, FAMILY_OPENAT2},
	{ARCH_COMPAT, COMPAT_UMOUNT2, FAMILY_UMOUNT},
	{ARCH_COMPAT, COMPAT_MOUNT, FAMILY_MOUNT},
	{ARCH_COMPAT, COMPAT_UMOUNT, FAMILY_UMOUNT_OLD},
	{ARCH_COMPAT, SYS_open_tree, FAMILY_OPEN_TREE},
	{ARCH_COMPAT, SYS_open_tree_attr, FAMILY_OPEN_TREE_ATTR},
	{ARCH_COMPAT, SYS_move_mount, FAMILY_MOVE_MOUNT},
	{ARCH_COMPAT, SYS_fsopen, FAMILY_FSOPEN},
	{ARCH_COMPAT, SYS_fsmount, FAMILY_FSMOUNT},
};

static enum family family_of(uint32_t arch, int nr)
{
	if (arch == (uint32_t)ARCH_NATIVE)
		nr &= ~X32_BIT;
	for (size_t i = 0; i < sizeof(syscalls) / sizeof(syscalls[0]); i++)
		if (syscalls[i].arch == arch && syscalls[i].nr == nr)
			return syscalls[i].family;
	return FAMILY_UNKNOWN;
}

/* Resolves call->path into call->target and says what it is. */
static int resolve_target(struct ix_call *call, bool follow)
{
	call->target = ix_resolve(ix_guard_state.proc, call->tid, AT_FDCWD, call->path, follow);
	if (call->target < 0)
		return call->target;
	return ix_statx(call->target, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &call->target_stat);
}

bool ix_open_mount_namespace(struct ix_call *call)
{
	if (call->mntns >= 0)
		return true;
	call->mntns = ix_open_caller(ix_guard_state.proc, call->tid, "ns/mnt", O_RDONLY);
	call->context = ix_context_of(call->tid);
	/* A thread that a signal has taken out of the call may be anywhere by now. */
	if (!ix_still_waiting(call))
		ix_close_fd(&call->mntns);
	return call->mntns >= 0;
}

/* Whether the object belongs to something we put there: a base, the view, a shield or a masked path. */
bool ix_is_ours(struct ix_call *call, int fd, const struct ix_stat *st)
{
	const struct ix_guard_config *c = &ix_guard_state.config;
	uint64_t magic;
	if (ix_cache_is_foreign(st))
		return false;
	if ((st->dev_major == c->view_major && st->dev_minor == c->view_minor) ||
	    (st->dev_major == c->shield_major && st->dev_minor == c->shield_minor) || ix_cache_is_base(st))
		return true;
	/* By statmount where it is mounted: fstatfs may wait for a FUSE server of the container's, statmount never does. */
	if (ix_mount_magic(call, st->mnt_id, &magic) < 0 && ix_fs_magic(fd, &magic) < 0)
		return false;
	if (magic == IX_PROC_SUPER_MAGIC || magic == IX_SYSFS_MAGIC) {
		ix_cache_put_base(st);
		return true;
	}
	ix_cache_put_foreign(st);
	return false;
}

/* The number in "/proc/self/fd/NUMBER", which is how systemd calls a target that it holds open; else NULL. */
static const char *own_descriptor(const char *path)
{
	static const char prefix[] = "/proc/self/fd/";
	const char *number = path + sizeof(prefix) - 1;
	if (strncmp(path, prefix, sizeof(prefix) - 1) != 0)
		return NULL;
	return number[0] && number[strspn(number, "0123456789")] == '\0' ? number : NULL;
}

/*
 * Whether a glance at the path suffices to let the kernel run the call: one statx instead of two opens. It resolves
 * like the caller but for what climbs above a root (`..` in a chroot) and for links that start at one, which are not
 * found; so it may only lead to CONTINUE, which is never wrong (the welds hold), and all else looks properly, except
 * where neither can be in the path: `right_below_root`.
 */
static bool glance(const struct ix_call *call, const char *path, bool follow, struct ix_stat *st)
{
	char name[PATH_MAX + 32];
	int flags = AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT | (follow ? 0 : AT_SYMLINK_NOFOLLOW);
	if (path[0] == '\0')
		return false;
	const char *own = own_descriptor(path);
	int prefix = ix_caller_path(name, call->tid, own ? "fd/" : path[0] == '/' ? "root" : "cwd/");
	memcpy(name + prefix, own ? own : path, strlen(own ? own : path) + 1);
	return ix_statx(ix_guard_state.proc, name, flags, st) == 0;
}

/*
 * Whether the path may end where somebody stands or holds something open, whatever has been mounted there since: `.`,
 * `..`, and procfs' magic links (cwd, root, fd/N). A glance does not step to the top of what is mounted there.
 */
static bool names_a_place(const char *path)
{
	size_t end = strlen(path), start;
	while (end > 0 && path[end - 1] == '/')
		end--;
	for (start = end; start > 0 && path[start - 1] != '/'; start--)
		;
	const char *last = path + start;
	size_t n = end - start;
	return n == 0 || strspn(last, ".") >= n || strspn(last, "0123456789") >= n ||
	       (n == 3 && memcmp(last, "cwd", n) == 0) || (n == 4 && memcmp(last, "root", n) == 0);
}

/* Which mounts the container was made with only the daemon knows, and it answers once for each. */
static bool may_be_immutable(enum ix_op op)
{
	return ix_guard_state.config.protect_immutable && (op == IX_OP_UMOUNT || op == IX_OP_DETACH);
}

static bool known_harmless(const struct ix_call *call, enum ix_op op, bool follow, struct ix_reply *reply)
{
	struct ix_stat st;
	int error;
	if (!glance(call, call->path, follow, &st))
		return false;
	if (!st.mount_root)
		*reply = ix_let_kernel_run("no mount: EINVAL is the kernel's");
	else if (ix_cache_is_foreign(&st) && !may_be_immutable(op))
		*reply = ix_let_kernel_run("a mount of the container's own");
	else if (ix_cache_get(st.mnt_id, op, &error) == 1) {
		__atomic_add_fetch(&ix_guard_state.journal->cached, 1, __ATOMIC_RELAXED);
		if (op == IX_OP_UMOUNT)
			ix_count_repetition(call, op, st.mnt_id);
		*reply = ix_let_kernel_run("cached verdict");
	} else
		return false;
	return true;
}

/* Whether the daemon has answered that already, or the guard. */
static bool cached_verdict(const struct ix_call *call, enum ix_op op, uint64_t mnt_id, struct ix_reply *reply)
{
	int error;
	int known = ix_cache_get(mnt_id, op, &error);
	if (known == 0)
		return false;
	__atomic_add_fetch(&ix_guard_state.journal->cached, 1, __ATOMIC_RELAXED);
	*reply = ix_let_kernel_run("cached verdict");
	if (known == 1)
		return true;
	ix_count_repetition(call, op, mnt_id);
	if (ix_caller_has_cap(call->tid, CAP_SYS_ADMIN))
		*reply = ix_deny(error);
	else
		*reply = ix_let_kernel_run("EPERM is the kernel's");
	return true;
}

/* A name right below the caller's root, where no link and no `..` can lead a glance astray: it sees what the kernel would. */
static bool right_below_root(const char *path)
{
	return path[0] == '/' && !strchr(path + 1, '/') && !names_a_place(path);
}

/* Original bases are unmounted lazily again and again: known by a glance, where that is as good as a proper look. */
static bool known_below_root(const struct ix_call *call, enum ix_op op, struct ix_reply *reply)
{
	struct ix_stat st;
	return right_below_root(call->path) && glance(call, call->path, false, &st) && st.mount_root &&
	       cached_verdict(call, op, st.mnt_id, reply);
}

/* From the cache, from what the mount is, or from the daemon. */
struct ix_reply ix_decide(struct ix_call *call, enum ix_op op, int fd, const struct ix_stat *st, uint64_t flags)
{
	struct ix_reply reply;
	if (cached_verdict(call, op, st->mnt_id, &reply))
		return reply;
	__atomic_add_fetch(&ix_guard_state.journal->missed, 1, __ATOMIC_RELAXED);
	struct ix_request request = {.op = op, .st = st, .flags = flags, .foreign = !ix_is_ours(call, fd, st)};
	if (request.foreign && !may_be_immutable(op)) {
		/* Lazily, it takes along what is below, and that may have peers among the originals. */
		if (op != IX_OP_DETACH)
			ix_cache_put(st->mnt_id, op, 0);
		if (op != IX_OP_DETACH || !ix_has_mounts_below(call, st->mnt_id))
			return ix_let_kernel_run("a mount of the container's own");
	}
	if (!ix_open_mount_namespace(call) || !ix_caller_rules(call, call->mntns))
		return ix_let_kernel_run("the caller lacks the right: EPERM is the kernel's");
	if (ix_act_alone(call, &request, &reply))
		return reply;
	struct ix_ask ask = {.type = IX_MSG_ASK, .op = op, .mnt_id = st->mnt_id, .flags = flags, .tid = call->tid};
	int fds[] = {call->mntns, fd};
	if (!ix_question(call, &ask, fds, 2))
		return ix_let_kernel_run("nobody answers: the welds hold");
	const struct ix_answer *answer = &call->question->answer;
	if (answer->cache && (answer->act == IX_ACT_CONTINUE || answer->act == IX_ACT_ERROR))
		ix_cache_put(st->mnt_id, op, answer->act == IX_ACT_ERROR ? answer->error : 0);
	return ix_act(call, answer, ix_take_fd(&call->question->answer_fd));
}

/* The way to the top leads through the directory: not where the container serves it. Device numbers are reused, so they
 * do not tell; a mount's own filesystem does. */
static bool may_never_answer(struct ix_call *call)
{
	uint64_t magic;
	return !ix_is_ours(call, call->target, &call->target_stat) &&
	       (ix_mount_magic(call, call->target_stat.mnt_id, &magic) < 0 || magic == IX_FUSE_SUPER_MAGIC);
}

/* What umount2(2) takes is the top of what is mounted at the place, however the path leads there (LOOKUP_MOUNTPOINT). */
static int step_to_top(struct ix_call *call)
{
	cleanup_close int top = -1;
	if (S_ISDIR(call->target_stat.mode))
		top = may_never_answer(call) ? -1 : ix_top_of(call->target);
	else if (call->target_stat.mount_root && ix_has_mounts_below(call, call->target_stat.mnt_id))
		top = ix_top_of_file(call, call->target_stat.mnt_id);
	else
		return 0;
	/* Then what the path itself leads to, which is the top but where somebody stands or holds something open. */
	if (top < 0)
		return 0;
	ix_close_fd(&call->target);
	call->target = ix_take_fd(&top);
	return ix_statx(call->target, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &call->target_stat);
}

/* can_umount() asks for the right over the superblock's owner: the host's root for sysfs, for procfs the container's. */
static bool not_theirs_to_force(struct ix_call *call)
{
	uint64_t magic;
	if (ix_mount_magic(call, call->target_stat.mnt_id, &magic) < 0)
		return false;
	return magic == IX_SYSFS_MAGIC || (magic == IX_PROC_SUPER_MAGIC && ix_caller_is_nested(call));
}

static struct ix_reply handle_umount(struct ix_call *call, uint64_t flags)
{
	call->kind = flags & MNT_DETACH ? IX_KIND_DETACH : IX_KIND_UMOUNT;
	if (flags & ~(uint64_t)(MNT_FORCE | MNT_DETACH | MNT_EXPIRE | UMOUNT_NOFOLLOW))
		return ix_let_kernel_run("flags that the kernel refuses");
	if (flags & MNT_EXPIRE)
		return ix_let_kernel_run("nothing that has welded mounts on it expires");
	if (ix_read_string(call->tid, call->args[0], call->path, sizeof(call->path)) < 0)
		return ix_let_kernel_run("a path that the kernel refuses");
	if (ix_guard_state.config.account_units)
		ix_account(call);
	enum ix_op op = flags & MNT_DETACH ? IX_OP_DETACH : IX_OP_UMOUNT;
	struct ix_reply reply;
	if (op == IX_OP_UMOUNT && !names_a_place(call->path) && known_harmless(call, op, !(flags & UMOUNT_NOFOLLOW), &reply))
		return reply;
	if (flags == MNT_DETACH && known_below_root(call, op, &reply))
		return reply;
	if (resolve_target(call, !(flags & UMOUNT_NOFOLLOW)) < 0 || step_to_top(call) < 0)
		return ix_let_kernel_run("a path that does not resolve");
	if (!call->target_stat.mount_root)
		return ix_let_kernel_run("no mount: EINVAL is the kernel's");
	if (flags & MNT_FORCE && not_theirs_to_force(call))
		return ix_let_kernel_run("another's filesystem: EPERM is the kernel's");
	return ix_decide(call, op, call->target, &call->target_stat, flags);
}

static struct ix_reply handle_remount(struct ix_call *call, uint64_t flags)
{
	struct ix_reply reply;
	if (known_harmless(call, IX_OP_REMOUNT, true, &reply))
		return reply;
	if (resolve_target(call, true) < 0 || !call->target_stat.mount_root)
		return ix_let_kernel_run("no mount: EINVAL is the kernel's");
	return ix_decide(call, IX_OP_REMOUNT, call->target, &call->target_stat, flags);
}

static struct ix_reply handle_bind(struct ix_call *call)
{
	struct ix_stat st;
	if (ix_read_string(call->tid, call->args[0], call->text, sizeof(call->text)) < 0)
		return ix_let_kernel_run("a source that the kernel refuses");
	if (glance(call, call->text, true, &st) && (!S_ISDIR(st.mode) || ix_cache_is_foreign(&st)))
		return ix_let_kernel_run("nothing welded can be below");
	cleanup_close int source = ix_resolve(ix_guard_state.proc, call->tid, AT_FDCWD, call->text, true);
	if (source < 0 || ix_statx(source, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0)
		return ix_let_kernel_run("a source that does not resolve");
	if (!S_ISDIR(st.mode) || !ix_is_ours(call, source, &st))
		return ix_let_kernel_run("nothing welded can be below");
	if (!ix_open_mount_namespace(call) || !ix_caller_rules(call, call->mntns))
		return ix_let_kernel_run("the caller lacks the right: EPERM is the kernel's");
	if (resolve_target(call, true) < 0)
		return ix_let_kernel_run("a target that does not resolve");
	return ix_act_bind(call, source);
}

static struct ix_reply handle_move(struct ix_call *call)
{
	struct ix_stat st;
	if (ix_read_string(call->tid, call->args[0], call->text, sizeof(call->text)) < 0)
		return ix_let_kernel_run("a source that the kernel refuses");
	cleanup_close int source = ix_resolve(ix_guard_state.proc, call->tid, AT_FDCWD, call->text, true);
	if (source < 0 || ix_statx(source, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0 || !st.mount_root)
		return ix_let_kernel_run("no mount to move: EINVAL is the kernel's");
	struct ix_reply reply = ix_decide(call, IX_OP_MOVE, source, &st, 0);
	/* The kernel looks at the target first. */
	if (reply.outcome == IX_DENIED && resolve_target(call, true) < 0)
		return ix_let_kernel_run("a target that does not resolve");
	return reply;
}

/* Whether the target is a mount of the very filesystem that would come there: do_add_mount() of fs/namespace.c. */
static bool stands_there(const struct ix_call *call)
{
	struct ix_stat st;
	int tree = call->question->answer_fd;
	return tree >= 0 && call->target_stat.mount_root && ix_statx(tree, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) == 0 &&
	       st.dev_major == call->target_stat.dev_major && st.dev_minor == call->target_stat.dev_minor;
}

static struct ix_reply ask_for_composite(struct ix_call *call, struct ix_ask *ask)
{
	cleanup_close int pidns = ix_open_caller(ix_guard_state.proc, call->tid, "ns/pid", O_RDONLY);
	cleanup_close int netns = ix_open_caller(ix_guard_state.proc, call->tid, "ns/net", O_RDONLY);
	if (pidns < 0 || netns < 0 || !ix_open_mount_namespace(call))
		return ix_let_kernel_run("the caller is gone");
	/* mount_capable() of fs/super.c asks for the right over the owner of the filesystem's namespace as well. */
	if (!ix_caller_rules(call, call->mntns) || !ix_caller_rules(call, ask->kind == 1 ? pidns : netns))
		return ix_let_kernel_run("the caller lacks the right: EPERM is the kernel's");
	/* It would be refused as too revealing before the kernel looks at the target. */
	if (!S_ISDIR(call->target_stat.mode))
		return ix_deny(ENOTDIR);
	int fds[] = {call->mntns, pidns, netns};
	if (!ix_ahead_of_new(call, ask, ask->kind == 1 ? pidns : netns) && !ix_question(call, ask, fds, 3))
		return ix_let_kernel_run("nobody answers: the kernel refuses what would reveal");
	if (stands_there(call))
		return ix_deny(EBUSY);
	return ix_act(call, &call->question->answer, ix_take_fd(&call->question->answer_fd));
}

static struct ix_reply handle_new(struct ix_call *call, uint64_t flags)
{
	char fstype[16];
	struct ix_ask ask = {
		.type = IX_MSG_ASK, .op = IX_OP_NEW, .flags = flags, .tid = call->tid, .hidepid = -1, .gid = UINT32_MAX,
	};
	if (ix_read_string(call->tid, call->args[2], fstype, sizeof(fstype)) < 0)
		return ix_let_kernel_run("no filesystem type of ours");
	ask.kind = strcmp(fstype, "proc") == 0 ? 1 : strcmp(fstype, "sysfs") == 0 ? 2 : 0;
	if (ask.kind == 0)
		return ix_let_kernel_run("no filesystem type of ours");
	if (call->args[0] && ix_read_string(call->tid, call->args[0], call->text, sizeof(call->text)) < 0)
		return ix_let_kernel_run("a source that the kernel refuses");
	ix_name_source(call->args[0] ? call->text : "none", &ask);
	call->text[0] = '\0';
	if (call->args[4] && ix_read_options(call->tid, call->args[4], call->text) < 0)
		return ix_let_kernel_run("options that the kernel refuses");
	if (!ix_parse_options(call->text, &ask))
		return ix_let_kernel_run("options that the kernel refuses");
	if (resolve_target(call, true) < 0)
		return ix_let_kernel_run("a target that does not resolve");
	ask.mnt_id = call->target_stat.mnt_id;
	return ask_for_composite(call, &ask);
}

/* MS_NOUSER is a negative number in the kernel, and in a register of 64 bits refuses all of these. */
static const uint64_t REFUSED = ~(uint64_t)0x7fffffff;

static enum ix_kind kind_of(uint64_t flags)
{
	if (flags & MS_REMOUNT)
		return IX_KIND_REMOUNT;
	if (flags & MS_BIND)
		return IX_KIND_BIND;
	if (flags & (MS_SHARED | MS_PRIVATE | MS_SLAVE | MS_UNBINDABLE))
		return IX_KIND_PROPAGATION;
	return flags & MS_MOVE ? IX_KIND_MOVE : IX_KIND_MOUNT;
}

/* The order in which path_mount() of fs/namespace.c looks at the flags decides what a call means. */
static struct ix_reply handle_mount(struct ix_call *call)
{
	uint64_t flags = call->args[3];
	if ((flags & MS_MGC_MSK) == MS_MGC_VAL)
		flags &= ~MS_MGC_MSK;
	call->kind = kind_of(flags);
	if (flags & REFUSED)
		return ix_let_kernel_run("flags that the kernel refuses");
	if ((flags & (MS_REMOUNT | MS_BIND | MS_REC)) == (MS_BIND | MS_REC))
		return ix_let_kernel_run("recursive binds bring the welds along");
	if (ix_read_string(call->tid, call->args[1], call->path, sizeof(call->path)) < 0)
		return ix_let_kernel_run("a target that the kernel refuses");
	if (flags & MS_REMOUNT)
		return handle_remount(call, flags);
	if (flags & MS_BIND)
		return handle_bind(call);
	if (flags & (MS_SHARED | MS_PRIVATE | MS_SLAVE | MS_UNBINDABLE))
		return ix_let_kernel_run("propagation never uncovers anything welded");
	if (flags & MS_MOVE)
		return handle_move(call);
	return handle_new(call, flags);
}

struct ix_reply ix_handle(struct ix_call *call, uint32_t arch, int nr)
{
	enum family family = family_of(arch, nr);
	switch (family) {
	case FAMILY_MOUNT:
		return handle_mount(call);
	case FAMILY_UMOUNT:
		return handle_umount(call, call->args[1] & UINT32_MAX);
	case FAMILY_UMOUNT_OLD:
		return handle_umount(call, 0);
	case FAMILY_FSOPEN:
		call->kind = IX_KIND_FSOPEN;
		return ix_handle_fsopen(call);
	case FAMILY_FSMOUNT:
		call->kind = IX_KIND_FSMOUNT;
		return ix_handle_fsmount(call);
	case FAMILY_OPEN_TREE:
	case FAMILY_OPEN_TREE_ATTR:
		call->kind = IX_KIND_OPEN_TREE;
		return ix_handle_open_tree(call, family == FAMILY_OPEN_TREE_ATTR);
	case FAMILY_MOVE_MOUNT:
		call->kind = IX_KIND_MOVE_MOUNT;
		return ix_handle_move_mount(call);
	case FAMILY_OPENAT2:
		call->kind = IX_KIND_OPENAT2;
		return ix_handle_openat2(call);
	case FAMILY_UNKNOWN:
		break;
	}
	/* A call that nobody asked us to judge: what the kernel says of calls that it does not know. */
	return ix_deny(ENOSYS);
}
