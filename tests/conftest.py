from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from tests.support.ranks import WarmRanks

# No deadline: a busy machine is not a failure. No database: a run leaves nothing behind in the checkout.
settings.register_profile("tpt_megatron", deadline=None, database=None)
settings.load_profile("tpt_megatron")


@pytest.fixture(scope="session")
def warm_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WarmRanks]:
    """Starts ranks of the trainer fast, for all tests of a session."""
    from tests.support.ranks import WarmRanks

    with WarmRanks(tmp_path_factory.mktemp("ranks")) as warm:
        yield warm
