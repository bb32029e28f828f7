/*
 * interceptor-runc: what a manager starts four times for each container, and waits for each time. Python takes longer to
 * start than all of what is done here, so this does the plain cases and becomes the stock runtime: commands that are
 * passed through, `create` and `run` that go well, `pause` and `delete` of what was not cloned, and the hook of such
 * containers.
 * Everything else, and whatever is not as expected, is for interceptor.oci.runtime, which does all of it, says what is
 * wrong, and is the specification: tests/test_front.py holds the two against each other.
 *
 * Runs as the host's root, on what the manager says; nothing of a container's is interpreted. One thread, no state.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/mount.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/un.h>
#include <unistd.h>

#define DEFAULT_CONFIG "/etc/interceptor/config.toml"
#define DEFAULT_DIRECTORY "/run/interceptor"

enum {
	CONFIG_MAX = 1 << 16,
	MESSAGE_MAX = 1 << 20, /* as in interceptor/client.py */
	WORDS_MAX = 4096,
	TIMEOUT_SECONDS = 30,
	CREATE_SECONDS = 600, /* a clone is made file by file */
	NOTE_MAX = 1 << 16,
};

/* Options whose value is the next word, as in interceptor/oci/commandline.py. */
static const char *const global_values[] = {"--log", "--log-format", "--root", "--criu", "--rootless",
					    "--cgroup-manager", "--log-level", NULL};
static const char *const create_values[] = {"--bundle", "-b", "--console-socket", "--pid-file", "--preserve-fds",
					    "--config", "-f", NULL};
static const char *const no_values[] = {NULL};

struct command_line {
	char *words[WORDS_MAX + 2]; /* for the stock runtime: its name, then all but our own option */
	const char *command, *container, *root, *bundle, *config;
	bool help;
};

/* What is needed of the configuration; pointers into `data`, or defaults. */
struct local {
	char data[CONFIG_MAX];
	const char *runtime, *directory;
};

static void free_pointer(void *pointer)
{
	free(*(void **)pointer);
}
#define cleanup_free __attribute__((cleanup(free_pointer)))

static bool creates(const char *command)
{
	return !strcmp(command, "create") || !strcmp(command, "run");
}

static bool is_one_of(const char *word, const char *const *names)
{
	while (*names && strcmp(word, *names))
		names++;
	return *names;
}

/* `--name` or `--name=value`; NULL for another word. */
static const char *after_name(const char *word, const char *name)
{
	size_t length = strlen(name);
	if (strncmp(word, name, length) || (word[length] && word[length] != '='))
		return NULL;
	return word + length;
}

static void note_value(struct command_line *line, const char *name, const char *value)
{
	if (!line->command && !strcmp(name, "--root"))
		line->root = value;
	else if (line->command && !strcmp(name, "--bundle"))
		line->bundle = value;
}

static void note_argument(struct command_line *line, const char *word)
{
	if (!line->command)
		line->command = word;
	else if (!line->container)
		line->container = word;
}

/* False where the words are not plain. */
static bool parse(struct command_line *line, int count, char **words)
{
	const char *const *values = global_values;
	char **out = line->words + 1;
	if (count > WORDS_MAX)
		return false;
	for (int i = 0; i < count; i++) {
		char *word = words[i];
		const char *rest = after_name(word, "--interceptor-config");
		if (rest && !line->command) {
			if (!*rest && ++i == count)
				return false;
			line->config = *rest ? rest + 1 : words[i];
			continue;
		}
		*out++ = word;
		if (!strcmp(word, "-h") || !strcmp(word, "--help"))
			line->help = true;
		if (word[0] != '-' || !word[1]) {
			note_argument(line, word);
			if (line->command == word)
				values = creates(word) ? create_values : no_values;
			continue;
		}
		if (!strcmp(word, "--"))
			return false;
		if (is_one_of(word, values) && i + 1 < count) {
			*out++ = words[++i];
			note_value(line, !strcmp(word, "-b") ? "--bundle" : word, words[i]);
		} else if ((rest = after_name(word, "--root")) || (rest = after_name(word, "--bundle"))) {
			if (*rest)
				note_value(line, word[2] == 'r' ? "--root" : "--bundle", rest + 1);
		}
	}
	return true;
}

