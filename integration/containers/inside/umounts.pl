#!/usr/bin/perl
# Runs inside the container, under its seccomp filter, because only there are calls trapped. perl-base is in every Debian
# image, Python is not; "syscall" lets a script make exactly the call that systemd makes. Prints tab-separated records.
#
#   copies PREFIX PATH... -- BELOW...
#                             bind / recursively to PREFIX; unmount the copy of each PATH, with a look at all of them and
#                             at BELOW after each; then umount_recursive on /sys and on /proc below PREFIX
#   deny FLAGS PATH...        unmount each PATH with these flags and report the errno
#   loop COUNT PATH...        COUNT unmounts of a mount of one's own, and COUNT lazy ones of each PATH, to be refused
#   new-proc PATH COUNT       mount procfs at PATH and unmount it again, COUNT times; the first one is looked at
#   look PATH...              the filesystem type at each PATH
use strict;
use warnings;
use POSIX ();

my ($SYS_mount, $SYS_umount2) = (POSIX::uname())[4] eq 'aarch64' ? (40, 39) : (165, 166);
my ($MS_BIND, $MS_REC, $MNT_DETACH, $UMOUNT_NOFOLLOW) = (0x1000, 0x4000, 2, 8);
my $STORM = 2000;    # a walk that makes this many calls will not end
my ($nosuid, $nodev, $noexec) = (2, 4, 8);

sub say_record { print join("\t", @_), "\n" }

sub unescape { my ($text) = @_; $text =~ s/\\([0-7]{3})/chr oct $1/ge; return $text }

# The mount table: [id, root, path, filesystem type], parents before children, as the kernel lists it.
sub mounts {
    open my $table, '<', '/proc/self/mountinfo' or die "/proc/self/mountinfo: $!";
    my @result;
    while (<$table>) {
        my @field = split ' ';
        my ($separator) = grep { $field[$_] eq '-' } 6 .. $#field;
        push @result, [$field[0], unescape($field[3]), unescape($field[4]), $field[$separator + 1]];
    }
    return @result;
}

sub at_or_below { my ($path, $prefix) = @_; return $path eq $prefix || index($path, "$prefix/") == 0 }

sub umount2 {
    my ($path, $flags) = @_;
    return syscall($SYS_umount2, $path, $flags + 0) == 0 ? 0 : $! + 0;
}

sub mount_call {
    my ($source, $target, $type, $flags) = @_;
    return syscall($SYS_mount, $source, $target, $type, $flags + 0, 0) == 0 ? 0 : $! + 0;
}

# statfs(2) f_type in hexadecimal: 9fa0 is procfs, 62656572 sysfs, 65735546 FUSE, 1021994 tmpfs.
sub filesystem_type {
    my ($path) = @_;
    my $child = open(my $stat, '-|') // die "fork: $!";
    if (!$child) {
        open STDERR, '>', '/dev/null';    # that a path does not exist is an answer, not an error
        exec 'stat', '-f', '-c', '%t', $path or POSIX::_exit(127);
    }
    my $type = <$stat> // 'none';
    close $stat;
    chomp $type;
    return $type;
}

sub topmost { my ($path) = @_; my @here = grep { $_->[2] eq $path } mounts(); return $here[-1] }

# umount_recursive() of systemd's src/shared/mount-util.c: parent first, from the start again after each success, until a
# whole pass has none.
sub umount_recursive {
    my ($prefix) = @_;
    my $calls = 0;
  PASS: {
        for my $mount (mounts()) {
            my $path = $mount->[2];
            next unless at_or_below($path, $prefix);
            my $result = umount2($path, $UMOUNT_NOFOLLOW);
            say_record('call', $path, $result) if ++$calls <= 20;
            last PASS if $calls >= $STORM;
            redo PASS if $result == 0;
        }
    }
    my @left = grep { at_or_below($_->[2], $prefix) } mounts();
    say_record('recursive', $prefix, $calls, scalar @left, join ' ', map { "$_->[2]($_->[3])" } @left);
}

sub copies {
    my ($prefix, @paths) = @_;
    my ($end) = grep { $paths[$_] eq '--' } 0 .. $#paths;
    my @below = splice @paths, $end;
    shift @below;
    mkdir $prefix;
    my $error = mount_call('/', $prefix, 'none', $MS_BIND | $MS_REC);
    say_record('bind', $prefix, $error);
    exit 1 if $error;
    for my $path (@paths) {
        my $copy = $prefix . $path;
        my $before = topmost($copy) or next;
        my $seen = filesystem_type($copy);
        my $result = umount2($copy, $UMOUNT_NOFOLLOW);
        my $there = grep { $_->[0] == $before->[0] } mounts();
        say_record('copy', $path, $result, $there ? 'there' : 'gone', $seen, filesystem_type($copy));
        look(map { $prefix . $_ } @paths, @below);
    }
    umount_recursive("$prefix/sys");
    umount_recursive("$prefix/proc");
    look(map { $prefix . $_ } @paths, @below);
}

sub look { say_record('look', $_, filesystem_type($_)) for @_ }

sub deny {
    my ($flags, @paths) = @_;
    say_record('denied', $_, $flags, umount2($_, $flags)) for @paths;
}

sub loop {
    my ($count, @originals) = @_;
    my $place = '/tmp/free';
    mkdir $place;
    my ($freed, $refused) = (0, 0);
    for (1 .. $count) {
        die "mount tmpfs: $!" if mount_call('free', $place, 'tmpfs', 0);
        $freed++ if umount2($place, 0) == 0;
        for my $original (@originals) {
            $refused++ if umount2($original, $MNT_DETACH);
        }
    }
    say_record('loop', $freed, $refused);
}

sub new_proc {
    my ($place, $count) = @_;
    mkdir $place;
    for my $round (1 .. $count) {
        my $error = mount_call('proc', $place, 'proc', $nosuid | $nodev | $noexec);
        say_record('new-proc', $place, $error) if $round == 1 || $error;
        exit 1 if $error;
        if ($round == 1) {
            open my $comm, '<', "$place/1/comm" or die "$place/1/comm: $!";
            chomp(my $first = <$comm>);
            say_record('first-process', $first, $$);
            look(map { $place . $_ } qw(/sys /sys/kernel/hostname /uptime /swaps));
        }
        $error = umount2($place, $UMOUNT_NOFOLLOW);
        say_record('removed', $place, $error) if $round == 1 || $error;
        exit 1 if $error;
    }
}

my $what = shift @ARGV;
my %actions = (copies => \&copies, deny => \&deny, loop => \&loop, 'new-proc' => \&new_proc, look => \&look);
die "unknown action\n" unless defined $what && $actions{$what};
$| = 1;
$actions{$what}->(@ARGV);
