/*
 *   engine FD MODE MAGIC:INO ...
 *
 * MODE is that of the guard: real, continue, random; MAGIC and INO say which nodes nobody may reach.
 *
 * Reads programs from the socket FD, one a message, and answers each with what became of it. A program has a stem, a
 * process with a mount namespace of its own (or in the container's first), whose children are the workers.
 */
#include "engine.h"

#include <poll.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>

enum { PROGRAM_MAX = 160 * 1024, PATIENCE_MS = 30000 };

/* Before the steps, each of which has its size before it. */
struct program {
	uint32_t workers, own_namespace, walk, walk_private, steps;
};

struct outcome {
	uint32_t done, dirty, wrong, looks, mounts, before, calls, left, skipped;
};

/* What a stem says when it is ready. */
struct ready {
	uint64_t namespace;
	int pids[WORKERS];
};

struct shared *shared;
int proc_fd;

static struct table first_baseline, stem_baseline, table;
static uint64_t first_namespace;
static char input[PROGRAM_MAX], output[64 * 1024];
static int32_t errors[STEPS_MAX];

static void pairs(int (*sockets)[2], int count)
{
	for (int i = 0; i < count; i++)
		if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, sockets[i]) < 0)
			exit(2);
}

/* ---- the stem ---------------------------------------------------------------------------------------------- */

/* A filesystem of the program's own, whatever a guard answers: one that decides at random may refuse, or lie. */
static void make_place(void)
{
	static const char *const directories[] = {
		"/run/w/a", "/run/w/b", "/run/w/c", "/run/w/d", "/run/w/old", "/run/w/p", "/run/w/p/x", "/run/w/q", "/run/w/q/x",
		"/run/w/jail",
	};
	mkdir("/run/w", 0755);
	uint64_t before = top_mount("/run/w", true);
	for (int i = 0; i < 1000 && top_mount("/run/w", true) == before; i++)
		ix_mount("w", "/run/w", "tmpfs", 0, NULL);
	for (size_t i = 0; i < sizeof(directories) / sizeof(directories[0]); i++)
		mkdir(directories[i], 0755);
	if (symlink("/proc", "/run/w/l") < 0 || symlink("../../sys", "/run/w/m") < 0)
		return;
	ix_close_fd(&(int){open("/run/w/f", O_CREAT | O_CLOEXEC, 0644)});
}

static void stem(const struct program *program, int sock, const int *worker_socks, const int *mailboxes)
{
	struct ready ready = {0};
	struct walk walk;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (program->own_namespace && unshare(CLONE_NEWNS) < 0)
		_exit(2);
	read_table(&stem_baseline, 0);
	make_place();
	ready.namespace = namespace_of(getpid());
	for (uint32_t i = 0; i < program->workers; i++) {
		ready.pids[i] = fork();
		if (ready.pids[i] == 0) {
			prctl(PR_SET_PDEATHSIG, SIGKILL);
			close(sock);
			work((int)i, worker_socks[i], mailboxes);
		}
	}
	for (uint32_t i = 0; i < program->workers; i++)
		close(worker_socks[i]);
	if (send(sock, &ready, sizeof(ready), MSG_NOSIGNAL) < 0 || recv(sock, &walk, sizeof(walk), 0) != sizeof(walk))
		_exit(1);
	while (wait(NULL) > 0 || errno == EINTR)
		;
	take_copies_away(&walk, &stem_baseline, 0);
	send(sock, &walk, sizeof(walk), MSG_NOSIGNAL);
	_exit(0);
}

/* ---- the coordinator ------------------------------------------------------------------------------------------ */

struct run {
	struct program program;
	struct outcome outcome;
	int stem_pid, stem_sock;
	uint64_t stem_namespace;
	int socks[WORKERS];
	bool tainted;                  /* locked trees may have come from a user namespace inside */
};

static bool answers(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};
	int r;
	while ((r = poll(&p, 1, PATIENCE_MS)) < 0 && errno == EINTR)
		;
	return r > 0;
}

static bool start(struct run *run)
{
	int socks[WORKERS][2], boxes[WORKERS][2], stem_socks[1][2];
	int theirs[WORKERS], mailboxes[2 * WORKERS];
	pairs(socks, WORKERS);
	pairs(boxes, WORKERS);
	pairs(stem_socks, 1);
	for (int i = 0; i < WORKERS; i++) {
		theirs[i] = socks[i][1];
		mailboxes[2 * i] = boxes[i][0];
		mailboxes[2 * i + 1] = boxes[i][1];
	}
	run->stem_pid = fork();
	if (run->stem_pid == 0) {
		for (int i = 0; i < WORKERS; i++)
			close(socks[i][0]);
		close(stem_socks[0][0]);
		stem(&run->program, stem_socks[0][1], theirs, mailboxes);
	}
	for (int i = 0; i < WORKERS; i++) {
		run->socks[i] = socks[i][0];
		close(socks[i][1]);
		close(boxes[i][0]);
		close(boxes[i][1]);
	}
	close(stem_socks[0][1]);
	run->stem_sock = stem_socks[0][0];
	struct ready ready;
	if (run->stem_pid < 0 || !answers(run->stem_sock) ||
	    recv(run->stem_sock, &ready, sizeof(ready), 0) != sizeof(ready))
		return false;
	run->stem_namespace = ready.namespace;
	memcpy(shared->pids, ready.pids, sizeof(ready.pids));
	read_table(&stem_baseline, ready.namespace);
	stem_baseline.pivoted = false;
	/* Its own place is no part of what must stay. */
	if (stem_baseline.count && strcmp(stem_baseline.mounts[stem_baseline.count - 1].point, "/run/w") == 0)
		stem_baseline.count--;
	return true;
}

