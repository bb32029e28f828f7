/*
 * The pump: takes requests of the view from /dev/fuse and answers by itself those that need no thought: opens of what
 * everybody may read, reads of real nodes among that, listings that were made a moment ago (pages.c). All else it hands
 * to its caller (interceptor/view/session.py) as it came, and so it does for callers in namespaces further in.
 *
 * Where all that counts is who opened a node, the envoy hands over its open descriptor at the first read, and the next
 * ones need no envoy. (FUSE passthrough would need no pump either, but procfs may not be below anything:
 * s_stack_depth in fs/proc/root.c.) Such reads do not wait for anybody: they are those of sysctls.
 *
 * A read goes to the container's envoy, which nearly always answers within microseconds: the pump waits for that, but
 * not for long. What takes longer is handed over, too, with the number of the request that the envoy has got already,
 * and that envoy's reads go the long way for a while: one container cannot hold up the others.
 */
#include "pump.h"

#include <linux/fuse.h>
#include <poll.h>
#include <stdio.h>
#include <sys/resource.h>
#include <time.h>

enum {
	BUCKETS = 4096, ENDS = 1024, PATHS_MAX = 4095, DATA_MAX = 65536, OP_READ = 3,
	PATIENCE_US = 500,                       /* for an envoy, while everybody waits */
	SULK_NS = 10 * 1000 * 1000,              /* how long an envoy goes the long way after that */
	SPIN_NS = 60 * 1000,                     /* for what follows a request that was served here */
	HARM_MAX = 8,                            /* how much oftener than not it may keep somebody from asking */
	SHY_NS = 50 * 1000 * 1000,               /* how long there is none after that */
	BATCH = 64, BATCHES = 8,                 /* requests until others are looked for, and until they have a turn */
	KEPT_MAX = 2048, KEEP = 1,
};
#define OURS (1ULL << 62)                        /* handles that we gave out */
#define FOREIGN (1ULL << 61)                     /* handles of callers in namespaces further in */
#define RESENT (1ULL << 63)                      /* FUSE_UNIQUE_RESEND */
#define OUR_SEQ 0x80000000U
#define NOFLUSH (1U << 5)

struct request {                                 /* as in envoy.c */
	uint32_t seq;
	uint8_t op, base;
	uint16_t path_len;
	uint32_t size, flags;
	uint64_t offset;
};

struct reply {
	uint32_t seq;
	int32_t error;
	uint64_t value;
};

struct node {
	struct node *next;
	uint64_t id;
	int envoy;
	int kept;                                /* its place among those, or -1 */
	uint8_t base, flags;                     /* IX_NODE_* */
	int8_t ns;                               /* index of the namespace that it is one of, or -1 */
	uint16_t path_len;
	uint32_t said_len;
	char *said;                              /* a value of the container's own; NULL: it has none here */
	char path[];
};

struct envoy {
	int fd;                                  /* -1: gone */
	int waiting;                             /* answers that it owes to others than us */
	int64_t long_way_until;                  /* CLOCK_MONOTONIC, ns */
	struct ix_home home;
};

struct kept {
	struct node *node;                       /* NULL: free */
	int fd;
};

struct ix_pump {
	int device, proc;
	uint32_t seq;
	uint64_t handle;
	struct node *nodes[BUCKETS];
	struct envoy *envoys;
	int envoy_count;
	struct kept *kept;
	int kept_count, hand;                    /* which one makes room next */
	struct ix_pages *pages;
	int64_t in_vain, shy_until;              /* when spinning was given up, or 0, and until when there is none */
	int harm;                                /* how much oftener than not it kept somebody from asking */
	struct { uint64_t handle, end; } ends[ENDS];   /* where a handle's last read came to the end */
	struct { struct request head; char path[PATHS_MAX]; } out;
	struct { struct reply head; char data[DATA_MAX]; } in;
};

int64_t ix_pump_now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

struct ix_pages *ix_pump_pages(struct ix_pump *pump)
{
	return pump->pages;
}

/* NULL without memory. `handle` is what nobody has given out before; `proc_fd` is the host's procfs. */
struct ix_pump *ix_pump_new(int device, int proc_fd, uint64_t handle)
{
	struct rlimit files = {.rlim_cur = 0};
	struct ix_pump *pump = calloc(1, sizeof(*pump));
	if (!pump)
		return NULL;
	getrlimit(RLIMIT_NOFILE, &files);
	*pump = (struct ix_pump){.device = device, .proc = proc_fd, .handle = handle | OURS, .seq = (uint32_t)handle};
	pump->kept_count = files.rlim_cur / 4 < KEPT_MAX ? (int)(files.rlim_cur / 4) : KEPT_MAX;
	pump->kept = calloc((size_t)pump->kept_count + 1, sizeof(*pump->kept));
	pump->pages = ix_pages_new();
	if (!pump->kept || !pump->pages) {
		ix_pump_free(pump);
		return NULL;
	}
	return pump;
}

