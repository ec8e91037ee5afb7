"""What a file may hold that nobody meant to write: cut, flipped, replaced, and JSON of any shape."""

import json
from typing import Any

from hypothesis import strategies as st

from deployments.http_api import HttpError

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["", " ", "~", "null", "auto", "../../x", "/etc/passwd", "${oc.env:HOME}", "${run}", "\x00", "é"]),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """`whole`, cut off, with bytes flipped, with a piece replaced, or something else altogether."""
    how = draw(st.sampled_from(["cut", "flip", "replace", "other", "longer"]))
    place = draw(st.integers(0, max(0, len(whole) - 1)))
    if how == "cut":
        return whole[:place]
    if how == "flip":
        bits = draw(st.integers(1, 255))
        return whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :]
    if how == "replace":
        piece = draw(st.binary(min_size=1, max_size=16))
        return whole[:place] + piece + whole[place + len(piece) :]
    if how == "longer":
        return whole + draw(st.binary(min_size=1, max_size=16))
    return draw(st.binary(max_size=64) | TREES.map(lambda tree: json.dumps(tree).encode()))


@st.composite
def changed(draw: st.DrawFn, tree: Any) -> Any:
    """A copy of `tree` in which one value, key or section is another one."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 5)):
        key = draw(st.sampled_from(sorted(tree, key=str)))
        how = draw(st.sampled_from(["deeper", "deeper", "deeper", "gone", "renamed"]))
        if how == "gone":
            return {name: value for name, value in tree.items() if name != key}
        if how == "renamed":
            return {name: value for name, value in tree.items() if name != key} | {
                draw(st.text(max_size=12)): tree[key]
            }
        return tree | {key: draw(changed(tree[key]))}
    if isinstance(tree, list) and tree and draw(st.integers(0, 2)):
        index = draw(st.integers(0, len(tree) - 1))
        return [*tree[:index], draw(changed(tree[index])), *tree[index + 1 :]]
    return draw(TREES)


def one_line(error: Exception) -> None:
    """AssertionError unless it is what a user may be told: a ValueError or OSError of one line."""
    assert isinstance(error, ValueError | OSError), f"{type(error).__name__}: {error}"
    assert not isinstance(error, UnicodeError | json.JSONDecodeError), f"{type(error).__name__}: {error}"
    assert "\n" not in str(error)
    assert str(error).strip()


def refused(error: HttpError) -> None:
    """The same of an HTTP request."""
    assert 400 <= error.status < 500
    assert "\n" not in error.reason
    assert error.reason.strip()
    assert json.dumps({"error": error.reason}).encode()