/* One operation by one worker, while the watcher looks. */
static int ask(struct run *run, uint32_t worker, const void *data, size_t size)
{
	struct result result;
	int sock = run->socks[worker];
	if (send(sock, data, size, MSG_NOSIGNAL) < 0)
		return DIED;
	if (!answers(sock)) {
		report("no answer in %d ms", PATIENCE_MS);
		return STUCK;
	}
	if (recv(sock, &result, sizeof(result), 0) != sizeof(result))
		return DIED;
	if (result.pid > 0)
		shared->pids[worker] = result.pid;
	if (result.error == STILL_THERE)
		report("umount2 said 0, and the mount is still there");
	if (result.error == NOT_THERE)
		report("mount said 0, and nothing is there");
	return result.error;
}

static int make_step(struct run *run, const struct step *step, const char *data, size_t size)
{
	set_hot(step);
	int error = ask(run, step->worker, data, size);
	if (step->op == OP_SEND && error == 0 && (uint64_t)step->n[1] < run->program.workers) {
		static char copy[PROGRAM_MAX];
		uint32_t op = OP_RECEIVE;
		memcpy(copy, data, size);
		memcpy(copy, &op, sizeof(op));
		error = ask(run, (uint32_t)step->n[1], copy, size);
	}
	if (step->op == OP_UNSHARE && error == 0 && (step->n[0] & CLONE_NEWUSER))
		run->tainted = true;
	return error;
}

/* After every step: all mount namespaces, all roots, working directories and descriptors. */
static void look_around(struct run *run)
{
	uint64_t seen[NAMESPACES] = {first_namespace, run->stem_namespace};
	int count = run->stem_namespace == first_namespace ? 1 : 2;
	for (uint32_t i = 0; i < run->program.workers; i++) {
		uint64_t id = shared->pids[i] ? namespace_of(shared->pids[i]) : 0;
		int k = 0;
		while (k < count && seen[k] != id)
			k++;
		if (id && k == count)
			seen[count++] = id;
	}
	for (int i = 0; i < count; i++) {
		int n = read_table(&table, seen[i]);
		if (n == -E2BIG)
			run->outcome.mounts = MOUNTS_MAX;
		else if (n < 0 && n != -ENOENT)
			report("no table of a mount namespace: errno %d", -n);
		if (n < 0)
			continue;
		if ((uint32_t)table.count > run->outcome.mounts)
			run->outcome.mounts = (uint32_t)table.count;
		audit(&table);
		if (i == 0)
			run->outcome.dirty |= !compare(&first_baseline, &table, "first namespace");
		else if (run->stem_namespace == seen[i]) {
			/* With another root nothing stands where the originals stand any more. */
			const struct mount *root = find_mount(&table, stem_baseline.mounts[0].id);
			stem_baseline.pivoted = stem_baseline.pivoted || !root || !root->point || strcmp(root->point, "/") != 0;
			compare(&stem_baseline, &table, "namespace of the program");
		}
	}
	for (int i = 0; i < HOT; i++)
		if (shared->hot[i][0])
			look_at(shared->hot[i]);
	for (uint32_t i = 0; i < run->program.workers; i++) {
		char path[64];
		if (!shared->pids[i])
			continue;
		for (int k = 0; k < SLOTS + 2; k++) {
			const char *what = k == 0 ? "root" : k == 1 ? "cwd" : "fd/";
			int n = snprintf(path, sizeof(path), "%d/%s", shared->pids[i], what);
			if (k > 1)
				snprintf(path + n, sizeof(path) - (size_t)n, "%d", SLOT_FD + k - 2);
			look_at(path);
		}
	}
}

static void steps(struct run *run, const char *data, size_t size)
{
	static struct step step;
	for (uint32_t i = 0; i < run->program.steps && i < STEPS_MAX; i++) {
		uint32_t length;
		if (size < sizeof(length))
			return;
		memcpy(&length, data, sizeof(length));
		if (length > size - sizeof(length) || !read_step(&step, data + sizeof(length), length))
			return;
		atomic_store(&shared->step, (int)i);
		errors[i] = shared->pids[step.worker] ? make_step(run, &step, data + sizeof(length), length) : DIED;
		data += sizeof(length) + length;
		size -= sizeof(length) + length;
		run->outcome.done = i + 1;
		look_around(run);
		if (atomic_load(&shared->wrong) || errors[i] == STUCK || run->outcome.mounts > TOO_MANY)
			return;
	}
}