/* A number for an envoy's socket, or -ENOMEM. */
int ix_pump_envoy(struct ix_pump *pump, int fd, const struct ix_home *home)
{
	struct envoy *more = realloc(pump->envoys, sizeof(*more) * ((size_t)pump->envoy_count + 1));
	if (!more)
		return -ENOMEM;
	pump->envoys = more;
	more[pump->envoy_count] = (struct envoy){.fd = fd, .home = *home};
	return pump->envoy_count++;
}

static void unkeep(struct kept *kept)
{
	if (kept->node) {
		kept->node->kept = -1;
		close(kept->fd);
		*kept = (struct kept){.node = NULL};
	}
}

void ix_pump_envoy_gone(struct ix_pump *pump, int envoy)
{
	pump->envoys[envoy].fd = -1;
	for (int i = 0; i < pump->kept_count; i++)
		if (pump->kept[i].node && pump->kept[i].node->envoy == envoy)
			unkeep(&pump->kept[i]);
}

/* How many answers the envoy owes to its other users: while it owes any, they take what it says. */
void ix_pump_envoy_owes(struct ix_pump *pump, int envoy, int answers)
{
	pump->envoys[envoy].waiting = answers;
}

static struct node **find(struct ix_pump *pump, uint64_t id)
{
	struct node **at = &pump->nodes[id % BUCKETS];
	while (*at && (*at)->id != id)
		at = &(*at)->next;
	return at;
}

void ix_pump_forget(struct ix_pump *pump, uint64_t id)
{
	struct node **at = find(pump, id), *node = *at;
	if (node) {
		if (node->kept >= 0)
			unkeep(&pump->kept[node->kept]);
		*at = node->next;
		free(node->said);
		free(node);
	}
}

/* A node that everybody may read; `ns`: as in struct ix_home, or -1. What is known of that number is replaced. */
int ix_pump_learn(struct ix_pump *pump, uint64_t id, int envoy, int base, int flags, int ns, const char *path,
		  size_t len)
{
	struct node *node;
	if (len > PATHS_MAX || envoy < 0 || envoy >= pump->envoy_count || ns < -1 || ns > 3)
		return -EINVAL;
	ix_pump_forget(pump, id);
	node = malloc(sizeof(*node) + len);
	if (!node)
		return -ENOMEM;
	*node = (struct node){.next = pump->nodes[id % BUCKETS], .id = id, .envoy = envoy, .kept = -1,
			      .base = (uint8_t)base, .flags = (uint8_t)flags, .ns = (int8_t)ns,
			      .path_len = (uint16_t)len};
	memcpy(node->path, path, len);
	pump->nodes[id % BUCKETS] = node;
	return 0;
}

/* What a node that is no real one says from now on. -ENOENT: not learned, -ENOMEM. */
int ix_pump_say(struct ix_pump *pump, uint64_t id, const char *content, size_t len)
{
	struct node *node = *find(pump, id);
	char *copy;
	if (!node)
		return -ENOENT;
	copy = malloc(len + 1);
	if (!copy)
		return -ENOMEM;
	memcpy(copy, content, len);
	free(node->said);
	node->said = copy;
	node->said_len = (uint32_t)len;
	return 0;
}

void ix_pump_free(struct ix_pump *pump)
{
	for (int i = 0; i < BUCKETS; i++)
		while (pump->nodes[i])
			ix_pump_forget(pump, pump->nodes[i]->id);
	ix_pages_free(pump->pages);
	free(pump->kept);
	free(pump->envoys);
	free(pump);
}

/* Whoever asked may be gone: ENOENT then, which is nobody's trouble. */
static void answer(const struct ix_pump *pump, uint64_t unique, int error, const void *data, size_t len)
{
	struct fuse_out_header head = {.len = (uint32_t)(sizeof(head) + len), .error = -error, .unique = unique};
	struct iovec parts[] = {{&head, sizeof(head)}, {(void *)(uintptr_t)data, len}};
	ssize_t n;
	do
		n = writev(pump->device, parts, len ? 2 : 1);
	while (n < 0 && errno == EINTR);
}

