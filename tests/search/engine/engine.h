/*
 * The engine of the search: it runs inside a guarded container, executes programs of mount operations by processes that
 * live as long as the program, and looks for what must never be there, after every step and all the time. It knows
 * nothing of names but what is managed; which operations make up a program is Python's business (tests/search).
 */
#ifndef ENGINE_H
#define ENGINE_H
#include "compat.h"

#include <stdatomic.h>
#include <stdio.h>

enum {
	WORKERS = 4, SLOTS = 3, SLOT_FD = 100, STEPS_MAX = 1024, MOUNTS_MAX = 4096, NAMESPACES = WORKERS + 2,
	HOT = 24, NODES = 16, NUMBERS = 6, STRINGS = 4, MESSAGE = 16384, TOO_MANY = 300,
	/* What a step's result is when the kernel's answer was no truth. */
	STILL_THERE = 9001, NOT_THERE = 9002, DIED = 9003, STUCK = 9004
};

enum op {
	OP_MOUNT, OP_UMOUNT, OP_OPEN_TREE, OP_MOVE_MOUNT, OP_NEW, OP_SETATTR, OP_PIVOT_ROOT, OP_CHROOT, OP_CHDIR, OP_UNSHARE,
	OP_FORK, OP_SETNS, OP_OPEN, OP_CLOSE, OP_SEND, OP_RENAME, OP_MKDIR, OP_FSPICK, OP_RECEIVE, OP_COUNT
};

/* One operation, as it comes from Python and as it goes to a worker. */
struct step {
	uint32_t op, worker;
	int64_t n[NUMBERS];
	const char *s[STRINGS];        /* in `text`; empty: NULL */
	char text[MESSAGE];
};

struct result {
	int32_t error;
	int32_t pid;                   /* of who goes on, where that is another process */
};

/* A node of procfs or sysfs. */
struct node {
	uint64_t magic, ino;
};

/* What all processes of the engine share. */
struct shared {
	atomic_int quiet, is_quiet;    /* nobody may look: a descriptor makes an unmount EBUSY */
	atomic_int step;
	atomic_long looks;
	atomic_int wrong;
	int pids[WORKERS];
	char hot[HOT][PATH_MAX];
	char text[8][1024];
	/* What the container had when the engine started. */
	uint32_t view_major, view_minor, shield_major, shield_minor;
	struct node raw[NODES];        /* what is below a cover: the same in every instance of its filesystem */
	int raw_count;
	bool truthful;                 /* the guard's answers are */
	bool decides;                  /* the guard is the real one: originals stay */
};
extern struct shared *shared;
extern int proc_fd;                    /* the container's first procfs */

/* A mount, as statmount(2) tells of it. */
struct mount {
	uint64_t id, parent, magic, attributes;
	uint32_t major, minor;
	const char *root, *point;      /* in the table's arena; point NULL: cannot be reached from the root */
};

struct table {
	int count;
	bool pivoted;                  /* of a baseline: its root is no longer that of the namespace */
	size_t used;
	struct mount mounts[MOUNTS_MAX];
	char arena[1 << 20];
};

/* audit.c */
__attribute__((format(printf, 1, 2))) void report(const char *format, ...);
int read_table(struct table *table, uint64_t namespace);
const struct mount *find_mount(const struct table *table, uint64_t id);
void learn_managed(const struct table *table);
void audit(const struct table *table);
/* What was there at first is there, and no weaker; whether nothing else is. */
bool compare(const struct table *baseline, const struct table *table, const char *where);
/* watch.c */
void look_at(const char *prefix);
void watch(void);
void set_hot(const struct step *step);
/* worker.c */
void work(int number, int sock, const int *mailboxes);
const char *expand(const char *path, char *out, size_t size);
int take_fd(int sock);
uint64_t top_mount(const char *path, bool follow);
int message_size(const struct step *step);
bool read_step(struct step *step, const char *data, size_t size);
/* copies.c */
struct walk {
	uint32_t kind, private;
	uint32_t before, calls, left;
	char text[1024];
};
void take_copies_away(struct walk *walk, const struct table *baseline, uint64_t namespace);
/* Everything that was not there at first, from the namespace of the caller; false if something stays. */
bool clean_up(const struct table *baseline);

uint64_t namespace_of(int pid);
#endif
