/* A process that makes the operations of a program, one after the other, and tells the result of each. */
#include "engine.h"

#include <linux/mount.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>

static bool forked;

/* Each '@' is followed by a digit and stands for the PID of that worker; '@9' for the container's first process. */
const char *expand(const char *path, char *out, size_t size)
{
	if (!strchr(path, '@'))
		return path;
	size_t n = 0;
	for (; *path && n + 12 < size; path++) {
		if (*path != '@') {
			out[n++] = *path;
			continue;
		}
		int which = *++path - '0';
		n += (size_t)snprintf(out + n, size - n, "%d", which >= 0 && which < WORKERS ? shared->pids[which] : 1);
	}
	out[n] = '\0';
	return out;
}

/* Whether what the path leads to is what a call on it is about: from a root, ".", ".." or a magic link the mount calls
 * go on to what is mounted on top (LOOKUP_MOUNTPOINT, lock_mount()), and statx does not. */
static bool is_plain(const char *path)
{
	const char *last = strrchr(path, '/');
	last = last ? last + 1 : path;
	return strcmp(last, "") != 0 && strcmp(last, ".") != 0 && strcmp(last, "..") != 0 && !strstr(path, "/fd/") &&
	       strcmp(last, "root") != 0 && strcmp(last, "cwd") != 0;
}

/* The unique ID of the mount that a path leads to, 0 if it leads to none or the answer would not count. */
uint64_t top_mount(const char *path, bool follow)
{
	struct ix_stat st;
	int flags = AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT | (follow ? 0 : AT_SYMLINK_NOFOLLOW);
	return path && is_plain(path) && ix_statx(AT_FDCWD, path, flags, &st) == 0 ? st.mnt_id : 0;
}

static bool is_there(uint64_t id)
{
	struct ix_statmount sm;
	return ix_statmount(id, 0, IX_STATMOUNT_MNT_BASIC, &sm, sizeof(sm)) == 0;
}

static int into_slot(int fd, int64_t slot)
{
	if (fd < 0)
		return -fd;
	if (fd <= 2)
		return 0;              /* a guard that decides at random said 0 of nothing */
	int r = dup3(fd, SLOT_FD + (int)slot, O_CLOEXEC) < 0 ? errno : 0;
	close(fd);
	return r;
}

static int do_mount(const struct step *s)
{
	uint64_t before = top_mount(s->s[1], true);
	int r = -ix_mount(s->s[0], s->s[1], s->s[2], (unsigned long)s->n[0], s->s[3]);
	const int64_t elsewise = MS_REMOUNT | MS_SHARED | MS_PRIVATE | MS_SLAVE | MS_UNBINDABLE;
	if (r == 0 && shared->truthful && !(s->n[0] & elsewise) && before && top_mount(s->s[1], true) == before)
		return NOT_THERE;
	return r;
}

static int do_umount(const struct step *s)
{
	int error = 0;
	for (int64_t i = 0; i <= s->n[1]; i++) {
		uint64_t id = top_mount(s->s[0], !(s->n[0] & UMOUNT_NOFOLLOW));
		error = -ix_umount2(s->s[0], (int)s->n[0]);
		if (error == 0 && shared->truthful && id && is_there(id))
			return STILL_THERE;
	}
	return error;
}

static int do_new(const struct step *s)
{
	cleanup_close int context = ix_fsopen(s->s[0], 0);
	if (context <= 2)
		return context < 0 ? -ix_take_fd(&context) : ix_take_fd(&context) * 0;
	if (s->s[1] && ix_fsconfig(context, s->s[2] ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG, s->s[1], s->s[2], 0) < 0)
		return errno;
	if (ix_fsconfig(context, FSCONFIG_CMD_CREATE, NULL, NULL, 0) < 0)
		return errno;
	return into_slot(ix_fsmount(context, 0, (unsigned int)s->n[0]), s->n[1]);
}

static int do_fspick(const struct step *s)
{
	cleanup_close int context = ix_fspick(AT_FDCWD, s->s[0], 0);
	if (context < 0)
		return errno;
	if (ix_fsconfig(context, s->s[2] ? FSCONFIG_SET_STRING : FSCONFIG_SET_FLAG, s->s[1], s->s[2], 0) < 0)
		return errno;
	return -ix_fsconfig(context, FSCONFIG_CMD_RECONFIGURE, NULL, NULL, 0);
}

static void write_file(const char *name, const char *text)
{
	cleanup_close int fd = openat(proc_fd, name, O_WRONLY | O_CLOEXEC);
	if (fd >= 0 && write(fd, text, strlen(text)) < 0)
		return;
}

static int do_unshare(const struct step *s)
{
	if (unshare((int)s->n[0]) < 0)
		return errno;
	if (s->n[0] & CLONE_NEWUSER) {
		write_file("self/setgroups", "deny");
		write_file("self/uid_map", "0 0 1");
		write_file("self/gid_map", "0 0 1");
	}
	return 0;
}

/* A child in a PID namespace of its own goes on; numbers that the engine does not know are of no use to it. */
static int do_fork(struct result *result)
{
	if (forked)
		return EBUSY;
	if (unshare(CLONE_NEWPID) < 0)
		return errno;
	int pid = fork();
	if (pid < 0)
		return errno;
	forked = true;
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		result->pid = -1;
		return 0;
	}
	result->pid = pid;
	return 0;
}

