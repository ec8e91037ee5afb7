"""A site to download from, without a proxy or a token of the machine, and without waiting between attempts."""

from collections.abc import Iterator

import pytest

from nft_ray.downloads import transfer
from tests.downloads.misbehaving_site import Site, serving


@pytest.fixture
def site(quick: None) -> Iterator[Site]:
    site = Site()
    with serving(site) as site.url:
        yield site


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "RETRY_S", 0.01)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
