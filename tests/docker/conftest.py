"""One engine for all tests of this directory, with the trixie image."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from integration.containers import quickstart, rootfs
from integration.docker.engine import Docker, import_image, serving


@pytest.fixture(scope="session")
def docker() -> Iterator[Docker]:
    """The engine, started when first asked for."""
    cache = quickstart.parser().get_default("cache")
    rootfs.ensure(cache, 100000)
    with serving() as engine:
        import_image(engine, cache / rootfs.SUITE)
        yield engine
