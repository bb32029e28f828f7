/*
 * Races against whoever looks at a call before the kernel does. Looking for raw nodes all the while, it prints
 *   TRIES DONE, RAW NODES SEEN, WATCHED PATHS OPENED
 *
 *   race watch               -- PATH...        until standard input ends; says "ready" first
 *   race memory WHAT N A B   -- PATH...        the argument's memory changes between A and B
 *   race parent WHAT N A B P -- PATH...        A and B are exchanged, P is a path through A
 *   race number WHAT N A B D -- PATH...        descriptor D refers to A, then to B, ...; D is the path to it
 *   race fstype N TARGET     -- PATH...        the type changes between tmpfs and proc, then tmpfs and sysfs
 *   race outside WHAT N A B  -- PATH...        as memory, but by another process, with process_vm_writev
 *   race peer WHAT N A B P   -- PATH...        as parent, but from another mount namespace
 *   race root WHAT N A P     -- PATH...        a thread that shares root and working directory leaves them for A
 *   race kill WHAT N P       -- PATH...        the caller is killed, and its thread ID taken by another process
 *   race twins N PROC COPY   -- PATH...        two namespaces ask for the same covers of a copy of PROC at once
 *
 * WHAT: umount, detach, bind (from it, to the current path "target"), move (likewise), procfs (mounted onto it), swap
 * (two covers of a recursive bind of it at "target").
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/sched.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/vfs.h>
#include <sys/wait.h>
#include <unistd.h>

static atomic_int stop;
static atomic_long raw_seen, opened;
static atomic_int *turn;       /* shared with other processes */
static char **watched;
static int watched_count;

static char *buffer;           /* what the call is given */
static const char *one, *two;  /* what changes */
static int number = -1;
static int tells;              /* that something was opened, as soon as it is */

static int is_raw(int fd)
{
	struct statfs s;
	return fstatfs(fd, &s) == 0 && (s.f_type == 0x9fa0 || s.f_type == 0x62656572);
}

static void look_at(const char *path)
{
	/* A raw node may show only through what opening it does, or only to those who do not: both. */
	for (int i = 0; i < 2; i++) {
		int fd = open(path, (i ? O_RDONLY | O_NONBLOCK : O_PATH) | O_CLOEXEC);
		if (fd < 0)
			continue;
		if (atomic_fetch_add(&opened, 1) == 0 && tells)
			(void)!write(1, "opened\n", 7);
		if (is_raw(fd)) {
			atomic_fetch_add(&raw_seen, 1);
			fprintf(stderr, "raw: %s\n", path);
		}
		close(fd);
	}
}

static void *watch(void *unused)
{
	(void)unused;
	/* Its own root and working directory, whatever the others do with theirs. */
	if (unshare(CLONE_FS) < 0)
		exit(2);
	while (!atomic_load(&stop))
		for (int i = 0; i < watched_count; i++)
			look_at(watched[i]);
	return NULL;
}

static void *change_memory(void *unused)
{
	(void)unused;
	for (unsigned int i = 0; !atomic_load(&stop); i++) {
		const char *text = i & 1 ? one : two;
		for (size_t k = 0;; k++) {
			((volatile char *)buffer)[k] = text[k];
			if (!text[k])
				break;
		}
		for (volatile unsigned int pause = 0; pause < (i * 7919) % 4096; pause++)
			;
	}
	return NULL;
}

static void *change_parent(void *unused)
{
	(void)unused;
	while (!atomic_load(&stop))
		syscall(SYS_renameat2, AT_FDCWD, one, AT_FDCWD, two, 2 /* RENAME_EXCHANGE */);
	return NULL;
}

static void *change_number(void *unused)
{
	(void)unused;
	int a = open(one, O_PATH | O_CLOEXEC), b = open(two, O_PATH | O_CLOEXEC);
	while (!atomic_load(&stop)) {
		dup2(a, number);
		dup2(b, number);
	}
	return NULL;
}

/* ---- by other processes ---------------------------------------------------------------------------------- */

static pid_t spawn(void (*body)(void))
{
	pid_t pid = fork();
	if (pid < 0)
		exit(2);
	if (pid == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		body();
		_exit(3);
	}
	return pid;
}

static void end(pid_t pid)
{
	int status;
	kill(pid, SIGKILL);
	/* Had it ended before, nothing would have changed. */
	if (waitpid(pid, &status, 0) != pid || !WIFSIGNALED(status))
		exit(2);
}

static void write_from_outside(void)
{
	pid_t parent = getppid();
	for (unsigned int i = 0;; i++) {
		const char *text = i & 1 ? one : two;
		struct iovec local = {(void *)(uintptr_t)text, strlen(text) + 1}, remote = {buffer, strlen(text) + 1};
		if (process_vm_writev(parent, &local, 1, &remote, 1, 0) < 0)
			return;
		atomic_fetch_add(turn, 1);
	}
}

