"""interceptor/errors.py."""

from __future__ import annotations

import errno
import pickle

import pytest

from interceptor.errors import InterceptorError, SyscallError


def test_system_call_error_shows_the_call_and_the_name_of_the_error() -> None:
    error = SyscallError(errno.EINVAL, 'umount2("/proc/sys", UMOUNT_NOFOLLOW)')
    assert str(error) == 'umount2("/proc/sys", UMOUNT_NOFOLLOW): EINVAL (Invalid argument)'
    assert (error.errno, error.call, error.hint) == (
        errno.EINVAL,
        'umount2("/proc/sys", UMOUNT_NOFOLLOW)',
        None,
    )


def test_system_call_error_is_both_ours_and_the_operating_systems() -> None:
    for kind in (OSError, InterceptorError):
        with pytest.raises(kind):
            raise SyscallError(errno.EPERM, "setns(3, 0)")


def test_error_number_without_a_name_is_shown() -> None:
    assert "errno 512" in str(SyscallError(512, "nanosleep()"))


def test_system_call_error_crosses_processes() -> None:
    error = pickle.loads(pickle.dumps(SyscallError(errno.ENOENT, "open()")))
    assert (error.errno, str(error)) == (errno.ENOENT, "open(): ENOENT (No such file or directory)")
