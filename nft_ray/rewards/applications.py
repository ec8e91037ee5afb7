"""What the Serve application of a reward is called: SCOPE/REWARD, such as `quickstart/geneval`. Stated here, once.

A run's own applications have its name for a scope, or NAME-2, NAME-3, ... where another live run has that already.
Those that are meant to be shared (`scorers.attach`, `nft-ray rewards serve`) are `shared/REWARD`.
"""

import difflib
import itertools
from collections.abc import Collection, Iterator

SHARED = "shared"


def application(scope: str, reward: str) -> str:
    """The name."""
    return f"{scope}/{reward}"


def reward_of(name: str) -> str | None:
    """The reward of an application, or None where the name is none of ours."""
    scope, slash, reward = name.rpartition("/")
    return reward if scope and slash and reward else None


def own_names(run: str, reward: str) -> Iterator[str]:
    """What a run's own application may be called, the first choice first; endless."""
    yield application(run, reward)
    for number in itertools.count(2):
        yield application(f"{run}-{number}", reward)


def route(name: str) -> str:
    """Where it answers over HTTP: /REWARD where it is shared, else /SCOPE/REWARD."""
    return f"/{name.removeprefix(f'{SHARED}/')}"


def find_application(name: str, deployed: Collection[str]) -> str:
    """The deployed application that a person means by SCOPE/REWARD, or by REWARD where one is shared or only one is.

    ValueError naming the nearest, or those that it may be.
    """
    if name in deployed:
        return name
    if application(SHARED, name) in deployed:
        return application(SHARED, name)
    of_reward = [one for one in deployed if reward_of(one) == name]
    if len(of_reward) == 1:
        return of_reward[0]
    if of_reward:
        raise ValueError(f"reward {name!r} is deployed more than once on this cluster: name one of {_list(of_reward)}")
    words = {word: one for one in deployed for word in (reward_of(one) or one, one)}
    close = difflib.get_close_matches(name, words, 1)
    hint = f"did you mean {words[close[0]]}?" if close else f"deployed: {_list(deployed) or 'none'}"
    raise ValueError(f"reward {name!r} is not deployed on this cluster; {hint}")


def _list(names: Collection[str]) -> str:
    return ", ".join(sorted(names))