static void rename_from_outside(void)
{
	if (unshare(CLONE_NEWNS) < 0)
		return;
	for (;;)
		if (syscall(SYS_renameat2, AT_FDCWD, one, AT_FDCWD, two, 2 /* RENAME_EXCHANGE */) == 0)
			atomic_fetch_add(turn, 1);
}

static void *change_root(void *unused)
{
	(void)unused;
	int here = open(".", O_PATH | O_CLOEXEC), root = open("/", O_PATH | O_CLOEXEC), away = open(one, O_PATH | O_CLOEXEC);
	int own = open("/proc/self/ns/mnt", O_RDONLY | O_CLOEXEC);
	while (!atomic_load(&stop)) {
		if (fchdir(away) < 0 || chroot(".") < 0)
			exit(2);
		setns(own, CLONE_NEWNS);       /* refused to who shares them */
		if (fchdir(root) < 0 || chroot(".") < 0 || fchdir(here) < 0)
			exit(2);
	}
	return NULL;
}

static void clear(const char *path)
{
	for (int i = 0; i < 1000 && umount2(path, MNT_DETACH) == 0; i++)
		;
}

static void attempt(const char *what)
{
	if (strcmp(what, "umount") == 0)
		umount2(buffer, 0);
	else if (strcmp(what, "detach") == 0)
		umount2(buffer, MNT_DETACH);
	else if (strcmp(what, "bind") == 0) {
		if (mount(buffer, "target", NULL, MS_BIND, NULL) == 0) {
			look_at("target/sys/kernel/hostname");
			look_at("target/sys");
			look_at("target/virtual");
			umount2("target", MNT_DETACH);
		}
	} else if (strcmp(what, "move") == 0)
		mount(buffer, "target", NULL, MS_MOVE, NULL);
	else if (strcmp(what, "procfs") == 0) {
		if (mount("x", buffer, "proc", 0, NULL) == 0)
			umount2(buffer, MNT_DETACH);
	} else
		abort();
}

static void attempt_fstype(const char *target)
{
	char path[512];
	static const char *const below[] = {"sys/kernel/hostname", "uptime", "kernel", "devices/virtual"};
	if (mount("x", target, buffer, 0, NULL) != 0)
		return;
	for (size_t i = 0; i < sizeof(below) / sizeof(below[0]); i++) {
		snprintf(path, sizeof(path), "%s/%s", target, below[i]);
		look_at(path);
	}
	umount2(target, MNT_DETACH);
}

static pthread_t start(void *(*body)(void *))
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, body, NULL))
		exit(2);
	return thread;
}

/* The shortest race is over before a thread has begun. */
static void wait_for_watcher(void)
{
	while (!atomic_load(&opened))
		sched_yield();
}

static long race_fstype(long tries, const char *target)
{
	long done = 0;
	for (int half = 0; half < 2; half++) {
		one = "tmpfs";
		two = half ? "sysfs" : "proc";
		atomic_store(&stop, 0);
		pthread_t changer = start(change_memory), watcher = start(watch);
		wait_for_watcher();
		for (long i = 0; i < tries / 2; i++, done++)
			attempt_fstype(target);
		atomic_store(&stop, 1);
		pthread_join(changer, NULL);
		pthread_join(watcher, NULL);
	}
	return done;
}

static long race_outside(const char *kind, const char *what, long tries)
{
	pthread_t watcher = start(watch);
	wait_for_watcher();
	pid_t pid = spawn(strcmp(kind, "outside") == 0 ? write_from_outside : rename_from_outside);
	long done = 0;
	while (!atomic_load(turn))
		sched_yield();
	for (; done < tries; done++)
		attempt(what);
	end(pid);
	atomic_store(&stop, 1);
	pthread_join(watcher, NULL);
	return done;
}

/* ---- a caller that is killed ------------------------------------------------------------------------------ */

static const char *killed_what;

static void call_for_ever(void)
{
	atomic_store(turn, 1);
	for (;;)
		attempt(killed_what);
}

static long mounts(void)
{
	struct {
		uint32_t size, spare;
		uint64_t mnt_id, param;
	} request = {24, 0, UINT64_MAX, 0};
	static uint64_t ids[4096];
	return syscall(458 /* listmount */, &request, ids, 4096, 0);
}

/* Has the thread ID of the one that was killed. Nothing that was begun for that one may happen to it. */
static int successor(void)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (unshare(CLONE_NEWNS) < 0)
		return 2;
	long before = mounts();
	for (int i = 0; i < 20; i++)
		sched_yield();
	umount2("/nowhere", 0);
	return mounts() == before ? 0 : 1;
}

static bool succeed(pid_t pid)
{
	struct clone_args args = {.exit_signal = SIGCHLD, .set_tid = (uintptr_t)&pid, .set_tid_size = 1};
	int status;
	long got = syscall(SYS_clone3, &args, sizeof(args));
	if (got == 0)
		_exit(successor());
	if (got < 0)
		return false;          /* taken meanwhile by somebody else */
	if (waitpid((pid_t)got, &status, 0) != got || !WIFEXITED(status) || WEXITSTATUS(status) == 2)
		exit(2);
	if (WEXITSTATUS(status) == 1) {
		atomic_fetch_add(&raw_seen, 1);
		fprintf(stderr, "something happened to the successor\n");
	}
	return true;
}