static char *stripped(char *begin, char *end)
{
	while (begin < end && strchr(" \t\v\f", *begin))
		begin++;
	while (end > begin && strchr(" \t\v\f", end[-1]))
		end--;
	*end = '\0';
	return begin;
}

/* One line of the configuration, in place; false where it takes a parser of TOML. */
static bool read_line(struct local *local, char *begin, char *end, bool seen[2])
{
	char *equals = memchr(begin, '=', (size_t)(end - begin));
	char *name = stripped(begin, equals ? equals : end), *value, *last;
	if (*name == '"' || *name == '\'')
		return false; /* a quoted key can have escapes */
	bool directory = !strcmp(name, "runtime_dir");
	if (!directory && strcmp(name, "runtime"))
		return true;
	if (!equals || seen[directory])
		return false;
	value = stripped(equals + 1, end);
	last = value + strlen(value) - 1;
	if (last <= value || *value != '"' || *last != '"')
		return false;
	*last = '\0';
	for (const char *c = ++value; *c; c++)
		if (*c < ' ' || *c == '"' || *c == '\\' || *c == 0x7f)
			return false;
	seen[directory] = true;
	*(directory ? &local->directory : &local->runtime) = value;
	return true;
}

static bool read_config(struct local *local, const char *path)
{
	bool seen[2] = {false, false};
	int fd = open(path ? path : DEFAULT_CONFIG, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno == ENOENT && !path;
	ssize_t size = read(fd, local->data, sizeof(local->data));
	close(fd);
	if (size < 0 || size == sizeof(local->data))
		return false;
	char *end = local->data + size;
	if (memchr(local->data, '\r', (size_t)size) || memchr(local->data, '\0', (size_t)size))
		return false;
	*end = '\0';
	if (strstr(local->data, "\"\"\"") || strstr(local->data, "'''"))
		return false;
	for (char *at = local->data; at < end;) {
		char *newline = memchr(at, '\n', (size_t)(end - at));
		char *stop = newline ? newline : end;
		if (!read_line(local, at, stop, seen))
			return false;
		at = stop + 1;
	}
	return true;
}

/* What can stand in a JSON string as it is, and means the same to everybody. */
static bool is_plain(const char *text)
{
	for (; *text; text++)
		if (*text <= ' ' || *text == '"' || *text == '\\' || *text >= 0x7f)
			return false;
	return true;
}

/* An absolute path in its shortest form, so that nobody has to normalize it. */
static bool is_plain_path(const char *path)
{
	size_t length = strlen(path);
	if (path[0] != '/' || !is_plain(path) || strstr(path, "//") || strstr(path, "/.") || length >= PATH_MAX)
		return false;
	return length > 1 && path[length - 1] != '/';
}

/* Sends a request of one line and reads the reply, whole and ended by NUL; -errno. */
static int ask(const char *directory, const char *socket_path, const char *request, size_t length, char *reply,
	       time_t seconds)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct timeval limit = {.tv_sec = seconds};
	size_t space = sizeof(address.sun_path), got = 0;
	if ((size_t)snprintf(address.sun_path, space, "%s%s", directory, socket_path) >= space)
		return -ENAMETOOLONG;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -errno;
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
	setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));
	int result = connect(fd, (struct sockaddr *)&address, sizeof(address)) < 0 ? -errno : 0;
	while (!result && length) {
		ssize_t sent = send(fd, request, length, MSG_NOSIGNAL);
		/* With a time limit also a stop and a debugger interrupt: signal(7). */
		if (sent < 0 && errno != EINTR)
			result = -errno;
		if (sent > 0) {
			request += sent;
			length -= (size_t)sent;
		}
	}
	while (!result && (!got || reply[got - 1] != '\n')) {
		ssize_t more = recv(fd, reply + got, MESSAGE_MAX - 1 - got, 0);
		if (!more || (more < 0 && errno != EINTR))
			result = more ? -errno : -ECONNRESET;
		if (more > 0)
			got += (size_t)more;
	}
	close(fd);
	reply[got] = '\0';
	return result;
}

static bool is_ok(const char *reply)
{
	return !strncmp(reply, "{\"ok\":true", 10);
}

/* As give_pipes in interceptor/oci/runtime.py. */
static void give_pipes(uid_t owner)
{
	for (int fd = 0; fd < 3; fd++) {
		struct stat status;
		if (!fstat(fd, &status) && S_ISFIFO(status.st_mode) && fchown(fd, owner, (gid_t)-1) < 0)
			continue; /* not ours to give: the runtime then says what it cannot open */
	}
}

