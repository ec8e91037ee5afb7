"""What an application is called, and which one a person means."""

from itertools import islice

import pytest

from nft_ray.rewards.applications import find_application, own_names, reward_of, route

DEPLOYED = ["a/geneval", "b/geneval", "b/ocr", "shared/pickscore", "a/pickscore", "theirs"]


def test_names_and_back() -> None:
    assert list(islice(own_names("run-1.b", "geneval"), 3)) == [
        "run-1.b/geneval",
        "run-1.b-2/geneval",
        "run-1.b-3/geneval",
    ]
    assert reward_of("run-1.b-2/geneval") == "geneval"
    assert [reward_of(name) for name in ("default", "/geneval", "run/")] == [None] * 3
    assert (route("shared/ocr"), route("run/ocr")) == ("/ocr", "/run/ocr")


@pytest.mark.parametrize(
    ("said", "meant"),
    [("a/geneval", "a/geneval"), ("ocr", "b/ocr"), ("pickscore", "shared/pickscore"), ("a/pickscore", "a/pickscore")],
)
def test_either_name_is_understood(said: str, meant: str) -> None:
    assert find_application(said, DEPLOYED) == meant


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("geneval", r"deployed more than once on this cluster: name one of a/geneval, b/geneval$"),
        ("pikscore", r"not deployed on this cluster; did you mean .*/pickscore\?$"),
        ("b/ocrr", r"did you mean b/ocr\?$"),
        ("xyzzy", r"deployed: a/geneval, a/pickscore, b/geneval, b/ocr, shared/pickscore, theirs$"),
    ],
)
def test_what_is_not_there_names_the_nearest(said: str, line: str) -> None:
    with pytest.raises(ValueError, match=line):
        find_application(said, DEPLOYED)
