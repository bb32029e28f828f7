/*
 * Races against whoever looks at a call before the kernel does. Looking for raw nodes all the while, it prints
 *   TRIES DONE, RAW NODES SEEN, WATCHED PATHS OPENED
 *
 *   race watch               -- PATH...        until standard input ends; says "ready" first
 *   race memory WHAT N A B   -- PATH...        the argument's memory changes between A and B
 *   race parent WHAT N A B P -- PATH...        A and B are exchanged, P is a path through A
 *   race number WHAT N A B D -- PATH...        descriptor D refers to A, then to B, ...; D is the path to it
 *   race fstype N TARGET     -- PATH...        the type changes between tmpfs and proc, then tmpfs and sysfs
 *
 * WHAT: umount, detach, bind (from it, to the current path "target"), move (likewise), procfs (mounted onto it).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/vfs.h>
#include <unistd.h>

static atomic_int stop;
static atomic_long raw_seen, opened;
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

static long race(const char *kind, const char *what, long tries)
{
	void *(*changer)(void *) = strcmp(kind, "memory") == 0   ? change_memory
				   : strcmp(kind, "parent") == 0 ? change_parent
								 : change_number;
	pthread_t threads[] = {start(changer), start(watch)};
	long done = 0;
	wait_for_watcher();
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
	} else if (n >= 6) {
		one = argv[4];
		two = argv[5];
		strcpy(buffer, argv[n - 1]);
		if (strcmp(argv[1], "number") == 0)
			number = atoi(strrchr(argv[n - 1], '/') + 1);
		done = race(argv[1], argv[2], atol(argv[3]));
	} else
		return 2;
	printf("%ld %ld %ld\n", done, atomic_load(&raw_seen), atomic_load(&opened));
	return 0;
}