/* As keep_null in interceptor/oci/runtime.py. */
static void keep_null(void)
{
	static const char path[] = "/dev/null";
	struct mount_attr read_only = {.attr_set = MOUNT_ATTR_RDONLY};
	for (int fd = 0; fd < 3; fd++) {
		struct stat status;
		char opened[32];
		if (fstat(fd, &status) || !S_ISCHR(status.st_mode) || status.st_rdev != makedev(1, 3))
			continue;
		int tree = (int)syscall(SYS_open_tree, AT_FDCWD, path, OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC);
		if (tree < 0)
			return;
		snprintf(opened, sizeof(opened), "/proc/self/fd/%d", tree);
		int null = -1;
		if (!syscall(SYS_mount_setattr, tree, "", AT_EMPTY_PATH, &read_only, sizeof(read_only)))
			null = open(opened, (fcntl(fd, F_GETFL) & O_ACCMODE) | O_CLOEXEC);
		if (null >= 0) {
			dup2(null, fd);
			close(null);
		}
		close(tree);
	}
}

/* A mount namespace of this process's own, in which the daemon puts together what the runtime will find. */
static bool prepare(const struct command_line *line, const struct local *local, const char *root, char *reply)
{
	static const char format[] = "{\"op\":\"prepare\",\"id\":\"%s\",\"pid\":%d,\"runtime\":\"%s\","
				     "\"runtime_root\":\"%s\",\"bundle\":\"%s\"}\n";
	char request[sizeof(format) + 4 * PATH_MAX];
	if (!line->bundle || !is_plain_path(line->bundle) || !is_plain(local->runtime))
		return false;
	/* Python has what stands in for it before Linux 5.12. */
	if (syscall(SYS_mount_setattr, -1, "", 0, NULL, 0) < 0 && errno == ENOSYS)
		return false;
	int length = snprintf(request, sizeof(request), format, line->container, (int)getpid(), local->runtime, root,
			      line->bundle);
	if ((size_t)length >= sizeof(request) || unshare(CLONE_NEWNS) < 0)
		return false;
	if (ask(local->directory, "/control.sock", request, (size_t)length, reply, CREATE_SECONDS) || !is_ok(reply))
		return false;
	const char *owner = strstr(reply, "\"stdio_owner\":");
	if (!owner)
		return false;
	give_pipes((uid_t)strtoul(strchr(owner, ':') + 1, NULL, 10));
	keep_null();
	return true;
}

/* Where the runtime knows the container its poststop hook tells the daemon; where it does not nobody else would.
 * Without a daemon the next one finds out. */
static void release(const struct command_line *line, const char *directory, const char *root, char *reply)
{
	char state[2 * PATH_MAX], request[PATH_MAX];
	struct stat status;
	if ((size_t)snprintf(state, sizeof(state), "%s/%s", root, line->container) >= sizeof(state))
		return;
	if (!stat(state, &status) && S_ISDIR(status.st_mode))
		return;
	int length = snprintf(request, sizeof(request), "{\"op\":\"release\",\"id\":\"%s\"}\n", line->container);
	if ((size_t)length < sizeof(request))
		ask(directory, "/control.sock", request, (size_t)length, reply, TIMEOUT_SECONDS);
}

/* What `create` left about the container names its clone, or cannot be read here: then there are changes to give back. */
static bool has_clone(const char *directory, const char *container)
{
	char path[2 * PATH_MAX];
	cleanup_free char *note = malloc(NOTE_MAX);
	if (!note || (size_t)snprintf(path, sizeof(path), "%s/wrapped/%s", directory, container) >= sizeof(path))
		return true;
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return errno != ENOENT;
	ssize_t length = read(fd, note, NOTE_MAX);
	close(fd);
	return length < 0 || !memmem(note, (size_t)length, "\"clone\": null", 13);
}