static int do_setns(const struct step *s)
{
	int pid = s->n[0] >= 0 && s->n[0] < WORKERS ? shared->pids[s->n[0]] : 1;
	cleanup_close int fd = (int)syscall(SYS_pidfd_open, pid, 0);
	if (fd < 0)
		return errno;
	return -ix_setns(fd, (int)s->n[1]);
}

static int send_slot(int sock, int64_t slot)
{
	char byte = 0, control[CMSG_SPACE(sizeof(int))] = {0};
	int fd = SLOT_FD + (int)slot;
	struct iovec iov = {&byte, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	*c = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
	memcpy(CMSG_DATA(c), &fd, sizeof(fd));
	return sendmsg(sock, &m, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? errno : 0;
}

int take_fd(int sock)
{
	char byte, control[CMSG_SPACE(sizeof(int))];
	struct iovec iov = {&byte, 1};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof(control)};
	if (recvmsg(sock, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) < 0)
		return -errno;
	struct cmsghdr *c = CMSG_FIRSTHDR(&m);
	int fd = -1;
	if (c && c->cmsg_type == SCM_RIGHTS)
		memcpy(&fd, CMSG_DATA(c), sizeof(fd));
	return fd < 0 ? -EBADMSG : fd;
}

static const char *or_empty(const char *text)
{
	return text ? text : "";
}

static int execute(const struct step *s, int number, const int *mailboxes, struct result *result)
{
	const int64_t *n = s->n;
	switch ((enum op)s->op) {
	case OP_MOUNT:
		return do_mount(s);
	case OP_UMOUNT:
		return do_umount(s);
	case OP_OPEN_TREE:
		return into_slot(ix_open_tree((int)n[0], or_empty(s->s[0]), (unsigned int)n[1]), n[2]);
	case OP_MOVE_MOUNT:
		return -ix_move_mount((int)n[0], or_empty(s->s[0]), (int)n[1], or_empty(s->s[1]), (unsigned int)n[2]);
	case OP_NEW:
		return do_new(s);
	case OP_SETATTR:
		return -ix_mount_setattr((int)n[0], or_empty(s->s[0]), (unsigned int)n[1], (uint64_t)n[2], (uint64_t)n[3],
					 (uint64_t)n[4], -1);
	case OP_PIVOT_ROOT:
		return -ix_pivot_root(s->s[0], s->s[1]);
	case OP_CHROOT:
		return ix_result(chroot(s->s[0])) < 0 ? errno : 0;
	case OP_CHDIR:
		return (s->s[0] ? chdir(s->s[0]) : fchdir((int)n[0])) < 0 ? errno : 0;
	case OP_UNSHARE:
		return do_unshare(s);
	case OP_FORK:
		return do_fork(result);
	case OP_SETNS:
		return do_setns(s);
	case OP_OPEN:
		return into_slot(ix_result(open(s->s[0], (int)n[1] | O_CLOEXEC | O_NONBLOCK)), n[0]);
	case OP_CLOSE:
		return close(SLOT_FD + (int)n[0]) < 0 ? errno : 0;
	case OP_SEND:
		return send_slot(mailboxes[2 * n[1] + 1], n[0]);
	case OP_RECEIVE:
		return into_slot(take_fd(mailboxes[2 * number]), n[0]);
	case OP_RENAME:
		return syscall(SYS_renameat2, AT_FDCWD, s->s[0], AT_FDCWD, s->s[1], (unsigned int)n[0]) < 0 ? errno : 0;
	case OP_MKDIR:
		return mkdir(s->s[0], 0755) < 0 ? errno : 0;
	case OP_FSPICK:
		return do_fspick(s);
	case OP_COUNT:
		break;
	}
	return ENOSYS;
}

/* As Python packs it: op, worker, numbers, then the strings, each with its NUL. */
bool read_step(struct step *step, const char *data, size_t size)
{
	const size_t head = 8 + 8 * NUMBERS;
	if (size < head + STRINGS || size > head + sizeof(step->text) || data[size - 1] != '\0')
		return false;
	memcpy(&step->op, data, 4);
	memcpy(&step->worker, data + 4, 4);
	memcpy(step->n, data + 8, 8 * NUMBERS);
	memcpy(step->text, data + head, size - head);
	const char *at = step->text, *end = step->text + (size - head);
	for (int i = 0; i < STRINGS; i++) {
		if (at >= end)
			return false;
		step->s[i] = *at ? at : NULL;
		at += strlen(at) + 1;
	}
	return step->op < OP_COUNT && step->worker < WORKERS;
}

void work(int number, int sock, const int *mailboxes)
{
	static char data[MESSAGE], paths[2][PATH_MAX];
	static struct step step;
	for (;;) {
		ssize_t n = recv(sock, data, sizeof(data), 0);
		if (n <= 0)
			_exit(0);
		struct result result = {.error = EBADMSG};
		if (read_step(&step, data, (size_t)n)) {
			for (int i = 0; i < 2; i++)
				if (step.s[i])
					step.s[i] = expand(step.s[i], paths[i], PATH_MAX);
			result.error = execute(&step, number, mailboxes, &result);
		}
		if (result.pid < 0)
			continue;      /* the new one: the old one tells its number */
		if (send(sock, &result, sizeof(result), MSG_NOSIGNAL) < 0)
			_exit(0);
		if (result.pid > 0) {
			while (waitpid(result.pid, NULL, 0) < 0 && errno == EINTR)
				;
			_exit(0);
		}
	}
}