static void let_nobody_look(bool quiet)
{
	atomic_store(&shared->quiet, quiet);
	while (quiet && !atomic_load(&shared->is_quiet))
		sched_yield();
}

static void finish(struct run *run)
{
	struct walk walk = {.kind = run->program.walk, .private = run->program.walk_private};
	struct outcome *o = &run->outcome;
	memset(shared->hot, 0, sizeof(shared->hot));
	for (int i = 0; i < WORKERS; i++) {
		if (shared->pids[i] > 0)
			kill(shared->pids[i], SIGKILL);
		close(run->socks[i]);
	}
	memset(shared->pids, 0, sizeof(shared->pids));
	o->skipped = !shared->decides || run->tainted || o->mounts > TOO_MANY || atomic_load(&shared->wrong);
	if (o->skipped)
		walk.kind = 0;
	let_nobody_look(true);
	atomic_store(&shared->step, (int)o->done);
	if (send(run->stem_sock, &walk, sizeof(walk), MSG_NOSIGNAL) < 0 || !answers(run->stem_sock) ||
	    recv(run->stem_sock, &walk, sizeof(walk), 0) != sizeof(walk))
		report("the stem is gone");
	let_nobody_look(false);
	o->before = walk.before;
	o->calls = walk.calls;
	o->left = walk.left;
	if (walk.left && walk.private)
		report("%u of %u copies are left after %u calls:%s", walk.left, walk.before, walk.calls, walk.text);
	kill(run->stem_pid, SIGKILL);
	waitpid(run->stem_pid, NULL, 0);
	close(run->stem_sock);
	if (o->dirty || !run->program.own_namespace) {
		bool clean = clean_up(&first_baseline);
		read_table(&table, 0);
		o->dirty = !clean || !compare(&first_baseline, &table, "afterwards");
	}
}

static size_t run_program(size_t size)
{
	struct run run = {0};
	if (size < sizeof(run.program))
		exit(2);
	memcpy(&run.program, input, sizeof(run.program));
	if (run.program.workers > WORKERS)
		exit(2);
	atomic_store(&shared->wrong, 0);
	atomic_store(&shared->looks, 0);
	atomic_store(&shared->step, -1);
	if (start(&run))
		steps(&run, input + sizeof(run.program), size - sizeof(run.program));
	else
		report("the stem did not start");
	finish(&run);
	run.outcome.wrong = (uint32_t)atomic_load(&shared->wrong);
	run.outcome.looks = (uint32_t)atomic_load(&shared->looks);
	size_t used = sizeof(run.outcome), each = run.outcome.done * sizeof(errors[0]);
	memcpy(output, &run.outcome, used);
	memcpy(output + used, errors, each);
	used += each;
	for (uint32_t i = 0; i < run.outcome.wrong && i < 8; i++)
		used += (size_t)snprintf(output + used, sizeof(output) - used, "%s\n", shared->text[i]);
	return used;
}

/* What there is to begin with: nothing has been attacked yet. */
static void learn(const char *mode, char **nodes)
{
	struct ix_stat st;
	for (; *nodes && shared->raw_count < NODES; nodes++) {
		char *end;
		uint64_t magic = strtoull(*nodes, &end, 10);
		shared->raw[shared->raw_count++] = (struct node){magic, strtoull(end + 1, NULL, 10)};
	}
	shared->truthful = strcmp(mode, "random") != 0;
	shared->decides = strcmp(mode, "real") == 0;
	if (ix_statx(AT_FDCWD, "/proc/uptime", 0, &st) < 0)
		exit(2);
	shared->view_major = st.dev_major;
	shared->view_minor = st.dev_minor;
	if (ix_statx(AT_FDCWD, "/sys/firmware", 0, &st) < 0)
		exit(2);
	shared->shield_major = st.dev_major;
	shared->shield_minor = st.dev_minor;
	first_namespace = namespace_of(getpid());
	read_table(&first_baseline, 0);
	atomic_store(&shared->step, -1);
	learn_managed(&first_baseline);
	audit(&first_baseline);
	for (int i = 0; i < atomic_load(&shared->wrong) && i < 8; i++)
		fprintf(stderr, "%s\n", shared->text[i]);
	if (atomic_load(&shared->wrong))
		exit(2);
}

int main(int argc, char **argv)
{
	if (argc < 4)
		return 2;
	int sock = atoi(argv[1]);
	fcntl(sock, F_SETFD, FD_CLOEXEC);
	shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	proc_fd = open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
	if (shared == MAP_FAILED || proc_fd < 0)
		return 2;
	learn(argv[2], argv + 3);
	int watcher = fork();
	if (watcher == 0) {
		prctl(PR_SET_PDEATHSIG, SIGKILL);
		close(sock);
		watch();
	}
	for (;;) {
		ssize_t n = recv(sock, input, sizeof(input), 0);
		if (n <= 0)
			break;
		size_t used = run_program((size_t)n);
		if (send(sock, output, used, MSG_NOSIGNAL) < 0)
			break;
	}
	kill(watcher, SIGKILL);
	return 0;
}
