"""Batching without Serve; with it, the deployment is tested in tests/test_roles.py."""

import numpy as np
import pytest

from deployments.reward_app import score_requests
from tests.fakes import FakeReward


@pytest.mark.parametrize("sizes", [[3], [2, 1, 4]])
def test_every_request_gets_its_own_rows(sizes: list[int]) -> None:
    requests = []
    for i, size in enumerate(sizes):
        images = np.zeros((size, 8, 8, 3), dtype=np.uint8)
        images[:] = (10 * i + np.arange(size)).reshape(-1, 1, 1, 1)
        images.flags.writeable = False  # as they come out of the object store
        requests.append((images, [f"prompt {i}"] * size, [{}] * size))
    for (images, _, _), scores in zip(requests, score_requests(FakeReward(), requests), strict=True):
        np.testing.assert_array_equal(scores.values, images[:, 0, 0, 0])
        np.testing.assert_array_equal(scores.details["negative"], -scores.values)
