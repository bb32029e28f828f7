/* The mount API of file descriptors: fsmount, open_tree, open_tree_attr, move_mount. */
#include "guard.h"

#include <linux/mount.h>

/* A descriptor of the caller's, duplicated. Threads may have tables of their own, so it is asked for by thread. */
int ix_fetch_fd(const struct ix_call *call, int number)
{
	cleanup_close int pidfd = ix_result(syscall(SYS_pidfd_open, call->tid, IX_PIDFD_THREAD));
	if (pidfd < 0)
		pidfd = ix_result(syscall(SYS_pidfd_open, call->tid, 0));
	return pidfd < 0 ? pidfd : ix_pidfd_getfd(pidfd, number);
}

/* What dirfd, path and flags of an *at call name, as the caller sees it. */
static int resolve_at(struct ix_call *call, int dirfd, uint64_t path, bool empty_path, bool follow)
{
	if (!path)
		call->text[0] = '\0';
	else if (ix_read_string(call->tid, path, call->text, sizeof(call->text)) < 0)
		return -EFAULT;
	if (call->text[0] != '\0')
		return ix_resolve(ix_guard_state.proc, call->tid, dirfd, call->text, follow);
	if (!empty_path)
		return -ENOENT;
	if (dirfd == AT_FDCWD)
		return ix_open_caller(ix_guard_state.proc, call->tid, "cwd", O_PATH);
	return ix_fetch_fd(call, dirfd);
}

/* ---- contexts: filesystem contexts of procfs and sysfs that callers opened ---------------------------------- */

enum { CONTEXTS = 64, HELD = 128 };

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static int contexts[CONTEXTS];         /* 1 + descriptor; 0: free */
static unsigned int next_context;

/* Nobody tells when a context is closed, so the oldest is forgotten: its fsmount is then the kernel's to refuse. */
static void remember_context(int context)
{
	int copy = fcntl(context, F_DUPFD_CLOEXEC, 0);
	if (copy < 0)
		return;
	pthread_mutex_lock(&table_lock);
	int *place = &contexts[next_context++ % CONTEXTS];
	if (*place)
		close(*place - 1);
	*place = copy + 1;
	pthread_mutex_unlock(&table_lock);
}

static bool known_context(int context)
{
	bool found = false;
	pthread_mutex_lock(&table_lock);
	for (int i = 0; i < CONTEXTS && !found; i++)
		found = contexts[i] && ix_same_file(contexts[i] - 1, context) == 1;
	pthread_mutex_unlock(&table_lock);
	return found;
}

/*
 * ---- held trees -----------------------------------------------------------------------------------------------
 *
 * SECCOMP_IOCTL_NOTIF_ADDFD takes no O_PATH descriptor, and a detached tree dies with the O_PATH descriptor that it
 * was made with. So the caller gets a descriptor of the tree's root directory, and the tree's own is held here until
 * it is attached or the caller's is closed. That shows in a lock on the caller's open file: its holder's end frees it.
 */
struct held {
	int tree;                      /* 1 + descriptor; 0: free */
	int probe;
	uint64_t mnt_id;
	uint64_t mark;
};
static struct held held[HELD];
static uint64_t next_mark;

static bool mark_is_held(const struct held *h)
{
	struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)h->mark, .l_len = 1};
	return fcntl(h->probe, F_OFD_GETLK, &lock) < 0 || lock.l_type != F_UNLCK;
}

static void release(struct held *h)
{
	close(h->tree - 1);
	close(h->probe);
	*h = (struct held){0};
}

static struct held *free_place(void)
{
	struct held *found = NULL;
	for (int i = 0; i < HELD; i++) {
		if (held[i].tree && !mark_is_held(&held[i]))
			release(&held[i]);
		if (!held[i].tree)
			found = &held[i];
	}
	return found;
}

