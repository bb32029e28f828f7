/*
 * The one header that the compiler and cffi both read: no preprocessor line may stand here but what cffi understands.
 * Every function returns >= 0 on success and -errno on failure, unless it says otherwise. Descriptors are made with
 * CLOEXEC. Nothing here keeps state: the guard's state lives in guard.c alone.
 */

/* ---- syscalls.c: one wrapper a system call, named after it ------------------------------------------------- */

struct ix_stat {
	uint64_t mnt_id;       /* unique mount ID (STATX_MNT_ID_UNIQUE, 6.8+), else the reusable one */
	uint64_t ino;
	uint32_t dev_major, dev_minor;
	uint32_t mode;
	uint32_t mount_root;   /* 1: the root of a mount */
	uint32_t unique;       /* 1: mnt_id is the unique one */
	uint32_t uid, gid;
};

int ix_open_tree(int dirfd, const char *path, unsigned int flags);
int ix_move_mount(int from_fd, const char *from, int to_fd, const char *to, unsigned int flags);
int ix_fspick(int dirfd, const char *path, unsigned int flags);
int ix_fsopen(const char *fstype, unsigned int flags);
int ix_fsconfig(int fd, unsigned int cmd, const char *key, const char *value, int aux);
int ix_fsmount(int fd, unsigned int flags, unsigned int attrs);
int ix_mount_setattr(int dirfd, const char *path, unsigned int flags, uint64_t set, uint64_t clear,
		     uint64_t propagation, int userns_fd);
int ix_mount(const char *source, const char *target, const char *fstype, unsigned long flags, const char *data);
int ix_umount2(const char *target, int flags);
int ix_pivot_root(const char *new_root, const char *put_old);
int ix_openat2(int dirfd, const char *path, uint64_t flags, uint64_t mode, uint64_t resolve);
int ix_statx(int dirfd, const char *path, int flags, struct ix_stat *out);
int ix_fs_magic(int fd, uint64_t *magic);
int ix_statmount(uint64_t mnt_id, uint64_t ns_id, uint64_t mask, void *buf, size_t size);

/* What statmount(2) says of a mount; the strings lie in the buffer, and are NULL where the kernel gave none. */
struct ix_mount_view {
	uint64_t mnt_id, parent_id, magic, attributes, propagation, peer_group, master;
	uint32_t dev_major, dev_minor;
	const char *root, *point, *fstype;
};
void ix_view_of(const void *buf, struct ix_mount_view *out);
int ix_look_at_mount(uint64_t mnt_id, uint64_t ns_id, void *buf, size_t size, struct ix_mount_view *out);
int64_t ix_listmount(uint64_t mnt_id, uint64_t ns_id, uint64_t last, uint64_t *ids, size_t count);

/* ---- pick.c: of some mounts those that are worth a look, kept at the beginning of `ids`; how many --------------- */
enum ix_picked {
	IX_PICK_BASES = 1,     /* of procfs or sysfs */
	IX_PICK_BETWEEN = 2,   /* slaves that share */
	IX_PICK_POINTS = 3,    /* mounted at one of `points`, which are sorted */
};
size_t ix_pick(uint64_t ns_id, uint64_t *ids, size_t count, int what, const char *const *points, size_t point_count);

int ix_setns(int fd, int nstype);
int ix_unshare(int flags);
/* Before Linux 6.11 namespaces have no ID: then it is the inode number with bit 62, which no ID has. */
int ix_mntns_id(int fd, uint64_t *id);
/* 1 if a descriptor is one of a namespace that a user namespace or one below it owns, else 0. */
int ix_belongs_to(int fd, int userns_fd);
int ix_pidfd_getfd(int pidfd, int fd);
int ix_seccomp_listen(const void *program, unsigned short instructions, unsigned int flags);
int ix_seccomp_notif_sizes(void);
int ix_is_listener(int fd);
int ix_close_range(unsigned int first, unsigned int last);
int ix_chroot_fd(int fd);
/* 1: two descriptors of the caller's are of one open file. */
int ix_same_file(int a, int b);

/* ---- setattr.c: mount_setattr(2) with AT_EMPTY_PATH, and what does the same before Linux 5.12 --------------- */

/* A detached tree may then be another one with other IDs, behind the same descriptor. */
int ix_set_attributes(int tree, int recursive, uint64_t set, uint64_t clear, uint64_t propagation);
/* Only of what stands in this thread's mount namespace, else -EINVAL; `proc`: a procfs. */
int ix_set_attributes_here(int proc, int tree, int recursive, uint64_t set, uint64_t clear, uint64_t propagation);