/* Whether nothing is left to do but to become the stock runtime. */
static bool is_done(const struct command_line *line, const struct local *local)
{
	const char *root = line->root, *name = strrchr(local->runtime, '/');
	if (!line->command || line->help)
		return true;
	if (!strcmp(line->command, "kill") || !strcmp(line->command, "exec"))
		return false;
	bool pauses = !strcmp(line->command, "pause"), deletes = !strcmp(line->command, "delete");
	if ((!creates(line->command) && !deletes && !pauses) || !line->container)
		return true;
	if (!creates(line->command) && (!is_plain(line->container) || has_clone(local->directory, line->container)))
		return false;
	if (pauses)
		return true;
	if (!root)
		root = !strcmp(name ? name + 1 : local->runtime, "crun") ? "/run/crun" : "/run/runc";
	cleanup_free char *reply = malloc(MESSAGE_MAX);
	if (!reply || !is_plain_path(root) || !is_plain(line->container))
		return false;
	if (creates(line->command))
		return prepare(line, local, root, reply);
	release(line, local->directory, root, reply);
	return true;
}

/* Returns only where the plain case is not one. */
static void become_runtime(int count, char **words)
{
	cleanup_free struct command_line *line = calloc(1, sizeof(*line));
	cleanup_free struct local *local = calloc(1, sizeof(*local));
	const char *chosen = getenv("INTERCEPTOR_RUNTIME"), *config = getenv("INTERCEPTOR_CONFIG");
	if (!line || !local || !parse(line, count, words))
		return;
	local->runtime = "runc";
	local->directory = DEFAULT_DIRECTORY;
	if (line->config && *line->config)
		config = line->config;
	if (!read_config(local, config && *config ? config : NULL))
		return;
	if (chosen && *chosen)
		local->runtime = chosen;
	if (!*local->runtime || !is_done(line, local))
		return;
	line->words[0] = (char *)local->runtime;
	execvp(local->runtime, line->words);
}

/* interceptor.oci.runtime of the environment that this is installed in: the interpreter is beside it. */
static int become_python(int count, char **words)
{
	char path[PATH_MAX + 16];
	cleanup_free char **argv = calloc((size_t)count + 5, sizeof(*argv));
	ssize_t length = readlink("/proc/self/exe", path, PATH_MAX);
	char *slash = length > 0 ? memrchr(path, '/', (size_t)length) : NULL;
	if (argv && slash) {
		strcpy(slash, "/python3");
		/* -P: nothing is imported from the working directory. */
		char *first[] = {path, "-P", "-m", "interceptor.oci.runtime"};
		memcpy(argv, first, sizeof(first));
		memcpy(argv + 4, words, (size_t)count * sizeof(*words));
		execv(path, argv);
	}
	fprintf(stderr, "interceptor-runc: no Python beside it: %s\n", strerror(errno));
	return 1;
}

/*
 * The hook: `--interceptor-hook SOCKET create|poststop`, the state on standard input. A state is JSON already, and a
 * request is what is put around it: between tokens a newline is as good as a blank, and within a string there is none.
 * A container can be deleted while no daemon is there: the next one finds out by itself.
 */
static int hook(const char *path, const char *operation)
{
	cleanup_free char *request = malloc(MESSAGE_MAX);
	cleanup_free char *reply = malloc(MESSAGE_MAX);
	if (!request || !reply)
		return 1;
	size_t length = (size_t)snprintf(request, 64, "{\"op\":\"%.16s\",\"state\":", operation);
	for (ssize_t got = 1; got; length += (size_t)got) {
		got = read(STDIN_FILENO, request + length, MESSAGE_MAX - 2 - length);
		if (got < 0)
			return 1;
	}
	for (char *c = request; (c = memchr(c, '\n', (size_t)(request + length - c)));)
		*c = ' ';
	memcpy(request + length, "}\n", 2);
	int result = ask("", path, request, length + 2, reply, TIMEOUT_SECONDS);
	if (!result && is_ok(reply))
		return 0;
	if (result == -ENOENT || result == -ECONNREFUSED) {
		if (!strcmp(operation, "poststop"))
			return 0;
		strcpy(reply, "no daemon listens there (start it: systemctl start interceptor, or: interceptor serve)");
	} else if (result) {
		strcpy(reply, strerror(-result));
	}
	fprintf(stderr, "interceptor %s: %s: %s\n", operation, path, reply);
	return 1;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "--interceptor-hook"))
		return hook(argv[2], argv[3]);
	if (argc > 0)
		become_runtime(argc - 1, argv + 1);
	return become_python(argc - 1, argv + 1);
}