/* Takes the tree. Returns the descriptor for the caller, or -errno. */
static int hold(int tree)
{
	struct ix_stat st;
	cleanup_close int mine = tree;
	cleanup_close int theirs = ix_result(openat(tree, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	cleanup_close int probe = ix_result(openat(tree, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
	if (theirs < 0 || probe < 0 || ix_statx(tree, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0)
		return -EMFILE;
	pthread_mutex_lock(&table_lock);
	struct held *h = free_place();
	struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET, .l_start = (off_t)++next_mark, .l_len = 1};
	int r = !h ? -EMFILE : ix_result(fcntl(theirs, F_OFD_SETLK, &lock));
	if (r >= 0)
		*h = (struct held){
			.tree = ix_take_fd(&mine) + 1, .probe = ix_take_fd(&probe), .mnt_id = st.mnt_id, .mark = next_mark,
		};
	pthread_mutex_unlock(&table_lock);
	return r < 0 ? r : ix_take_fd(&theirs);
}

/* The tree's own descriptor, duplicated; -ENOENT for a mount that is none of these. */
static int find_held(uint64_t mnt_id)
{
	int tree = -ENOENT;
	pthread_mutex_lock(&table_lock);
	for (int i = 0; i < HELD && tree < 0; i++)
		if (held[i].tree && held[i].mnt_id == mnt_id)
			tree = fcntl(held[i].tree - 1, F_DUPFD_CLOEXEC, 0);
	pthread_mutex_unlock(&table_lock);
	return tree;
}

/* It is attached now, and needs no holding any more. */
static void let_go(uint64_t mnt_id)
{
	pthread_mutex_lock(&table_lock);
	for (int i = 0; i < HELD; i++)
		if (held[i].tree && held[i].mnt_id == mnt_id)
			release(&held[i]);
	pthread_mutex_unlock(&table_lock);
}

/* ---- the calls ------------------------------------------------------------------------------------------------ */

/* Asks, and turns the tree that comes back into what the caller gets. */
static struct ix_reply ask_for_tree(struct ix_call *call, struct ix_ask *ask, const int *fds, bool cloexec)
{
	if (!ix_question(call, ask, fds, 2))
		return ix_let_kernel_run("nobody answers: the kernel refuses what would reveal");
	struct ix_reply reply = ix_act(call, &call->question->answer, ix_take_fd(&call->question->answer_fd));
	if (reply.give > 0) {
		int fd = hold(reply.give - 1);
		reply.give = fd < 0 ? 0 : fd + 1;
		reply.error = fd < 0 ? -fd : 0;
		reply.give_cloexec = cloexec;
	}
	return reply;
}

/*
 * Whether a context is procfs's or sysfs's cannot be asked of the kernel. So these are opened by the daemon, for the
 * caller's namespaces, and recognised at fsmount by being the same open file.
 */
struct ix_reply ix_handle_fsopen(struct ix_call *call)
{
	char fstype[16];
	if ((unsigned int)call->args[1] & ~(unsigned int)FSOPEN_CLOEXEC)
		return ix_let_kernel_run("flags that the kernel refuses");
	if (ix_read_string(call->tid, call->args[0], fstype, sizeof(fstype)) < 0)
		return ix_let_kernel_run("no filesystem type of ours");
	struct ix_ask ask = {.type = IX_MSG_ASK, .op = IX_OP_FSOPEN, .tid = call->tid, .hidepid = -1, .gid = UINT32_MAX};
	ask.kind = strcmp(fstype, "proc") == 0 ? 1 : strcmp(fstype, "sysfs") == 0 ? 2 : 0;
	if (ask.kind == 0)
		return ix_let_kernel_run("no filesystem type of ours");
	cleanup_close int pidns = ix_open_caller(ix_guard_state.proc, call->tid, "ns/pid", O_RDONLY);
	cleanup_close int netns = ix_open_caller(ix_guard_state.proc, call->tid, "ns/net", O_RDONLY);
	if (pidns < 0 || netns < 0 || !ix_open_mount_namespace(call) || !ix_caller_rules(call, call->mntns) ||
	    /* sysfs_init_fs_context() asks at once; procfs when the superblock is made. */
	    (ask.kind == 2 && !ix_caller_rules(call, netns)))
		return ix_let_kernel_run("the caller lacks the right: EPERM is the kernel's");
	int fds[] = {pidns, netns};
	if (!ix_question(call, &ask, fds, 2))
		return ix_let_kernel_run("nobody answers: the kernel refuses what would reveal");
	struct ix_reply reply = ix_act(call, &call->question->answer, ix_take_fd(&call->question->answer_fd));
	reply.give_cloexec = call->args[1] & FSOPEN_CLOEXEC;
	if (reply.give > 0)
		remember_context(reply.give - 1);
	return reply;
}

/* FSMOUNT_VALID_FLAGS of fs/namespace.c. */
enum { FSMOUNT_ATTRS = 0x0f | MOUNT_ATTR__ATIME | MOUNT_ATTR_NODIRATIME | 0x200000 };

struct ix_reply ix_handle_fsmount(struct ix_call *call)
{
	unsigned int flags = (unsigned int)call->args[1], attrs = (unsigned int)call->args[2];
	if (flags & ~(unsigned int)FSMOUNT_CLOEXEC)
		return ix_let_kernel_run("flags that the kernel refuses");
	if (attrs & ~(unsigned int)FSMOUNT_ATTRS)
		return ix_let_kernel_run("attributes that the kernel refuses");
	cleanup_close int context = ix_fetch_fd(call, (int)call->args[0]);
	if (context < 0 || !known_context(context))
		return ix_let_kernel_run("no context of procfs or sysfs");
	if (!ix_open_mount_namespace(call) || !ix_caller_rules(call, call->mntns))
		return ix_let_kernel_run("the caller lacks the right: EPERM is the kernel's");
	if (!ix_still_waiting(call))
		return ix_deny(EINTR);
	struct ix_ask ask = {
		.type = IX_MSG_ASK, .op = IX_OP_FSMOUNT, .flags = attrs, .tid = call->tid, .hidepid = -1, .gid = UINT32_MAX,
	};
	int fds[] = {call->mntns, context};
	return ask_for_tree(call, &ask, fds, flags & FSMOUNT_CLOEXEC);
}

/* open_tree_attr(2), 6.15+: the attributes are changed on the clone, with the container's own rights. */
static int change_attributes(struct ix_call *call, int tree)
{
	struct mount_attr attr = {0};
	size_t size = call->args[4] < sizeof(attr) ? (size_t)call->args[4] : sizeof(attr);
	struct iovec local = {.iov_base = &attr, .iov_len = size};
	struct iovec remote = {.iov_base = (void *)(uintptr_t)call->args[3], .iov_len = size};
	if (!call->args[3] || call->args[4] < MOUNT_ATTR_SIZE_VER0)
		return -EINVAL;
	if (process_vm_readv(call->tid, &local, 1, &remote, 1, 0) != (ssize_t)size)
		return -EFAULT;
	/* An ID map would need the caller's descriptor of a user namespace; procfs and sysfs allow none anyway. */
	if ((attr.attr_set | attr.attr_clr) & MOUNT_ATTR_IDMAP)
		return -EINVAL;
	return ix_mount_setattr(tree, "", AT_EMPTY_PATH, attr.attr_set, attr.attr_clr, attr.propagation, -1);
}

struct ix_reply ix_handle_open_tree(struct ix_call *call, bool with_attr)
{
	uint64_t flags = call->args[2] & UINT32_MAX;
	struct ix_stat st;
	if (!(flags & OPEN_TREE_CLONE) || (flags & AT_RECURSIVE))
		return ix_let_kernel_run("no clone, or one that brings the welds along");
	cleanup_close int from = resolve_at(call, (int)call->args[0], call->args[1], flags & AT_EMPTY_PATH,
					    !(flags & AT_SYMLINK_NOFOLLOW));
	if (from < 0 || ix_statx(from, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0)
		return ix_let_kernel_run("a path that does not resolve");
	if (!S_ISDIR(st.mode) || !ix_is_ours(call, from, &st))
		return ix_let_kernel_run("nothing welded can be below");
	if (!ix_open_mount_namespace(call) || !ix_caller_rules(call, call->mntns))
		return ix_let_kernel_run("the caller lacks the right: EPERM is the kernel's");
	if (ix_enter(call) < 0)
		return ix_let_kernel_run("the caller is gone");
	int plain = ix_open_tree(from, "", OPEN_TREE_CLONE | AT_EMPTY_PATH);
	ix_leave();
	bool welded = plain == -EINVAL;
	ix_close_fd(&plain);
	if (!welded)
		return ix_let_kernel_run("nothing welded is below");
	struct ix_ask ask = {
		.type = IX_MSG_ASK, .op = IX_OP_OPEN_TREE, .mnt_id = st.mnt_id, .tid = call->tid, .hidepid = -1,
		.gid = UINT32_MAX,
	};
	int fds[] = {call->mntns, from};
	struct ix_reply reply = ask_for_tree(call, &ask, fds, flags & OPEN_TREE_CLOEXEC);
	if (with_attr && reply.give > 0 && reply.error == 0)
		reply.error = -change_attributes(call, reply.give - 1);
	return reply;
}

static int resolve_to(struct ix_call *call, uint64_t flags)
{
	return resolve_at(call, (int)call->args[2], call->args[3], flags & MOVE_MOUNT_T_EMPTY_PATH,
			  flags & MOVE_MOUNT_T_SYMLINKS);
}

bool ix_is_held(uint64_t mnt_id)
{
	cleanup_close int tree = find_held(mnt_id);
	return tree >= 0;
}

/* A tree that is held here is attached from here, by the descriptor that keeps it alive. */
static struct ix_reply attach_held(struct ix_call *call, int tree, uint64_t mnt_id, uint64_t flags)
{
	cleanup_close int to = resolve_to(call, flags);
	if (to < 0)
		return ix_deny(-to);
	if (!ix_open_mount_namespace(call) || !ix_caller_rules(call, call->mntns))
		return ix_let_kernel_run("the caller lacks the right: EPERM is the kernel's");
	struct ix_reply reply = ix_act_attach_held(call, tree, mnt_id, to, flags & MOVE_MOUNT_BENEATH);
	if (reply.outcome == IX_HANDLED && reply.error == 0)
		let_go(mnt_id);
	return reply;
}

/* What a move_mount is to move, or has moved. */
int ix_resolve_moved(struct ix_call *call)
{
	uint64_t flags = call->args[4];
	return resolve_at(call, (int)call->args[0], call->args[1], flags & MOVE_MOUNT_F_EMPTY_PATH,
			  flags & MOVE_MOUNT_F_SYMLINKS);
}

/* Whether an original base would stand on something else from then on; `error`: what the call then fails with. */
static bool would_lift_original(struct ix_call *call, uint64_t flags, int *error)
{
	struct ix_stat st;
	cleanup_close int to = resolve_to(call, flags);
	if (to < 0 || ix_statx(to, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0 || !st.mount_root ||
	    (!ix_is_ours(call, to, &st) && !ix_has_mounts_below(call, st.mnt_id)) || !ix_open_mount_namespace(call) ||
	    !ix_caller_rules(call, call->mntns))
		return false;
	struct ix_ask ask = {.type = IX_MSG_ASK, .op = IX_OP_BENEATH, .mnt_id = st.mnt_id, .tid = call->tid};
	int fds[] = {call->mntns, to};
	if (!ix_question(call, &ask, fds, 2) || call->question->answer.act != IX_ACT_ERROR)
		return false;
	*error = call->question->answer.error;
	return true;
}

struct ix_reply ix_handle_move_mount(struct ix_call *call)
{
	uint64_t flags = call->args[4] & UINT32_MAX;
	struct ix_stat st;
	int error;
	if (flags & MOVE_MOUNT_SET_GROUP)
		return ix_let_kernel_run("moves nothing");
	cleanup_close int from = ix_resolve_moved(call);
	if (from < 0 || ix_statx(from, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0 || !st.mount_root)
		return ix_let_kernel_run("no mount to move: the kernel's errno");
	if (flags & MOVE_MOUNT_BENEATH && would_lift_original(call, flags, &error))
		return ix_deny(error);
	cleanup_close int tree = find_held(st.mnt_id);
	if (tree >= 0)
		return attach_held(call, tree, st.mnt_id, flags);
	struct ix_reply reply = ix_decide(call, IX_OP_MOVE, from, &st, 0);
	if (reply.outcome == IX_DENIED) {
		cleanup_close int to = resolve_to(call, flags);
		if (to < 0)
			return ix_let_kernel_run("a target that does not resolve");
	}
	return reply;
}
