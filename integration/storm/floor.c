/*
 * The floor: the least that a seccomp listener can do, in one thread, for one caller that it forked itself.
 *
 *   none       no listener: the kernel alone, or whatever filter this was started under
 *   answer     receive, answer EINVAL: the floor of the mechanism
 *   resolve    receive, read the path, open it in the caller's root, ask for its unique mount ID, answer EINVAL: the
 *              floor for whoever must know which mount it is
 *   continue   the same, then let the kernel run the call
 *
 * "continue" traps mount(2) as well and resolves its source, which is the first argument, as it is of umount2(2).
 */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/openat2.h>
#include <linux/seccomp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__x86_64__)
#define ARCH_NATIVE AUDIT_ARCH_X86_64
#elif defined(__aarch64__)
#define ARCH_NATIVE AUDIT_ARCH_AARCH64
#else
#error "no architecture for the filter"
#endif

/* Younger than Debian 12's headers (linux/seccomp.h, linux/stat.h, linux/mount.h). */
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, __u64)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP (1UL << 0)
#endif
#ifndef STATX_MNT_ID_UNIQUE
#define STATX_MNT_ID_UNIQUE 0x4000U
#endif

enum mode { MODE_NONE, MODE_ANSWER, MODE_RESOLVE, MODE_CONTINUE };
static const char *const mode_names[] = {"none", "answer", "resolve", "continue"};

struct options {
	enum mode mode;
	unsigned int count;
	const char *path, *call;       /* call: NULL, or one to make in the place of an umount of path */
	int sock;                      /* -1: run once and print */
	int sync_wake_up;
};

static void die(const char *what)
{
	fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* ---- the listener ------------------------------------------------------------------------------------------ */

static bool read_path(pid_t tid, uint64_t address, char *out, size_t size)
{
	struct iovec local = {.iov_base = out, .iov_len = size - 1};
	struct iovec remote = {.iov_base = (void *)(uintptr_t)address, .iov_len = size - 1};
	/* Not into the page after it, which may not be there. */
	size_t page = 4096 - (address & 4095);
	if (page < remote.iov_len)
		remote.iov_len = page;
	ssize_t n = process_vm_readv(tid, &local, 1, &remote, 1, 0);
	if (n <= 0)
		return false;
	out[n] = '\0';
	return strlen(out) < (size_t)n;
}

/* The unique ID of the mount that the path leads to, 0 if it leads nowhere. */
static uint64_t mount_of(int root, const char *path)
{
	struct open_how how = {.flags = O_PATH | O_CLOEXEC, .resolve = RESOLVE_IN_ROOT};
	struct statx st;
	int fd = (int)syscall(SYS_openat2, root, path, &how, sizeof(how));
	if (fd < 0)
		return 0;
	int r = statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_MNT_ID_UNIQUE, &st);
	close(fd);
	return r < 0 ? 0 : st.stx_mnt_id;
}

static void serve_caller(int listener, pid_t caller, const struct options *options)
{
	struct seccomp_notif call;
	char path[4096], name[64];
	snprintf(name, sizeof(name), "/proc/%d/root", caller);
	int root = open(name, O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (root < 0)
		die(name);
	if (options->sync_wake_up &&
	    ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP) < 0 && errno != EINVAL)
		die("SECCOMP_IOCTL_NOTIF_SET_FLAGS");
	for (;;) {
		memset(&call, 0, sizeof(call));
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call) < 0) {
			if (errno == EINTR)
				continue;
			if (errno == ENOENT)
				break;                 /* its last caller is gone */
			die("SECCOMP_IOCTL_NOTIF_RECV");
		}
		struct seccomp_notif_resp reply = {.id = call.id, .error = -EINVAL};
		if (options->mode != MODE_ANSWER && read_path((pid_t)call.pid, call.data.args[0], path, sizeof(path)) &&
		    mount_of(root, path) == 0)
			reply.error = -ENOENT;
		if (options->mode == MODE_CONTINUE) {
			reply.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
			reply.error = 0;
		}
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &reply) < 0 && errno != ENOENT)
			die("SECCOMP_IOCTL_NOTIF_SEND");
	}
	close(root);
}

static int install_filter(enum mode mode)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, arch)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, ARCH_NATIVE, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_umount2, 2, 0),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, mode == MODE_CONTINUE ? SYS_mount : ~0U, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
	};
	struct sock_fprog program = {.len = sizeof(code) / sizeof(code[0]), .filter = code};
	unsigned int flags = SECCOMP_FILTER_FLAG_NEW_LISTENER;
	if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) < 0)
		die("PR_SET_NO_NEW_PRIVS");
#ifdef SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
	int fd = (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
			      &program);
	if (fd >= 0 || errno != EINVAL)
		return fd;
#endif
	return (int)syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, flags, &program);
}

/* ---- one run by hand --------------------------------------------------------------------------------------- */

