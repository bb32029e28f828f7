/* Operations that must happen in one piece: no thread is ever left behind in a foreign namespace. */
#include "compat.h"

#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/wait.h>

static int configure(int context, const char *const *key_values)
{
	for (const char *const *kv = key_values; kv && kv[0]; kv += 2) {
		unsigned int cmd = kv[1] ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG;
		int r = ix_fsconfig(context, cmd, kv[0], kv[1], 0);
		if (r < 0)
			return r;
	}
	return ix_fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0);
}

struct opener {
	const char *fstype;
	int result;
};

static int open_context(void *argument)
{
	struct opener *o = argument;
	o->result = ix_fsopen(o->fstype, 0);
	return 0;
}

/*
 * Before 6.17 procfs takes its PID namespace from the process that calls fsopen, and only a child can be in another.
 * It shares our descriptors, so the context that it opens is ours; it shares our memory, so nothing is copied.
 */
static int fsopen_in_pid_namespace(const char *fstype, int pidns_fd)
{
	static char stack[32768] __attribute__((aligned(16)));
	struct opener o = {.fstype = fstype, .result = -ECHILD};
	cleanup_close int own = open("/proc/thread-self/ns/pid_for_children", O_RDONLY | O_CLOEXEC);
	if (own < 0 || setns(pidns_fd, CLONE_NEWPID) < 0)
		return -errno;
	pid_t child = clone(open_context, stack + sizeof(stack), CLONE_FILES | CLONE_VM | CLONE_VFORK | SIGCHLD, &o);
	int failure = errno;
	/* Leaving again cannot fail for the host's root; a process that could not would be unfit to go on. */
	if (setns(own, CLONE_NEWPID) < 0)
		abort();
	if (child < 0)
		return -failure;
	while (waitpid(child, NULL, 0) < 0 && errno == EINTR)
		;
	return o.result;
}

static int open_procfs(const char *fstype, int pidns_fd, int *step)
{
	*step = 3;
	int context = ix_fsopen(fstype, 0);
	if (context < 0 || pidns_fd < 0)
		return context;
	if (ix_fsconfig(context, FSCONFIG_SET_FD, "pidns", NULL, pidns_fd) >= 0)
		return context;
	close(context);
	*step = 1;
	return fsopen_in_pid_namespace(fstype, pidns_fd);
}

/* sysfs takes its network namespace from nsproxy: joining for the length of this call suffices. */
static int open_sysfs(const char *fstype, int netns_fd, int *step)
{
	*step = 0;
	cleanup_close int own = netns_fd < 0 ? -1 : open("/proc/thread-self/ns/net", O_RDONLY | O_CLOEXEC);
	if (netns_fd >= 0 && own < 0)
		return -errno;
	*step = 2;
	if (netns_fd >= 0 && setns(netns_fd, CLONE_NEWNET) < 0)
		return -errno;
	*step = 3;
	int context = ix_fsopen(fstype, 0);
	if (netns_fd >= 0 && setns(own, CLONE_NEWNET) < 0)
		abort();
	return context;
}

int ix_fsopen_for(const char *fstype, int pidns_fd, int netns_fd, int *step)
{
	return netns_fd >= 0 ? open_sysfs(fstype, netns_fd, step) : open_procfs(fstype, pidns_fd, step);
}

int ix_fresh_mount(const char *fstype, int pidns_fd, int netns_fd, const char *const *key_values,
		   unsigned int attrs, int *step)
{
	cleanup_close int context = ix_fsopen_for(fstype, pidns_fd, netns_fd, step);
	if (context < 0)
		return context;
	*step = 4;
	int result = configure(context, key_values);
	if (result < 0)
		return result;
	*step = 5;
	return ix_fsmount(context, 0, attrs);
}

/* ---- composites -------------------------------------------------------------------------------------------- */

static bool is_absent(int error)
{
	return error == -ENOENT || error == -ELOOP || error == -ENOTDIR || error == -EACCES;
}

static int put_cover(int root, const struct ix_cover *cover)
{
	struct ix_stat st;
	cleanup_close int target = ix_openat2(root, cover->path, O_PATH | O_NOFOLLOW, 0,
					      RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_SYMLINKS);
	if (target < 0)
		return is_absent(target) ? 0 : target;
	const char *source = cover->directory;
	int r = 0;
	if (cover->file != cover->directory) {
		r = ix_statx(target, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st);
		source = S_ISDIR(st.mode) ? cover->directory : cover->file;
	}
	if (r < 0)
		return r;
	cleanup_close int tree = source ? ix_open_tree(AT_FDCWD, source, OPEN_TREE_CLONE | AT_SYMLINK_NOFOLLOW)
					: ix_open_tree(target, "", OPEN_TREE_CLONE | AT_EMPTY_PATH);
	if (tree < 0)
		return tree;
	r = ix_move_mount(tree, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH);
	return r < 0 || !cover->attributes ? r : ix_set_attributes(tree, false, cover->attributes, 0, 0);
}

