"""compose.yaml describes the services that tests/cluster/test_servers.py runs without Docker."""

import configparser
import re
from pathlib import Path

import yaml

from tests.conftest import REPO
from tests.support.services import SharedServer

TEXT = (REPO / "compose.yaml").read_text("utf-8")
CONTENT = yaml.safe_load(TEXT)


def test_every_service_volume_and_file_is_there() -> None:
    services = CONTENT["services"]
    for service in services.values():
        assert service.keys() & {"image", "build"}
        assert set(service.get("depends_on", [])) <= set(services)
        assert {config["source"] for config in service.get("configs", [])} <= set(
            CONTENT["configs"]
        )
        volumes = {volume.partition(":")[0] for volume in service.get("volumes", [])}
        assert volumes <= set(CONTENT["volumes"])


def test_every_secret_is_asked_for() -> None:
    example = (REPO / ".env.example").read_text("utf-8")
    assert set(re.findall(r"\$\{(\w+):\?\}", TEXT)) == set(re.findall(r"(?m)^(\w+)=", example))
    assert set(re.findall(r"\$\{(\w+):-", TEXT)) == set(re.findall(r"(?m)^# (\w+)=", example))


def test_the_server_is_the_one_that_was_tried(tmp_path: Path) -> None:
    tried = SharedServer(tmp_path, "postgresql+psycopg2://mlflow@127.0.0.1", "http://127.0.0.1")
    mlflow = CONTENT["services"]["mlflow"]
    options = [word for word in tried.command if word.startswith("--")]
    assert set(options) <= set(mlflow["command"].split())
    assert tried.env.keys() <= mlflow["environment"].keys()
    assert "postgresql+psycopg2://" in mlflow["command"]
    wanted, written = configparser.RawConfigParser(), configparser.RawConfigParser()
    wanted.read(tmp_path / "auth.ini")
    written.read_string(CONTENT["configs"]["auth.ini"]["content"])
    assert wanted["mlflow"].keys() == written["mlflow"].keys()
    for key in ("default_permission", "authorization_function"):
        assert wanted["mlflow"][key] == written["mlflow"][key]