static int ascending(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
	return (x > y) - (x < y);
}

static int run_once(const struct options *options)
{
	static struct plan plan;
	uint32_t *samples = calloc(options->count, sizeof(*samples));
	if (!samples)
		die("samples");
	plan = (struct plan){.count = options->count, .steps = 1};
	plan.step[0] = (struct step){.call = CALL_UMOUNT2, .expected = EINVAL};
	snprintf(plan.step[0].target, sizeof(plan.step[0].target), "%s", options->path);
	if (options->call && !parse_step(options->call, &plan.step[0])) {
		fprintf(stderr, "floor: no such call: %s\n", options->call);
		return 2;
	}
	const char *failure = run_plan(&plan, samples);
	if (failure) {
		fprintf(stderr, "floor: %s\n", failure);
		return 1;
	}
	qsort(samples, plan.count, sizeof(*samples), ascending);
	printf("{\"mode\": \"%s\", \"count\": %u, \"us\": {\"p50\": %.2f, \"p99\": %.2f, \"p999\": %.2f, \"min\": %.2f}}\n",
	       mode_names[options->mode], plan.count, samples[plan.count / 2] / 1e3,
	       samples[(uint64_t)plan.count * 99 / 100] / 1e3, samples[(uint64_t)plan.count * 999 / 1000] / 1e3,
	       samples[0] / 1e3);
	free(samples);
	return 0;
}

static int be_caller(const struct options *options)
{
	return options->sock >= 0 ? serve_plans(options->sock) : run_once(options);
}

/* The child tells the number of its listener; the parent takes a copy of it, and the child then keeps none. */
static int be_listener(const struct options *options)
{
	int numbers[2], taken[2];
	if (pipe2(numbers, O_CLOEXEC) < 0 || pipe2(taken, O_CLOEXEC) < 0)
		die("pipe2");
	pid_t caller = fork();
	if (caller < 0)
		die("fork");
	if (caller == 0) {
		char go;
		/* An agent is a service of its own. In one session, and so in one group of the scheduler's (sched(7), "The
		 * autogroup feature"), the two would be two microseconds a call faster than any agent can be. */
		if (setsid() < 0)
			die("setsid");
		int listener = install_filter(options->mode);
		if (listener < 0)
			die("seccomp");
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		if (write(numbers[1], &listener, sizeof(listener)) != sizeof(listener) || read(taken[0], &go, 1) != 1)
			die("the listener is gone");
		close(listener);
		int status = be_caller(options);
		fflush(stdout);
		_exit(status);
	}
	if (options->sock >= 0)
		close(options->sock);
	int number, status, pidfd = (int)syscall(SYS_pidfd_open, caller, 0);
	if (pidfd < 0 || read(numbers[0], &number, sizeof(number)) != sizeof(number))
		die("the caller did not start");
	int listener = (int)syscall(SYS_pidfd_getfd, pidfd, number, 0);
	if (listener < 0 || write(taken[1], "", 1) != 1)
		die("pidfd_getfd");
	serve_caller(listener, caller, options);
	if (waitpid(caller, &status, 0) < 0)
		die("waitpid");
	return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

static void usage(void)
{
	fprintf(stderr, "usage: floor [-m none|answer|resolve|continue] [-n COUNT] [-p PATH] [-c CALL] [-s SOCKET] [-a]\n"
			"  -p  what to unmount; it must be answered with EINVAL (/proc/sys)\n"
			"  -c  another call instead, as calls.h has it: \"mount none /mnt ext4 0 -1\"\n"
			"  -s  a SOCK_SEQPACKET descriptor over which plans come, instead of one run\n"
			"  -a  the default, asynchronous wake-up, as before Linux 6.6\n");
	exit(2);
}

static struct options parse_options(int argc, char **argv)
{
	struct options options = {.count = 30000, .path = "/proc/sys", .sock = -1, .sync_wake_up = 1};
	for (int o; (o = getopt(argc, argv, "m:n:p:c:s:a")) >= 0;) {
		unsigned int i = 0;
		switch (o) {
		case 'm':
			while (i < 4 && strcmp(mode_names[i], optarg) != 0)
				i++;
			if (i == 4)
				usage();
			options.mode = (enum mode)i;
			break;
		case 'n':
			options.count = (unsigned int)strtoul(optarg, NULL, 10);
			break;
		case 'p':
			options.path = optarg;
			break;
		case 'c':
			options.call = optarg;
			break;
		case 's':
			options.sock = atoi(optarg);
			break;
		case 'a':
			options.sync_wake_up = 0;
			break;
		default:
			usage();
		}
	}
	if (optind != argc || options.count == 0 || options.count > COUNT_MAX || strlen(options.path) >= WORD_MAX)
		usage();
	return options;
}

int main(int argc, char **argv)
{
	struct options options = parse_options(argc, argv);
	return options.mode == MODE_NONE ? be_caller(&options) : be_listener(&options);
}