/* ---- mountinfo.c: what these two would say, from an open mountinfo; IDs are the reusable ones --------------- */
int ix_mountinfo_look(int mountinfo, uint64_t mnt_id, uint64_t mask, void *buf, size_t size);
/* In the order of the file; -EAGAIN where `last` is not in it any more, -E2BIG where there is too much of it. */
int64_t ix_mountinfo_list(int mountinfo, uint64_t mnt_id, uint64_t last, uint64_t *ids, size_t count);

/* ---- workshop.c: what must happen in one piece, so that no thread is ever left in a foreign namespace ------ */

/* A detached mount of a fresh procfs or sysfs for the namespaces given (-1: the caller's own). key_values is a
 * NULL-terminated array key, value, key, value … (value NULL for a flag). *step says where it failed. */
int ix_fresh_mount(const char *fstype, int pidns_fd, int netns_fd, const char *const *key_values,
		   unsigned int attrs, int *step);

/* A context of procfs or sysfs for another's namespaces, as fsopen(2) would give it to a process in there. */
int ix_fsopen_for(const char *fstype, int pidns_fd, int netns_fd, int *step);

/* What is to stand on a path of a tree: a clone of `directory` or of `file`, whichever the path is; where that is NULL,
 * of the path itself. */
struct ix_cover {
	const char *path, *directory, *file;
	uint64_t attributes;   /* MOUNT_ATTR_*, to be set */
};

/* Puts covers, one after the other, on the tree that stands at `place`; paths that it does not have are passed over.
 * *step is the number of the cover that failed. */
int ix_put_covers(const char *place, const struct ix_cover *covers, int count, int *step);

/* Moves what stands at `place` to the new directory `slot` and visits `welder`, where it arrives by propagation, for a
 * clone of all of it: welded. *step: 0 mkdir, 1 move_mount, 2 setns, 3 open_tree. */
int ix_weld(const char *place, const char *slot, int welder_fd, int home_fd, int *step);

/* Another welded clone of what was moved to `slot` before. The same steps, from 2 on. */
int ix_weld_again(const char *slot, int welder_fd, int home_fd, int *step);

/* Starts a thread that unmounts, lazily, the path in each message on `sock` (SOCK_SEQPACKET), and removes its directory;
 * where a detached tree comes with a message, it closes that.
 * At end of file it closes `sock`, which it has from then on that this returns 0. It has a root and working directory of its own, so that the calling thread may go on
 * visiting mount namespaces. */
int ix_start_janitor(int sock);

/* The standing welder: the calling process leaves for a user and mount namespace of its own, in which the shared
 * mounts of the workshop are received by propagation, and answers each byte on `sock` with a descriptor of that mount
 * namespace. Returns only on end of file or failure. */
int ix_welder(int sock);

/* ---- the link between a guard and the daemon: fixed-size records over SOCK_SEQPACKET, descriptors beside them -- */

enum ix_message {
	IX_MSG_LISTENER = 1,   /* daemon: serve this listener (one descriptor); value = its index */
	IX_MSG_DROP = 2,       /* daemon: the listener of index `value` has no caller left */
	IX_MSG_ANSWER = 3,     /* daemon: struct ix_answer */
	IX_MSG_FLUSH = 4,      /* daemon: policy changed, forget cached verdicts */
	IX_MSG_HELLO = 5,      /* daemon: a successor is here, ask again what is open */
	IX_MSG_FACTS = 6,      /* daemon: struct ix_facts */
	IX_MSG_FOLLOW = 7,     /* daemon: note calls in the journal (value 1), or stop that (0) */
	IX_MSG_AHEAD = 8,      /* daemon: struct ix_ahead (one descriptor) */
	IX_MSG_ASK = 64,       /* guard: struct ix_ask */
	IX_MSG_READY = 65,     /* guard: the listener of index `value` is being served */
	IX_MSG_REFUSED = 66,   /* guard: there is no room for it; nobody will serve it */
	IX_MSG_STORM = 67,     /* guard: struct ix_storm */
	IX_MSG_TAKEN = 68      /* guard: what was made ahead under the number `value` has been used */
};

enum ix_op {
	IX_OP_UMOUNT = 1,      /* descriptors: mount namespace, target */
	IX_OP_DETACH = 2,      /* the same with MNT_DETACH */
	IX_OP_MOVE = 3,        /* descriptors: mount namespace, source */
	IX_OP_REMOUNT = 4,     /* descriptors: mount namespace, target */
	IX_OP_FSMOUNT = 6,     /* descriptors: mount namespace, filesystem context */
	IX_OP_FSOPEN = 8,      /* descriptors: PID namespace, network namespace */
	IX_OP_OPEN_TREE = 7,   /* descriptors: mount namespace, what is to be cloned */
	IX_OP_BENEATH = 9,     /* descriptors: mount namespace, what something is to be put beneath */
	IX_OP_NEW = 5          /* descriptors: mount namespace, PID namespace, network namespace */
};