int ix_put_covers(const char *place, const struct ix_cover *covers, int count, int *step)
{
	*step = 0;
	cleanup_close int root = ix_result(open(place, O_PATH | O_DIRECTORY | O_CLOEXEC));
	if (root < 0)
		return root;
	for (int r; *step < count; (*step)++)
		if ((r = put_cover(root, &covers[*step])) < 0)
			return r;
	return 0;
}

int ix_weld_again(const char *slot, int welder_fd, int home_fd, int *step)
{
	*step = 2;
	if (setns(welder_fd, CLONE_NEWNS) < 0)
		return -errno;
	*step = 3;
	int tree = ix_open_tree(AT_FDCWD, slot, OPEN_TREE_CLONE | AT_RECURSIVE | AT_SYMLINK_NOFOLLOW);
	/* A thread that cannot leave again would do all that follows in the wrong place. */
	if (setns(home_fd, CLONE_NEWNS) < 0)
		abort();
	if (tree < 0)
		return tree;
	/* As long as it stands in its slot it is a slave, and the container would see that. */
	*step = 4;
	int r = ix_set_attributes(tree, true, 0, 0, MS_PRIVATE);
	if (r < 0) {
		close(tree);
		return r;
	}
	return tree;
}

int ix_weld(const char *place, const char *slot, int welder_fd, int home_fd, int *step)
{
	*step = 0;
	if (mkdir(slot, 0700) < 0)
		return -errno;
	*step = 1;
	int r = ix_move_mount(AT_FDCWD, place, AT_FDCWD, slot, 0);
	return r < 0 ? r : ix_weld_again(slot, welder_fd, home_fd, step);
}

/* ---- the janitor ------------------------------------------------------------------------------------------- */

struct janitor {
	int sock;
	sem_t apart;
	int failure;
};

/* A detached tree goes with its descriptor, what is mounted goes by its path. False at end of file. */
static bool tidy_up(int sock)
{
	char path[PATH_MAX];
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control;
	struct iovec data = {.iov_base = path, .iov_len = sizeof(path) - 1};
	struct msghdr msg = {
		.msg_iov = &data, .msg_iovlen = 1, .msg_control = control.bytes, .msg_controllen = sizeof(control.bytes),
	};
	ssize_t n = recvmsg(sock, &msg, MSG_CMSG_CLOEXEC);
	if (n <= 0)
		return n < 0 && errno == EINTR;
	struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
	if (c && c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
		int tree;
		memcpy(&tree, CMSG_DATA(c), sizeof(tree));
		close(tree);
		return true;
	}
	path[n] = '\0';
	/* What cannot be unmounted goes with the workshop. */
	if (umount2(path, MNT_DETACH) == 0)
		rmdir(path);
	return true;
}

static void *janitor_main(void *argument)
{
	struct janitor *j = argument;
	int sock = j->sock;
	bool alone = unshare(CLONE_FS) == 0;
	j->failure = alone ? 0 : -errno;
	/* Nobody waits for it: woken up, it does not take the processor from who asked. Otherwise as without. */
	sched_setscheduler(0, SCHED_BATCH, &(struct sched_param){0});
	sem_post(&j->apart);               /* *j is gone from here on */
	while (alone && tidy_up(sock))
		;
	if (alone)
		close(sock);
	return NULL;
}

int ix_start_janitor(int sock)
{
	struct janitor j = {.sock = sock};
	pthread_t thread;
	sem_init(&j.apart, 0, 0);
	int failed = pthread_create(&thread, NULL, janitor_main, &j);
	if (!failed) {
		pthread_detach(thread);
		while (sem_wait(&j.apart) < 0)
			;
	}
	sem_destroy(&j.apart);
	return failed ? -failed : j.failure;
}

static int send_fd(int sock, int fd, int error)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr align;
	} control = {0};
	struct iovec data = {.iov_base = &error, .iov_len = sizeof(error)};
	struct msghdr msg = {.msg_iov = &data, .msg_iovlen = 1};
	if (fd >= 0) {
		msg.msg_control = control.bytes;
		msg.msg_controllen = sizeof(control.bytes);
		struct cmsghdr *c = CMSG_FIRSTHDR(&msg);
		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(sizeof(int));
		memcpy(CMSG_DATA(c), &fd, sizeof(int));
	}
	ssize_t n;
	do
		n = sendmsg(sock, &msg, MSG_NOSIGNAL);
	while (n < 0 && errno == EINTR);
	return n < 0 ? -errno : 0;
}

int ix_welder(int sock)
{
	/* Mounts that propagate into a mount namespace of another user namespace arrive locked, with their flags
	 * locked too (lock_mnt_tree() in fs/namespace.c): that is the weld. */
	if (unshare(CLONE_NEWUSER | CLONE_NEWNS) < 0)
		return send_fd(sock, -1, errno);
	if (send_fd(sock, -1, 0) < 0)
		return -EPIPE;
	for (;;) {
		char request;
		ssize_t n = read(sock, &request, 1);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return 0;
		cleanup_close int own = ix_result(open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC));
		if (send_fd(sock, own, own < 0 ? -own : 0) < 0)
			return -EPIPE;
	}
}
