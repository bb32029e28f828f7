/*
 * The pump: takes requests of the view from /dev/fuse and answers by itself those that need no thought, reads of real
 * nodes that everybody may read. All else it hands to its caller (interceptor/view/session.py) as it came.
 *
 * A read goes to the container's envoy, which nearly always answers within microseconds: the pump waits for that, but
 * not for long. What takes longer is handed over, too, with the number of the request that the envoy has got already,
 * and that envoy's reads go the long way for a while: one container cannot hold up the others.
 */
#include "compat.h"

#include <linux/fuse.h>
#include <poll.h>
#include <time.h>

enum {
	BUCKETS = 4096, ENDS = 1024, PATHS_MAX = 4095, DATA_MAX = 65536, OP_READ = 3,
	PATIENCE_US = 500,                       /* for an envoy, while everybody waits */
	SULK_NS = 10 * 1000 * 1000,              /* how long an envoy goes the long way after that */
	LINGER_US = 200,                         /* for what follows a request that was served here */
	BATCH = 64,
};
#define OURS (1ULL << 62)                        /* handles that we gave out, and numbers of our requests */
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
	uint8_t base;
	uint16_t path_len;
	char path[];
};

struct envoy {
	int fd;                                  /* -1: gone */
	int waiting;                             /* answers that it owes to others than us */
	int64_t long_way_until;                  /* CLOCK_MONOTONIC, ns */
};

struct ix_pump {
	int device;
	uint32_t seq;
	uint64_t handle;
	struct node *nodes[BUCKETS];
	struct envoy *envoys;
	int envoy_count;
	struct { uint64_t handle, end; } ends[ENDS];   /* where a handle's last read came to the end */
	struct { struct request head; char path[PATHS_MAX]; } out;
	struct { struct reply head; char data[DATA_MAX]; } in;
};

static int64_t now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* NULL without memory. `handle` is what nobody has given out before. */
struct ix_pump *ix_pump_new(int device, uint64_t handle)
{
	struct ix_pump *pump = calloc(1, sizeof(*pump));
	if (pump) {
		pump->device = device;
		pump->handle = handle | OURS;
		pump->seq = (uint32_t)handle;
	}
	return pump;
}

/* A number for an envoy's socket, or -ENOMEM. */
int ix_pump_envoy(struct ix_pump *pump, int fd)
{
	struct envoy *more = realloc(pump->envoys, sizeof(*more) * ((size_t)pump->envoy_count + 1));
	if (!more)
		return -ENOMEM;
	pump->envoys = more;
	more[pump->envoy_count] = (struct envoy){.fd = fd};
	return pump->envoy_count++;
}

void ix_pump_envoy_gone(struct ix_pump *pump, int envoy)
{
	pump->envoys[envoy].fd = -1;
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
		*at = node->next;
		free(node);
	}
}

/* A real node that everybody may read. What is known of that number already is replaced. */
int ix_pump_learn(struct ix_pump *pump, uint64_t id, int envoy, int base, const char *path, size_t len)
{
	struct node *node;
	if (len > PATHS_MAX || envoy < 0 || envoy >= pump->envoy_count)
		return -EINVAL;
	ix_pump_forget(pump, id);
	node = malloc(sizeof(*node) + len);
	if (!node)
		return -ENOMEM;
	*node = (struct node){.next = pump->nodes[id % BUCKETS], .id = id, .envoy = envoy, .base = (uint8_t)base,
			      .path_len = (uint16_t)len};
	memcpy(node->path, path, len);
	pump->nodes[id % BUCKETS] = node;
	return 0;
}

