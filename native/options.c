/* What mount(2) is told about a new procfs or sysfs, read as the kernel reads it. */
#include "guard.h"

#include <ctype.h>

enum { LAST_BYTE = 4096 - 1 };

/*
 * The options as copy_mount_options() of fs/namespace.c takes them: as much of a page as can be read, its last byte
 * taken for the end. Returns -EFAULT where nothing can be read.
 */
int ix_read_options(int tid, uint64_t address, char out[PATH_MAX])
{
	const size_t page = 4096;
	size_t have = 0;
	while (have < LAST_BYTE && !memchr(out, '\0', have)) {
		size_t want = page - ((address + have) & (page - 1));
		if (want > LAST_BYTE - have)
			want = LAST_BYTE - have;
		struct iovec local = {.iov_base = out + have, .iov_len = want};
		struct iovec remote = {.iov_base = (void *)(uintptr_t)(address + have), .iov_len = want};
		ssize_t n = process_vm_readv(tid, &local, 1, &remote, 1, 0);
		if (n <= 0)
			break;
		have += (size_t)n;
	}
	out[have] = '\0';
	return have ? 0 : -EFAULT;
}

/* kstrtouint() of lib/kstrtox.c with any base. */
static bool parse_number(const char *text, size_t length, uint32_t *number)
{
	uint64_t value = 0, base = 10;
	size_t i = length > 0 && text[0] == '+';
	if (length > i + 1 && text[length - 1] == '\n')
		length--;
	if (i < length && text[i] == '0') {
		bool hexadecimal = i + 2 < length && (text[i + 1] | 0x20) == 'x' && isxdigit((unsigned char)text[i + 2]);
		base = hexadecimal ? 16 : 8;
		i += hexadecimal ? 2 : 0;
	}
	if (i >= length)
		return false;
	for (; i < length; i++) {
		unsigned char c = (unsigned char)text[i];
		if (!isxdigit(c))
			return false;
		uint64_t digit = (uint64_t)(isdigit(c) ? c - '0' : (c | 0x20) - 'a' + 10);
		value = value * base + digit;
		if (digit >= base || value > UINT32_MAX)
			return false;
	}
	*number = (uint32_t)value;
	return true;
}

static bool is_word(const char *text, size_t length, const char *word)
{
	return strlen(word) == length && memcmp(text, word, length) == 0;
}

static bool parse_hidepid(const char *text, size_t length, int32_t *hidepid)
{
	static const struct { const char *word; int value; } words[] = {
		{"off", 0}, {"noaccess", 1}, {"invisible", 2}, {"ptraceable", 4},
	};
	uint32_t value;
	for (size_t i = 0; i < sizeof(words) / sizeof(words[0]); i++)
		if (is_word(text, length, words[i].word)) {
			*hidepid = words[i].value;
			return true;
		}
	if (!parse_number(text, length, &value) || value > 4 || value == 3)
		return false;
	*hidepid = (int32_t)value;
	return true;
}

/* vfs_parse_sb_flag() of fs/fs_context.c: flags of the superblock, by whatever value they are given. */
static bool parse_superblock_flag(const char *key, size_t length, uint32_t *flags)
{
	static const struct { const char *key; uint32_t set, clear; } keys[] = {
		{"ro", MS_RDONLY, 0}, {"rw", 0, MS_RDONLY}, {"sync", MS_SYNCHRONOUS, 0}, {"async", 0, MS_SYNCHRONOUS},
		{"dirsync", MS_DIRSYNC, 0}, {"mand", MS_MANDLOCK, 0}, {"nomand", 0, MS_MANDLOCK},
		{"lazytime", MS_LAZYTIME, 0}, {"nolazytime", 0, MS_LAZYTIME},
	};
	for (size_t i = 0; i < sizeof(keys) / sizeof(keys[0]); i++)
		if (is_word(key, length, keys[i].key)) {
			*flags = (*flags | keys[i].set) & ~keys[i].clear;
			return true;
		}
	return false;
}

static bool parse_procfs_option(const char *key, size_t length, const char *value, size_t size, struct ix_ask *ask)
{
	if (is_word(key, length, "hidepid"))
		return parse_hidepid(value, size, &ask->hidepid);
	if (is_word(key, length, "gid"))
		/* The highest number stands for "not given", and is no group's. */
		return parse_number(value, size, &ask->gid) && ask->gid != UINT32_MAX;
	if (is_word(key, length, "subset") && is_word(value, size, "pid"))
		return (ask->subset_pid = 1) != 0;
	return false;
}

/* The options of a new procfs (proc(5)); anything else is left to the kernel, which refuses it with its own errno. */
bool ix_parse_options(const char *data, struct ix_ask *ask)
{
	ask->sb_flags = (uint32_t)ask->flags & (MS_RDONLY | MS_SYNCHRONOUS | MS_DIRSYNC | MS_MANDLOCK | MS_LAZYTIME);
	for (const char *p = data; *p;) {
		size_t n = strcspn(p, ","), length = strcspn(p, ",=");
		size_t value = length < n ? length + 1 : n;
		/* What begins with `=` the kernel passes over. */
		bool ok = length == 0 || parse_superblock_flag(p, length, &ask->sb_flags) ||
			  (ask->kind == 1 && parse_procfs_option(p, length, p + value, n - value, ask));
		if (!ok)
			return false;
		p += n + (p[n] == ',');
	}
	return true;
}

/* What the mount is called: as the caller says, if that is a short word that any log can bear. */
void ix_name_source(const char *source, struct ix_ask *ask)
{
	size_t n = strlen(source);
	bool plain = n < IX_SOURCE_MAX;
	for (size_t i = 0; i < n && plain; i++)
		plain = source[i] >= ' ' && source[i] <= '~';
	strcpy(ask->source, plain ? source : ask->kind == 1 ? "proc" : "sysfs");
}