/* Whether the caller, who waits for us, is in the container's own namespace where the node is one of such. */
static bool is_at_home(const struct ix_pump *pump, const struct node *node, uint32_t pid)
{
	static const char *const names[] = {"net", "ipc", "uts", "user"};
	struct stat st;
	char path[32];
	uint64_t home = node->ns < 0 ? 0 : pump->envoys[node->envoy].home.ns[node->ns];

	if (!home)
		return true;
	snprintf(path, sizeof(path), "%u/ns/%s", pid, names[node->ns]);
	return fstatat(pump->proc, path, &st, 0) < 0 || st.st_ino == home;     /* killed meanwhile: nobody hears it */
}

static bool serve_open(struct ix_pump *pump, const struct fuse_in_header *head, const struct fuse_open_in *in,
		       const struct node *node)
{
	bool directory = head->opcode == FUSE_OPENDIR;
	struct fuse_open_out out = {.fh = pump->handle, .open_flags = directory ? 0 : FOPEN_DIRECT_IO | NOFLUSH};
	if (directory != !!(node->flags & IX_NODE_DIRECTORY) || (in->flags & (O_ACCMODE | O_TRUNC)) != O_RDONLY ||
	    !is_at_home(pump, node, head->pid))
		return false;
	pump->handle++;
	answer(pump, head->unique, 0, &out, sizeof(out));
	return true;
}

static bool serve_list(struct ix_pump *pump, const struct fuse_in_header *head, const struct fuse_read_in *in)
{
	size_t len;
	const char *data = in->fh & FOREIGN ? NULL : ix_pages_give(pump->pages, head->nodeid, in->offset, in->size,
								   ix_pump_now_ns(), &len);
	if (data)
		answer(pump, head->unique, 0, data, len);
	return data;
}

/* As recv(2), with the one descriptor that came along, or -1. */
static ssize_t receive(int sock, void *buffer, size_t size, int *passed)
{
	union { struct cmsghdr align; char room[CMSG_SPACE(sizeof(int))]; } control;
	struct iovec data = {buffer, size};
	struct msghdr message = {.msg_iov = &data, .msg_iovlen = 1, .msg_control = &control,
				 .msg_controllen = sizeof(control)};
	ssize_t n = recvmsg(sock, &message, MSG_TRUNC | MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	struct cmsghdr *head = n >= 0 ? CMSG_FIRSTHDR(&message) : NULL;
	*passed = -1;
	if (head && head->cmsg_level == SOL_SOCKET && head->cmsg_type == SCM_RIGHTS &&
	    head->cmsg_len == CMSG_LEN(sizeof(int)))
		memcpy(passed, CMSG_DATA(head), sizeof(int));
	return n;
}

/* The envoy's answer to request `seq`: bytes in pump->in, -ETIME if it is not there in time, -EIO if it is none.
 * *passed: the descriptor beside it, or -1. */
static ssize_t envoys_answer(struct ix_pump *pump, int fd, uint32_t seq, int *passed)
{
	for (;;) {
		ix_close_fd(passed);
		*passed = -1;
		struct pollfd p = {.fd = fd, .events = POLLIN};
		struct timespec patience = {.tv_nsec = PATIENCE_US * 1000};
		int ready = ppoll(&p, 1, &patience, NULL);
		if (ready < 0 && errno == EINTR)
			continue;
		if (ready == 0)
			return -ETIME;
		ssize_t n = ready < 0 ? -1 : receive(fd, &pump->in, sizeof(pump->in), passed);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < (ssize_t)sizeof(pump->in.head) || n > (ssize_t)sizeof(pump->in) || pump->in.head.error < 0 ||
		    pump->in.head.error > 999)
			return -EIO;
		if (pump->in.head.seq == seq)    /* else it is for a predecessor */
			return n - (ssize_t)sizeof(pump->in.head);
	}
}

/*
 * Whether an envoy's descriptor is what it should be. Envoys have the container's rights, we have the host's, and some
 * nodes of procfs tell by who reads: only this very sysctl will do. The mount is the bare one, which nobody but us has
 * in reach, so that its path cannot be made up.
 */
