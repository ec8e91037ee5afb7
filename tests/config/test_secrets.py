"""What is shown or stored of an experiment holds no secret, and the experiment itself keeps them."""

import pytest

from nft_ray.config import (
    ExperimentConfig,
    dump,
    load,
    lost,
    masked,
    masked_text,
    masked_uri,
    parse,
    resolved,
    without_userinfo,
)
from nft_ray.config.loading import differences
from nft_ray.config.marks import mark_of
from nft_ray.types import Mark
from tests.examples import QUICKSTART, example_config

SECRETS = ("hunter2", "bearer", "variable", "staged")


def planted(password: str = "hunter2") -> ExperimentConfig:
    """The secrets in every place that an experiment has for one."""
    return load(
        QUICKSTART,
        [
            "run.num_epochs=1",
            f"tracking.uri=postgresql://me:{password}@db/mlflow?sslpassword={password}",
            "scorers.http.token=bearer",
            "rewards.geneval.runtime_env.env_vars.KEY=variable",
            "rewards.geneval.runtime_env.pip=['--extra-index-url=https://me:variable@host/simple']",
            "stages=[{name: one, num_epochs: 1, rewards: {geneval: {runtime_env: {env_vars: {KEY: staged}}}}, "
            "scorers: {http: {token: staged}}}]",
        ],
    )


def test_no_secret_is_in_what_is_stored_and_all_are_in_the_experiment() -> None:
    config = planted()
    assert not [secret for secret in SECRETS if secret in dump(config)]
    assert resolved(config)["tracking"]["uri"] == "postgresql://**********@db/mlflow?sslpassword=**********"
    assert config.tracking.uri == "postgresql://me:hunter2@db/mlflow?sslpassword=hunter2"
    assert config.reward_configs["geneval"].runtime_env["env_vars"] == {"KEY": "variable"}
    (stage,) = config.stage_configs
    assert stage.reward_configs["geneval"].runtime_env["env_vars"] == {"KEY": "staged"}
    assert stage.scorers.http.token.get_secret_value() == "staged"


def test_a_run_goes_on_with_another_password_or_address() -> None:
    stored = resolved(parse(resolved(planted())))
    assert differences(stored, resolved(planted("swordfish"))) == []
    changed = differences(stored, resolved(example_config("tracking.uri=http://elsewhere")))
    assert mark_of(planted(), "tracking.uri") is Mark.PLACEMENT
    assert "tracking.uri" in changed


def test_what_was_read_back_with_masks_is_known() -> None:
    assert list(lost(planted().model_dump())) == []
    keys = list(lost(parse(resolved(planted())).model_dump()))
    assert {"tracking.uri", "scorers.http.token", "rewards.geneval.runtime_env.env_vars.KEY"} <= set(keys)


def test_an_error_does_not_show_a_token() -> None:
    with pytest.raises(ValueError, match=r"scorers\.http\.token = '\*\*\*\*\*\*\*\*\*\*'"):
        load(QUICKSTART, ["scorers.http.token=4711"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("http://me:hunter2@host:5000/x failed", "http://**********@host:5000/x failed"),
        ("see http://host/a@b and s3://bucket/x@y", "see http://host/a@b and s3://bucket/x@y"),
        ("https://host/?api_key=abc&user=me", "https://host/?api_key=**********&user=me"),
        ("no address: me@host", "no address: me@host"),
    ],
)
def test_addresses_in_a_text(text: str, shown: str) -> None:
    assert masked_text(text) == shown


def test_a_password_with_a_slash() -> None:
    uri = "postgresql://me:hunt/er@2@db/mlflow"
    assert masked_uri(uri) == "postgresql://**********@db/mlflow"
    assert without_userinfo(f"cannot connect to {uri}", uri) == "cannot connect to postgresql://**********@db/mlflow"


def test_plain_data_stays_as_it_is() -> None:
    data = {"a": [1, None, 2.5], "token": None, "tokens": 3, "env": {"x": "y"}}
    assert masked(data) == data