void ix_pump_free(struct ix_pump *pump)
{
	for (int i = 0; i < BUCKETS; i++)
		while (pump->nodes[i])
			ix_pump_forget(pump, pump->nodes[i]->id);
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

static bool serve_open(struct ix_pump *pump, const struct fuse_in_header *head, const struct fuse_open_in *in)
{
	struct fuse_open_out out = {.fh = pump->handle, .open_flags = FOPEN_DIRECT_IO | NOFLUSH};
	if ((in->flags & (O_ACCMODE | O_TRUNC)) != O_RDONLY)
		return false;
	pump->handle++;
	answer(pump, head->unique, 0, &out, sizeof(out));
	return true;
}

/* The envoy's answer to request `seq`: bytes in pump->in, -ETIME if it is not there in time, -EIO if it is none. */
static ssize_t envoys_answer(struct ix_pump *pump, int fd, uint32_t seq)
{
	for (;;) {
		struct pollfd p = {.fd = fd, .events = POLLIN};
		struct timespec patience = {.tv_nsec = PATIENCE_US * 1000};
		int ready = ppoll(&p, 1, &patience, NULL);
		if (ready < 0 && errno == EINTR)
			continue;
		if (ready == 0)
			return -ETIME;
		ssize_t n = ready < 0 ? -1 : recv(fd, &pump->in, sizeof(pump->in), MSG_TRUNC | MSG_DONTWAIT);
		if (n < 0 && (errno == EINTR || errno == EAGAIN))
			continue;
		if (n < (ssize_t)sizeof(pump->in.head) || n > (ssize_t)sizeof(pump->in) || pump->in.head.error < 0 ||
		    pump->in.head.error > 999)
			return -EIO;
		if (pump->in.head.seq == seq)    /* else it is for a predecessor */
			return n - (ssize_t)sizeof(pump->in.head);
	}
}

/* 1: answered; 0: not ours; a number with OUR_SEQ: the envoy has been asked under it. */
static uint32_t serve_read(struct ix_pump *pump, const struct fuse_in_header *head, const struct fuse_read_in *in,
			   const struct node *node)
{
	struct envoy *envoy = &pump->envoys[node->envoy];
	size_t slot = in->fh % ENDS;

	if (envoy->fd < 0 || envoy->waiting || in->offset > INT64_MAX || now_ns() < envoy->long_way_until)
		return 0;
	if (pump->ends[slot].handle == in->fh) {
		pump->ends[slot].handle = 0;
		if (pump->ends[slot].end == in->offset) {
			answer(pump, head->unique, 0, NULL, 0);
			return 1;
		}
	}
	pump->seq = (pump->seq + 1) | OUR_SEQ;
	pump->out.head = (struct request){.seq = pump->seq, .op = OP_READ, .base = node->base, .path_len = node->path_len,
					  .size = in->size < DATA_MAX ? in->size : DATA_MAX, .offset = in->offset};
	memcpy(pump->out.path, node->path, node->path_len);
	if (send(envoy->fd, &pump->out, sizeof(pump->out.head) + node->path_len, MSG_NOSIGNAL | MSG_DONTWAIT) < 0)
		return 0;
	ssize_t n = envoys_answer(pump, envoy->fd, pump->seq);
	if (n == -ETIME) {
		envoy->long_way_until = now_ns() + SULK_NS;
		return pump->seq;
	}
	if (n < 0) {
		shutdown(envoy->fd, SHUT_RDWR);  /* whoever owns the socket sees its end */
		answer(pump, head->unique, EIO, NULL, 0);
		return 1;
	}
	if (n > in->size)
		n = in->size;
	if (!pump->in.head.error && n > 0 && n < in->size) {
		pump->ends[slot].handle = in->fh;
		pump->ends[slot].end = in->offset + (uint64_t)n;
	}
	answer(pump, head->unique, pump->in.head.error, pump->in.data, pump->in.head.error ? 0 : (size_t)n);
	return 1;
}

/* As serve_read. What a predecessor had read and not answered is not ours. */
static uint32_t serve(struct ix_pump *pump, const struct fuse_in_header *head, size_t len)
{
	const void *body = head + 1;
	const struct node *node;

	if (len < sizeof(*head) + sizeof(uint64_t) || head->unique & RESENT)
		return 0;
	if (head->opcode == FUSE_RELEASE && ((const struct fuse_release_in *)body)->fh & OURS) {
		answer(pump, head->unique, 0, NULL, 0);
		return 1;
	}
	if (head->opcode != FUSE_OPEN && head->opcode != FUSE_READ)
		return 0;
	node = *find(pump, head->nodeid);
	if (!node || pump->envoys[node->envoy].fd < 0)
		return 0;
	if (head->opcode == FUSE_OPEN)
		return serve_open(pump, head, body);
	return len < sizeof(*head) + sizeof(struct fuse_read_in) ? 0 : serve_read(pump, head, body, node);
}

/* After an open comes a read: going through all that the caller watches in between would take as long as both. */
static bool more_soon(const struct ix_pump *pump, int others)
{
	struct pollfd p[] = {{.fd = pump->device, .events = POLLIN}, {.fd = others, .events = POLLIN}};
	struct timespec linger = {.tv_nsec = LINGER_US * 1000};
	return ppoll(p, 2, &linger, NULL) > 0 && p[0].revents;
}

/* The next request that is not answered here: its length, or -errno (-EAGAIN: none now, or others should have their
 * turn). `others` becomes readable when something else needs the caller, an epoll instance. *asked: 0, or the number
 * under which the envoy of that READ has been asked and still owes the answer. */
int ix_pump_receive(struct ix_pump *pump, int others, void *buffer, size_t size, uint32_t *asked)
{
	bool served = false;
	for (int i = 0; i < BATCH; i++) {
		ssize_t n = read(pump->device, buffer, size);
		if (n < 0 && (errno == EINTR || errno == ENOENT))
			continue;                /* interrupted before we saw it */
		if (n < 0 && errno == EAGAIN && served && more_soon(pump, others))
			continue;
		if (n < 0)
			return -errno;
		uint32_t done = serve(pump, buffer, (size_t)n);
		served = done == 1;
		if (served)
			continue;
		*asked = done;
		return (int)n;
	}
	return -EAGAIN;
}