static bool is_the_node(const struct ix_pump *pump, const struct node *node, int fd)
{
	struct ix_stat st;
	char link[32], path[PATHS_MAX + 1];
	uint64_t mount = pump->envoys[node->envoy].home.proc_mount;

	if (!mount || ix_statx(fd, "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, &st) < 0 || !st.unique ||
	    st.mnt_id != mount || !S_ISREG(st.mode))
		return false;
	snprintf(link, sizeof(link), "self/fd/%d", fd);
	ssize_t n = readlinkat(pump->proc, link, path, sizeof(path));
	return n > node->path_len && path[n - node->path_len - 1] == '/' &&
	       !memcmp(path + n - node->path_len, node->path, node->path_len);
}

/* Takes the descriptor over, and lets another go where there are too many. */
static void keep(struct ix_pump *pump, struct node *node, int *fd)
{
	if (!pump->kept_count || node->kept >= 0 || !is_the_node(pump, node, *fd))
		return;
	struct kept *place = &pump->kept[pump->hand];
	unkeep(place);
	*place = (struct kept){.node = node, .fd = ix_take_fd(fd)};
	node->kept = pump->hand;
	pump->hand = (pump->hand + 1) % pump->kept_count;
}

/* A read that was not filled has come to the end: the one after it need not be made. */
static void note_end(struct ix_pump *pump, const struct fuse_read_in *in, size_t len)
{
	if (len && len < in->size) {
		pump->ends[in->fh % ENDS].handle = in->fh;
		pump->ends[in->fh % ENDS].end = in->offset + len;
	}
}

/* Whether that is the one after it. */
static bool is_at_end(struct ix_pump *pump, const struct fuse_read_in *in)
{
	if (pump->ends[in->fh % ENDS].handle != in->fh)
		return false;
	pump->ends[in->fh % ENDS].handle = 0;
	return pump->ends[in->fh % ENDS].end == in->offset;
}

/* By the descriptor that we have: false if that is no good any more, as when the device has gone. */
static bool serve_kept(struct ix_pump *pump, const struct fuse_in_header *head, const struct fuse_read_in *in,
		       const struct node *node)
{
	ssize_t n;
	do
		n = pread(pump->kept[node->kept].fd, pump->in.data, in->size < DATA_MAX ? in->size : DATA_MAX,
			  (off_t)in->offset);
	while (n < 0 && errno == EINTR);
	if (n < 0) {
		unkeep(&pump->kept[node->kept]);
		return false;
	}
	note_end(pump, in, (size_t)n);
	answer(pump, head->unique, 0, pump->in.data, (size_t)n);
	return true;
}

static void serve_said(const struct ix_pump *pump, const struct fuse_in_header *head, const struct fuse_read_in *in,
		       const struct node *node)
{
	/* Numbers come whole, at position 0 (kernel/sysctl.c). */
	uint64_t end = in->offset && !(node->flags & IX_NODE_TEXT) ? 0 : node->said_len;
	uint64_t left = in->offset < end ? end - in->offset : 0;
	answer(pump, head->unique, 0, node->said + in->offset * !!left, left < in->size ? left : in->size);
}

/* 1: answered; 0: not ours; a number with OUR_SEQ: the envoy has been asked under it. */
static uint32_t serve_read(struct ix_pump *pump, const struct fuse_in_header *head, const struct fuse_read_in *in,
			   struct node *node)
{
	struct envoy *envoy = &pump->envoys[node->envoy];
	bool keeps = node->flags & IX_NODE_KEEP && envoy->home.proc_mount;
	cleanup_close int passed = -1;

	if (in->fh & FOREIGN || in->offset > INT64_MAX)
		return 0;
	if (node->said) {
		serve_said(pump, head, in, node);
		return 1;
	}
	if (!(node->flags & IX_NODE_READ))
		return 0;
	if (is_at_end(pump, in)) {
		answer(pump, head->unique, 0, NULL, 0);
		return 1;
	}
	if (node->kept >= 0 && serve_kept(pump, head, in, node))
		return 1;
	if (envoy->waiting || ix_pump_now_ns() < envoy->long_way_until)
		return 0;
	pump->seq = (pump->seq + 1) | OUR_SEQ;
	pump->out.head = (struct request){.seq = pump->seq, .op = OP_READ, .base = node->base, .path_len = node->path_len,
					  .size = in->size < DATA_MAX ? in->size : DATA_MAX, .offset = in->offset,
					  .flags = keeps ? KEEP : 0};
	memcpy(pump->out.path, node->path, node->path_len);
	if (send(envoy->fd, &pump->out, sizeof(pump->out.head) + node->path_len, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		return 0;
	ssize_t n = envoys_answer(pump, envoy->fd, pump->seq, &passed);
	if (n == -ETIME) {
		envoy->long_way_until = ix_pump_now_ns() + SULK_NS;
		return pump->seq;
	}
	if (n < 0) {
		shutdown(envoy->fd, SHUT_RDWR);  /* whoever owns the socket sees its end */
		answer(pump, head->unique, EIO, NULL, 0);
		return 1;
	}
	if (n > in->size)
		n = in->size;
	if (!pump->in.head.error)
		note_end(pump, in, (size_t)n);
	answer(pump, head->unique, pump->in.head.error, pump->in.data, pump->in.head.error ? 0 : (size_t)n);
	if (keeps && passed >= 0)
		keep(pump, node, &passed);
	return 1;
}

/* As serve_read. What a predecessor had read and not answered is not ours. */
static uint32_t serve(struct ix_pump *pump, const struct fuse_in_header *head, size_t len)
{
	const void *body = head + 1;
	struct node *node;

	if (len < sizeof(*head) + sizeof(uint64_t) || head->unique & RESENT)
		return 0;
	switch (head->opcode) {
	case FUSE_RELEASE:
	case FUSE_RELEASEDIR:
		if (!(((const struct fuse_release_in *)body)->fh & OURS))
			return 0;
		answer(pump, head->unique, 0, NULL, 0);
		return 1;
	case FUSE_READDIRPLUS:
		return len >= sizeof(*head) + sizeof(struct fuse_read_in) && serve_list(pump, head, body);
	case FUSE_OPEN:
	case FUSE_OPENDIR:
	case FUSE_READ:
		node = *find(pump, head->nodeid);
		if (!node || pump->envoys[node->envoy].fd < 0)
			return 0;
		if (head->opcode != FUSE_READ)
			return serve_open(pump, head, body, node);
		return len < sizeof(*head) + sizeof(struct fuse_read_in) ? 0 : serve_read(pump, head, body, node);
	default:
		return 0;
	}
}

static bool others_wait(int others)
{
	struct pollfd p = {.fd = others, .events = POLLIN};
	return poll(&p, 1, 0) > 0;
}

/*
 * read(2). To sleep and to be woken, mostly on another processor, costs more than what is asked for next, which nearly
 * always comes at once: so after a request that was served it is looked for again and again.
 */
static ssize_t take(struct ix_pump *pump, void *buffer, size_t size, bool spin)
{
	int64_t now = spin ? ix_pump_now_ns() : 0, until = now < pump->shy_until ? 0 : now + SPIN_NS;
	ssize_t n;
	do
		n = read(pump->device, buffer, size);
	while (n < 0 && errno == EAGAIN && spin && (now = ix_pump_now_ns()) < until);
	pump->in_vain = spin && until && n < 0 ? now : 0;
	pump->harm -= spin && until && n >= 0 && pump->harm > 0;
	return n;
}

/* Sleeps until there is a request, others want a turn, or the time has come (CLOCK_MONOTONIC ns; < 0: never). Whether it
 * is the first. Who asks as soon as we sleep has waited for our very processor while we span: then we do not, for a while,
 * as on a busy machine that would take longer than to be woken. */
static bool await(struct ix_pump *pump, int others, int64_t until)
{
	struct pollfd p[] = {{.fd = pump->device, .events = POLLIN}, {.fd = others, .events = POLLIN}};
	int64_t left = until < 0 ? 0 : until - ix_pump_now_ns();
	struct timespec patience = {.tv_sec = left / 1000000000, .tv_nsec = left % 1000000000};
	if (left < 0)
		return false;
	bool asked = ppoll(p, 2, until < 0 ? NULL : &patience, NULL) > 0 && p[0].revents;
	int64_t now = pump->in_vain ? ix_pump_now_ns() : 0;
	if (asked && now && now - pump->in_vain < SPIN_NS && ++pump->harm >= HARM_MAX) {
		pump->harm /= 2;
		pump->shy_until = now + SHY_NS;
	}
	return asked;
}

/* The next request that is not answered here: its length, or -errno (-EAGAIN: none until then, or others should have
 * their turn). `others` becomes readable when something else needs the caller, an epoll instance; `wait_ns`: how long to
 * wait for one, < 0: for ever. *asked: 0, or the number under which the envoy of that READ has been asked and still owes
 * the answer. */
int ix_pump_receive(struct ix_pump *pump, int others, int64_t wait_ns, void *buffer, size_t size, uint32_t *asked)
{
	int64_t until = wait_ns > 0 ? ix_pump_now_ns() + wait_ns : wait_ns;
	bool served = false;
	for (int i = 0; i < BATCH * BATCHES; i++) {
		if (i % BATCH == BATCH - 1 && others_wait(others))
			break;
		ssize_t n = take(pump, buffer, size, served);
		served = false;
		if (n < 0 && (errno == EINTR || errno == ENOENT))
			continue;                /* interrupted before we saw it */
		if (n < 0 && errno != EAGAIN)
			return -errno;
		if (n < 0 && !(wait_ns && await(pump, others, until)))
			break;
		if (n < 0)
			continue;
		uint32_t done = serve(pump, buffer, (size_t)n);
		served = done == 1;
		if (served)
			continue;
		*asked = done;
		return (int)n;
	}
	return -EAGAIN;
}
