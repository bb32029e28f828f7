/* What a freshly forked process of the spawner becomes. Nothing here returns; failures end the process with a status
 * that names the step, which the spawner reports. */
#include "guard.h"

#include <linux/close_range.h>
#include <signal.h>
#include <sys/prctl.h>

enum { EXIT_DESCRIPTORS = 80, EXIT_NAMESPACE, EXIT_IDENTITY, EXIT_JAIL, EXIT_ATTRIBUTES };

/* Moves the descriptors to 3, 4, 5 … in the order given and closes everything else, the standard streams apart. */
static void keep_only(int *fds, int count)
{
	int base = 3;
	for (int i = 0; i < count; i++) {
		/* First out of the way of every final place, then into it. */
		int high = fcntl(fds[i], F_DUPFD_CLOEXEC, base + count + 1);
		if (high < 0)
			_exit(EXIT_DESCRIPTORS);
		fds[i] = high;
	}
	for (int i = 0; i < count; i++) {
		if (dup3(fds[i], base + i, O_CLOEXEC) < 0)
			_exit(EXIT_DESCRIPTORS);
		fds[i] = base + i;
	}
	if (syscall(SYS_close_range, base + count, ~0U, 0) < 0)
		_exit(EXIT_DESCRIPTORS);
}

static void default_signals(void)
{
	struct sigaction dfl = {.sa_handler = SIG_DFL}, ign = {.sa_handler = SIG_IGN};
	sigset_t none;
	for (int s = 1; s < NSIG; s++)
		sigaction(s, &dfl, NULL);
	sigaction(SIGPIPE, &ign, NULL);
	/* A terminal's Ctrl-C is for the daemon: guards outlive it. */
	sigaction(SIGINT, &ign, NULL);
	sigaction(SIGHUP, &ign, NULL);
	sigemptyset(&none);
	sigprocmask(SIG_SETMASK, &none, NULL);
}

static void become_container_root(int userns_fd)
{
	if (setns(userns_fd, CLONE_NEWUSER) < 0)
		_exit(EXIT_NAMESPACE);
	/* Joining gave every capability in there and took every other; the identity must follow. Group first. */
	if (syscall(SYS_setgroups, 0, NULL) < 0 || setresgid(0, 0, 0) < 0 || setresuid(0, 0, 0) < 0)
		_exit(EXIT_IDENTITY);
}

/* A mount namespace of its own, with nothing in it but an empty, read-only tmpfs; with a directory, if it has a name. */
int ix_leave_mounts(const char *directory)
{
	if (unshare(CLONE_NEWNS) < 0 || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0 ||
	    mount("none", "/", NULL, MS_REC | MS_PRIVATE, NULL) < 0)
		return -1;
	/* /proc exists on every host; the tmpfs covers it for us alone. */
	if (mount("jail", "/proc", "tmpfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "size=4k,nr_inodes=2,mode=0555") < 0 ||
	    chdir("/proc") < 0 || (directory && mkdir(directory, 0555) < 0) || ix_pivot_root(".", ".") < 0 ||
	    umount2(".", MNT_DETACH) < 0 || chdir("/") < 0 ||
	    mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) < 0)
		return -1;
	return 0;
}

/*
 * The container's user namespace owns this one: no host path is in reach, and a guard's threads that visited a caller's
 * namespace can come back to it.
 */
static void jail(void)
{
	if (ix_leave_mounts(NULL) < 0)
		_exit(EXIT_JAIL);
}

static void harden(const char *name)
{
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0 || prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) < 0)
		_exit(EXIT_ATTRIBUTES);
	prctl(PR_SET_NAME, name, 0, 0, 0);
}

void ix_become_guard(int userns_fd, int proc_fd, int link_fd, int journal_fd, const struct ix_guard_config *config)
{
	struct ix_guard_config mine = *config;
	int fds[] = {link_fd, journal_fd, proc_fd, userns_fd};
	keep_only(fds, 4);
	default_signals();
	become_container_root(fds[3]);
	close(fds[3]);
	jail();
	harden("interceptor-grd");
	_exit(ix_guard(fds[0], fds[1], fds[2], &mine) < 0 ? 1 : 0);
}

void ix_become_envoy(const int *ns_fds, int ns_count, int sock, int proc_fd, int sys_fd, int pidfd)
{
	int fds[16] = {sock, proc_fd, sys_fd, pidfd};
	const int joined = pidfd < 0 ? 3 : 4;
	if (ns_count != 4)
		_exit(EXIT_DESCRIPTORS);
	for (int i = 0; i < ns_count; i++)
		fds[joined + i] = ns_fds[i];
	keep_only(fds, joined + ns_count);
	default_signals();
	/* The user namespace comes last: joining the others takes the host's rights over them. */
	for (int i = 1; i < ns_count; i++)
		if (setns(fds[joined + i], 0) < 0)
			_exit(EXIT_NAMESPACE);
	become_container_root(fds[joined]);
	close(fds[joined]);
	jail();
	harden("interceptor-env");
	_exit(ix_envoy(fds[0], fds[1], fds[2], pidfd < 0 ? -1 : fds[3], fds + joined + 1) < 0 ? 1 : 0);
}