static long race_kill(const char *what, long tries)
{
	pthread_t watcher = start(watch);
	long done = 0, reused = 0;
	unsigned int pause = 1;
	killed_what = what;
	wait_for_watcher();
	for (; done < tries; done++) {
		atomic_store(turn, 0);
		pid_t pid = spawn(call_for_ever);
		while (!atomic_load(turn))
			sched_yield();
		pause = pause * 1103515245 + 12345;
		for (volatile unsigned int i = 0; i < pause >> 14; i++)
			;
		end(pid);
		reused += succeed(pid);
		if (strcmp(what, "procfs") == 0)
			clear(buffer);
		clear("target");
	}
	atomic_store(&stop, 1);
	pthread_join(watcher, NULL);
	if (reused < tries / 2)
		exit(2);
	return done;
}

/* ---- two namespaces -------------------------------------------------------------------------------------------- */

static void take_covers_away(const char *copy)
{
	char path[512];
	static const char *const covers[] = {"uptime", "sys", "swaps"};
	for (size_t i = 0; i < sizeof(covers) / sizeof(covers[0]); i++) {
		snprintf(path, sizeof(path), "%s/%s", copy, covers[i]);
		umount2(path, 0);
	}
}

/* `turn`: even: the next copy is being made; odd: both at it. */
static void twin(void)
{
	if (unshare(CLONE_NEWNS) < 0)
		return;
	for (int next = 1;; next += 2) {
		while (atomic_load(turn) < next)
			sched_yield();
		take_covers_away(two);
		atomic_store(turn, next + 1);
	}
}

static long race_twins(long tries)
{
	long done = 0;
	pthread_t watcher = start(watch);
	wait_for_watcher();
	pid_t pid = spawn(twin);
	for (; done < tries; done++) {
		/* A guard that decides at random may refuse. */
		for (int i = 0; i < 100 && mount(one, two, NULL, MS_BIND | MS_REC, NULL) < 0; i++)
			;
		atomic_fetch_add(turn, 1);
		take_covers_away(two);
		while (atomic_load(turn) & 1)
			sched_yield();
		clear(two);
	}
	end(pid);
	atomic_store(&stop, 1);
	pthread_join(watcher, NULL);
	return done;
}

static long race(const char *kind, const char *what, long tries)
{
	void *(*changer)(void *) = strcmp(kind, "memory") == 0   ? change_memory
				   : strcmp(kind, "parent") == 0 ? change_parent
				   : strcmp(kind, "root") == 0   ? change_root
								 : change_number;
	pthread_t threads[2];
	long done = 0;
	threads[1] = start(watch);
	wait_for_watcher();
	threads[0] = start(changer);
	for (; done < tries; done++)
		attempt(what);
	atomic_store(&stop, 1);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	return done;
}

int main(int argc, char **argv)
{
	int n = 1;
	while (n < argc && strcmp(argv[n], "--") != 0)
		n++;
	watched = argv + n + 1;
	watched_count = n < argc ? argc - n - 1 : 0;
	buffer = calloc(1, 4096);
	turn = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (turn == MAP_FAILED)
		return 2;
	long done = 0;
	if (n == 2 && strcmp(argv[1], "watch") == 0) {
		char c;
		tells = 1;
		(void)!write(1, "ready\n", 6);
		pthread_t threads[] = {start(watch), start(watch)};
		while (read(0, &c, 1) > 0)
			;
		atomic_store(&stop, 1);
		for (int i = 0; i < 2; i++)
			pthread_join(threads[i], NULL);
	} else if (n == 4 && strcmp(argv[1], "fstype") == 0) {
		strcpy(buffer, "tmpfs");
		done = race_fstype(atol(argv[2]), argv[3]);
	} else if (n == 5 && strcmp(argv[1], "twins") == 0) {
		one = argv[3];
		two = argv[4];
		done = race_twins(atol(argv[2]));
	} else if (n == 5 && strcmp(argv[1], "kill") == 0) {
		strcpy(buffer, argv[4]);
		done = race_kill(argv[2], atol(argv[3]));
	} else if (n == 6 && strcmp(argv[1], "root") == 0) {
		one = argv[4];
		strcpy(buffer, argv[5]);
		done = race(argv[1], argv[2], atol(argv[3]));
	} else if (n >= 6) {
		one = argv[4];
		two = argv[5];
		strcpy(buffer, argv[n - 1]);
		if (strcmp(argv[1], "number") == 0)
			number = atoi(strrchr(argv[n - 1], '/') + 1);
		bool outside = strcmp(argv[1], "outside") == 0 || strcmp(argv[1], "peer") == 0;
		done = (outside ? race_outside : race)(argv[1], argv[2], atol(argv[3]));
	} else
		return 2;
	printf("%ld %ld %ld\n", done, atomic_load(&raw_seen), atomic_load(&opened));
	return 0;
}