/* What a trapped call is to those who count. */
enum ix_kind {
	IX_KIND_OTHER = 0,
	IX_KIND_MOUNT = 1,     /* a new filesystem by mount(2) */
	IX_KIND_BIND = 2,
	IX_KIND_REMOUNT = 3,
	IX_KIND_PROPAGATION = 4,
	IX_KIND_MOVE = 5,
	IX_KIND_UMOUNT = 6,
	IX_KIND_DETACH = 7,    /* umount2 with MNT_DETACH */
	IX_KIND_FSOPEN = 8,
	IX_KIND_FSMOUNT = 9,
	IX_KIND_OPEN_TREE = 10,
	IX_KIND_MOVE_MOUNT = 11,
	IX_KIND_OPENAT2 = 12
};

enum ix_act {
	IX_ACT_CONTINUE = 0,   /* the kernel runs the call */
	IX_ACT_ERROR = 1,      /* the call fails with `error` */
	IX_ACT_DETACH = 2,     /* unmount the target lazily, with all that is welded to it */
	IX_ACT_SWAP = 3,       /* put the composite (one descriptor) in the place of the base `base_id` */
	IX_ACT_ATTACH = 4,     /* attach the composite (one descriptor) at the target */
	IX_ACT_GIVE = 6,       /* the composite (one descriptor) is what the call returns */
	IX_ACT_FLAGS = 5       /* carry the read-only flag over to the welded mounts `ids`, then the kernel runs the call */
};

enum { IX_MAX_IDS = 64, IX_SOURCE_MAX = 64, IX_SLOTS = 256, IX_ORPHANS = 64, IX_UNITS = 64, IX_BUCKETS = 168,
	IX_KINDS = 13, IX_SEEN = 64 };

/* A call that has been repeated without effect, more than a hundred times a second; at most one message in ten. */
struct ix_storm {
	uint32_t type;
	uint32_t op;
	uint64_t mnt_id;
	uint64_t calls;        /* since the last message about it */
	int32_t tid;           /* of the latest caller */
	uint32_t spare;
};

struct ix_note {
	uint32_t type;
	uint32_t value;
};

struct ix_ask {
	uint32_t type;
	uint32_t op;
	uint64_t seq;
	uint64_t mnt_id;       /* of target or source */
	uint64_t flags;        /* of umount2 or mount, as the caller gave them */
	int32_t tid;
	uint32_t kind;         /* IX_OP_NEW: 1 procfs, 2 sysfs */
	int32_t hidepid;       /* -1: not given */
	uint32_t subset_pid;
	uint32_t gid;          /* in the caller's user namespace; UINT32_MAX: not given */
	uint32_t sb_flags;     /* IX_OP_NEW: flags of mount(2) that the superblock gets, by flag or by option */
	char source[64];       /* what the caller called the source; printable ASCII or empty */
};

struct ix_answer {
	uint32_t type;
	uint32_t act;
	uint64_t seq;
	int32_t error;         /* IX_ACT_ERROR: a positive errno */
	uint32_t cache;        /* 1: holds for this mount ID and operation until IX_MSG_FLUSH */
	uint64_t base_id;      /* IX_ACT_SWAP: the base to replace; IX_ACT_DETACH: the mount to remove */
	uint64_t there_id;     /* unique mount ID of the composite handed over */
	uint32_t count;        /* of ids */
	uint32_t spare;
	uint64_t ids[64];      /* welded submounts: not to be carried over (SWAP), to be changed (FLAGS) */
};

/*
 * What the guard needs to know a copied base from an original one by itself. Paths are hashed (FNV-1a, 64 bits): where
 * two had the same hash, the guard would ask without need, or take a mount of the container's own away with a copy.
 */
enum { IX_FACT_BASES = 16, IX_FACT_COVERS = 64 };

struct ix_original {
	uint64_t mnt_id;
	uint64_t point;        /* hash of where it is mounted, from the container's root */
	uint32_t dev_major, dev_minor;
};

struct ix_facts {
	uint32_t type;
	uint32_t bases;        /* how many of `base` */
	uint32_t covers[2];    /* how many of `cover` */
	uint32_t roots;        /* how many mounts are stacked at the container's root */
	uint64_t namespace_id; /* the container's first mount namespace */
	struct ix_original base[16];
	uint64_t cover[2][64]; /* hashes of the managed paths of procfs and of sysfs, without slashes at the ends */
};

