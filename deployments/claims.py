"""Whose an application is: who made it and who uses it. Kept in Ray's GCS, where it outlives every one of them.

    deploy ── claim ──► {"users": [{"job": "0a000000", "owner": "/runs/a"}], ...} ◄── release: the last one deletes it

`owner` is what stays the same when a command is started again (the folder of its run), `job` is Ray's id of one such
start: it dies with its driver, `kill -9` included, and the GCS knows that at once. So the same command finds its own,
and what only dead jobs used can be told from what is in use. Who may write is not decided here: see build.alone.
"""

import json
from collections.abc import Collection
from dataclasses import asdict, dataclass, replace

from ray._private.state import jobs
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from nft_ray.rewards.applications import own_names, reward_of

NAMESPACE = "nft_ray"
"""Of claims, and of detached actors: jobs have a namespace of their own each, and an application outlives its job."""
KEY = "application:"


@dataclass(frozen=True, slots=True)
class User:
    """One start of a command (`job`) on behalf of `owner`."""

    job: str
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One application. `made_from`: a digest of all that it was deployed with; `stays`: also without a user."""

    application: str
    made_from: str
    users: tuple[User, ...]
    stays: bool = False

    def lives(self, live_jobs: Collection[str]) -> bool:
        """Whether anybody may still want it."""
        return self.stays or any(user.job in live_jobs for user in self.users)

    def is_left_to(self, me: User, live_jobs: Collection[str]) -> bool:
        """Whether an earlier start of this very command has left it, or this one uses it; and nobody else does."""
        return any(user.owner == me.owner for user in self.users) and not self.without(me, live_jobs).users

    @property
    def owners(self) -> str:
        """For a log line."""
        return ", ".join(user.owner for user in self.users)

    def used_by(self, user: User) -> "Claim":
        """With this user, instead of what earlier starts of its command left there."""
        return replace(self, users=(*(one for one in self.users if one.owner != user.owner), user))

    def without(self, user: User, live_jobs: Collection[str]) -> "Claim":
        """Without this user, and without the dead."""
        return replace(self, users=tuple(one for one in self.users if one != user and one.job in live_jobs))


def own_name(
    run: str,
    reward: str,
    me: User,
    claims: dict[str, Claim],
    deployed: Collection[str],
    live_jobs: Collection[str],
    shared: str,
) -> str:
    """What a run's own application is called: as its earlier start called it, else the first name that is free."""
    mine = [name for name, claim in claims.items() if claim.is_left_to(me, live_jobs) and name != shared]
    if left := [name for name in mine if reward_of(name) == reward]:
        return left[0]

    def free(name: str) -> bool:
        claim = claims.get(name)
        return name not in deployed if claim is None else not claim.lives(live_jobs)

    return next(name for name in own_names(run, reward) if name != shared and free(name))


def live_jobs() -> set[str]:
    """The ids of the jobs whose driver lives."""
    return {job["JobID"] for job in jobs() if not job["IsDead"]}


def read_claims() -> dict[str, Claim]:
    """Every claim on this cluster, by application."""
    found = {}
    for key in sorted(_internal_kv_list(KEY, namespace=NAMESPACE)):
        text = _internal_kv_get(key, namespace=NAMESPACE)
        if text is not None:  # else it was released meanwhile
            data = json.loads(text)
            users = tuple(User(**user) for user in data.pop("users"))
            claim = Claim(**data, users=users)
            found[claim.application] = claim
    return found


def write(claim: Claim) -> None:
    """Keep it; over what stood there."""
    _internal_kv_put(f"{KEY}{claim.application}", json.dumps(asdict(claim)), overwrite=True, namespace=NAMESPACE)


def forget(application: str) -> None:
    """Nobody's any more; one that is not claimed is no error."""
    _internal_kv_del(f"{KEY}{application}", namespace=NAMESPACE)
