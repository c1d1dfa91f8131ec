"""One process for all files from which `fluoro` is forked."""

from collections.abc import Iterator

import pytest

from tests.reliability.command_line import Server


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    started = Server()
    yield started
    started.close()