/*
 * A composite made ahead of need: the answer to a question that will be asked, given before. Paths are hashed as above.
 */
enum { IX_AHEAD_SHIELDS = 8, IX_AHEAD_ABSENT = 512 };

struct ix_ahead {
	uint32_t type;
	uint32_t act;          /* IX_ACT_ATTACH or IX_ACT_SWAP */
	uint32_t number;       /* for IX_MSG_TAKEN */
	uint32_t shields;      /* SWAP: how many of `shield` */
	uint64_t there_id;
	struct ix_ask ask;     /* ATTACH: what is to be asked; seq, mnt_id and tid are zero */
	uint64_t ns_ino;       /* ATTACH: the PID namespace of procfs, the network namespace of sysfs */
	uint32_t dev_major, dev_minor;  /* SWAP: of the base, which is all of its filesystem */
	uint64_t attributes;   /* SWAP: the base's */
	uint64_t shield[8];    /* SWAP: where shields will stand, the new one among them */
	char absent[512];      /* paths that it does not cover, as they are not there: each with its NUL, then another */
};

/* ---- the journal: a memfd shared by daemon and guard, and by a guard's successor ---------------------------- */

enum ix_phase {
	IX_PHASE_IDLE = 0,
	IX_PHASE_RECEIVED = 1, /* nothing done yet: whoever finds this starts over */
	IX_PHASE_ACTING = 2,   /* gone_id and there_id tell whether it took place */
	IX_PHASE_ACTED = 3     /* `result` is the truth and only needs saying */
};

struct ix_slot {
	uint8_t notif[128];    /* struct seccomp_notif: the kernel writes it, so receipt and record are one step */
	uint32_t listener;
	uint32_t phase;
	int32_t result;
	uint32_t act;
	uint64_t gone_id;
	uint64_t there_id;
	uint64_t after_id;     /* the mount the target path resolves to once the effect has taken place */
	uint64_t since_ns;     /* CLOCK_MONOTONIC; 0 when idle */
	uint64_t spare[10];
};

/* An effect whose caller was interrupted before it could be told: the restarted call gets the result. */
/* Where a thread stands, on which depends what its arguments mean. IDs of mounts are unique, so this tells its mount
 * namespace as well. All zero: not known. */
struct ix_context {
	uint64_t root_mnt_id, root_ino;
	uint64_t cwd_mnt_id, cwd_ino;
	uint64_t netns_ino;
};

struct ix_orphan {
	int32_t tid;           /* 0: free */
	int32_t nr;
	uint64_t args[6];
	uint64_t instruction_pointer;
	uint64_t after_id;     /* the mount that the call's path leads to now; 0: the result is a descriptor */
	struct ix_context context;  /* where the caller stood */
	int32_t result;
	uint32_t order;        /* the oldest goes where there is no room */
};

/* Latencies from receipt to reply in nanoseconds: eight buckets an octave from 256 ns. */
struct ix_histogram {
	uint64_t sum_ns;       /* 0: nothing was counted */
	uint64_t buckets[168];
};

struct ix_unit {
	char name[56];
	uint64_t umounts;
};

/*
 * Calls of one thread that are alike, while somebody follows. `done` and `begun` are equal but while the row is
 * written; a row is another one when they have changed. The reader goes from the first to the last.
 */
struct ix_seen {
	uint64_t done;
	uint64_t count;
	uint64_t last_ns;      /* CLOCK_MONOTONIC */
	int32_t tid;
	uint32_t kind;
	uint32_t verdict;      /* 0 continued, 1 denied, 2 handled */
	int32_t error;         /* a positive errno, or 0 */
	char path[256];        /* as the caller gave it, cut off at the end */
	char unit[56];
	char comm[16];
	char reason[64];
	uint64_t begun;
};

/* What is added goes to the end: guards outlive the daemon that is upgraded. */
struct ix_journal {
	uint64_t magic;
	uint64_t asked;
	uint64_t cached;
	uint64_t overloaded;   /* calls let through unexamined because every receiver was stuck */
	uint64_t lost;         /* replies whose caller was gone */
	uint64_t orphaned;
	uint64_t former[507];
	struct ix_unit units[64];
	struct ix_orphan orphans[64];
	struct ix_slot slots[256];
	uint64_t missed;       /* verdicts that the cache did not have */
	uint64_t waiting;      /* questions that the daemon has not answered yet */
	uint64_t slots_used;   /* no slot from here on was ever taken */
	struct ix_histogram latency[13][3];  /* by enum ix_kind; continued, denied, handled */
	uint64_t versions;     /* of rows of `seen` */
	uint64_t noted;        /* calls that were counted there */
	struct ix_seen seen[64];
};

