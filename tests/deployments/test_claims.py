"""Which name a run's own application gets, and who may still want one. No Ray."""

import pytest

from deployments.claims import Claim, User, own_name

LIVE = {"01", "02"}
SHARED = "shared/ocr"


def claim(application: str, *users: tuple[str, str], stays: bool = False) -> Claim:
    return Claim(application=application, made_from="x", users=tuple(User(*user) for user in users), stays=stays)


@pytest.mark.parametrize(
    ("claims", "deployed", "name"),
    [
        ([], [], "run/ocr"),
        ([claim("run/ocr", ("01", "/runs/other"))], ["run/ocr"], "run-2/ocr"),  # two live runs of one name
        ([claim("run/ocr", ("01", "/runs/other"))], [], "run-2/ocr"),  # the other is about to deploy it
        ([claim("run/ocr", ("09", "/runs/other"))], ["run/ocr"], "run/ocr"),  # its job is dead
        ([claim("run/ocr", ("09", "/runs/mine"))], ["run/ocr"], "run/ocr"),  # an earlier start of this run
        ([claim("run-2/ocr", ("09", "/runs/mine"))], ["run-2/ocr"], "run-2/ocr"),  # which had to take another name
        ([claim("run/ocr", ("01", "/runs/mine"))], ["run/ocr"], "run-2/ocr"),  # the same path on another machine
        ([claim("run/ocr", ("02", "/runs/mine"))], ["run/ocr"], "run/ocr"),  # this very start
        ([claim("run/geneval", ("09", "/runs/mine"))], ["run/geneval"], "run/ocr"),
        ([], ["run/ocr"], "run-2/ocr"),  # not deployed by us
        ([claim(SHARED, ("01", "/runs/mine"))], [SHARED], "run/ocr"),
    ],
)
def test_a_run_gets_its_own_name(claims: list[Claim], deployed: list[str], name: str) -> None:
    known = {one.application: one for one in claims}
    assert own_name("run", "ocr", User("02", "/runs/mine"), known, deployed, LIVE, SHARED) == name


def test_a_run_called_shared_is_no_shared_application() -> None:
    assert own_name("shared", "ocr", User("02", "/runs/mine"), {}, [], LIVE, SHARED) == "shared-2/ocr"


def test_it_lives_while_one_user_does_or_where_it_is_to_stay() -> None:
    both = claim("a/ocr", ("09", "/runs/a"), ("01", "/runs/b"))
    assert both.lives(LIVE)
    assert not both.without(User("01", "/runs/b"), LIVE).lives(LIVE)
    assert claim("shared/ocr", stays=True).lives(LIVE)
    again = both.used_by(User("02", "/runs/a"))
    assert set(again.users) == {User("01", "/runs/b"), User("02", "/runs/a")}
