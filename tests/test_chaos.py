"""The short form of ``make chaos``: a few faults against a few jobs."""

import pytest

from tests.chaos.run import run
from tests.tiers import slow_but


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("storage", slow_but(["s3"], ["file", "s3"]))
def test_a_few_faults_lose_nothing_and_publish_nothing_twice(storage: str) -> None:
    verdict = run(seed=7, faults=6, jobs=3, gap=2.0, patience=1200.0, lease=24.0, storage=storage)
    assert not verdict.faults
    assert (verdict.counts["faults"], verdict.counts["jobs"], verdict.counts["lost"]) == (6, 3, 0)