/* ---- spawn.c: what a freshly forked process becomes -------------------------------------------------------- */

struct ix_guard_config {
	uint32_t view_major, view_minor;       /* the view's device */
	uint32_t shield_major, shield_minor;   /* the tmpfs of shields and masked directories */
	uint32_t mode;                         /* 0 real, 1 CONTINUE to everything, 2 at random */
	uint32_t account_units;                /* count calls by the caller's systemd unit */
	uint32_t question_timeout_ms;
	uint32_t protect_immutable;            /* the daemon decides about lazy unmounts */
};

/* Enters a mount namespace of its own, with an empty tmpfs in it that has that directory, if any; -1, errno. */
int ix_leave_mounts(const char *directory);
/* Both run in a child just forked by the spawner and never return: they keep only the descriptors named. */
void ix_become_guard(int userns_fd, int proc_fd, int link_fd, int journal_fd, const struct ix_guard_config *config);
/* ns_fds: user, network, IPC and UTS namespace. pidfd: of a process with whose end the envoy ends, whoever else is
 * left; -1: none. */
void ix_become_envoy(const int *ns_fds, int ns_count, int sock, int proc_fd, int sys_fd, int pidfd);

/* ---- nursery.c --------------------------------------------------------------------------------------------- */

enum { IX_BIRTH_GUARD = 1, IX_BIRTH_ENVOY = 2, IX_BIRTH_CLONER = 3, IX_PARTS_MAX = 16 };

/* An order to fork. Descriptors beside it: of a guard user namespace, link, journal; of an envoy socket, bare procfs and
 * sysfs, pidfd, user namespace, further namespaces; of a cloner a socket, on which are paths, each with its NUL, in one
 * message, and to which it sends an int for each, 0 or a positive errno, and clones of the mounts there. The answer is a PID with its pidfd, or a negative errno. */
struct ix_birth {
	uint32_t kind;
	uint32_t spare;
	struct ix_guard_config config;
};

/* Serves orders on `sock` until its other end is closed; children get `proc`, the host's. */
int ix_nursery(int sock, int proc);

/* ---- resolve.c, for tests: a path as thread `tid` would resolve it; returns an O_PATH descriptor ------------ */
int ix_resolve(int proc_fd, int tid, int dirfd, const char *path, int follow);

/* ---- envoy.c ----------------------------------------------------------------------------------------------- */
int ix_envoy(int sock, int proc_fd, int sys_fd, int pidfd, const int *own);

/* ---- pump.c ------------------------------------------------------------------------------------------------ */
enum {
	IX_NODE_READ = 1,      /* a real node: READ goes there */
	IX_NODE_KEEP = 2,      /* an open descriptor of it says the same to whoever reads it */
	IX_NODE_DIRECTORY = 4,
	IX_NODE_TEXT = 8,      /* what is said of it can be read from any position */
};
/* What an envoy is the end of: its container's bare procfs, by unique mount ID, and the inode numbers of its network,
 * IPC, UTS and user namespaces; 0 where not known. */
struct ix_home {
	uint64_t proc_mount;
	uint64_t ns[4];
};
struct ix_pump;
struct ix_pump *ix_pump_new(int device, int proc_fd, uint64_t handle);
void ix_pump_free(struct ix_pump *pump);
int ix_pump_envoy(struct ix_pump *pump, int fd, const struct ix_home *home);
void ix_pump_envoy_gone(struct ix_pump *pump, int envoy);
void ix_pump_envoy_owes(struct ix_pump *pump, int envoy, int answers);
int ix_pump_learn(struct ix_pump *pump, uint64_t id, int envoy, int base, int flags, int ns, const char *path,
		  size_t len);
int ix_pump_say(struct ix_pump *pump, uint64_t id, const char *content, size_t len);
void ix_pump_forget(struct ix_pump *pump, uint64_t id);
int ix_pump_receive(struct ix_pump *pump, int others, int64_t wait_ns, void *buffer, size_t size, uint32_t *asked);

/* ---- pages.c: parts of listings, by slots ------------------------------------------------------------------ */
int ix_pump_page_slot(uint64_t directory, uint64_t offset);
int ix_pump_page_keep(struct ix_pump *pump, uint64_t directory, uint64_t offset, uint32_t size, int64_t life_ns,
		      const char *data, size_t len);
uint64_t ix_pump_page_given(struct ix_pump *pump, int slot);
bool ix_pump_pages_given(struct ix_pump *pump);
void ix_pump_page_drop(struct ix_pump *pump, int slot);
