"""docker-compose.yml, checked as far as that goes without a Docker engine."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from jsonschema import Draft201909Validator
from kits.house import HOUSE, ROOT


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    text = (ROOT / "docker-compose.yml").read_text()
    # What compose does before it looks at the file, in an environment where nothing is set.
    return yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))


@pytest.fixture(scope="module")
def validator() -> Draft201909Validator:
    schema = json.loads((ROOT / "tests/data/compose-spec.json").read_text())
    return Draft201909Validator(schema)


def test_compose_file_is_valid_by_the_public_schema(compose, validator):
    assert [error.message for error in validator.iter_errors(compose)] == []


def test_the_schema_would_catch_a_misspelt_key(compose, validator):
    broken = json.loads(json.dumps(compose))
    broken["services"]["worker"]["comand"] = "batchmill worker"
    assert not validator.is_valid(broken)


def test_the_image_has_every_package():
    copied = re.findall(r"^COPY (\w+) \1$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    assert sorted(copied) == sorted(HOUSE)


def test_redis_keeps_what_it_is_given(compose):
    command = " ".join(compose["services"]["redis"]["command"])
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert compose["services"]["redis"]["volumes"], "the append-only file must outlive a container"


def test_gpu_workers_reserve_devices_and_start_only_on_request(compose):
    gpu = compose["services"]["worker-gpu"]
    (device,) = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia"
    assert "gpu" in device["capabilities"]
    assert gpu["profiles"] == ["gpu"]
    assert "profiles" not in compose["services"]["redis"]


def test_workers_have_longer_to_stop_than_they_take_to_drain(compose):
    grace = compose["services"]["worker"]["stop_grace_period"]
    drain = compose["services"]["worker"]["environment"]["BATCHMILL_DRAIN_GRACE_S"]
    assert float(grace.removesuffix("s")) > float(drain)


def test_images_are_built_from_files_that_are_there(compose):
    for service in ("worker", "worker-gpu"):
        build = compose["services"][service]["build"]
        assert (ROOT / build["context"] / build.get("dockerfile", "Dockerfile")).is_file()
