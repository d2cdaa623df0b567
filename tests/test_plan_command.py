"""`batchmill plan`: what it tells is what a worker would do."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from kits.engine_models import VOCAB, make_model
from typer.testing import CliRunner

from batchmill.commands.app import app
from engine.config import EngineConfig
from engine.demo_model import DEMO_MODEL_PATH
from engine.engine import Engine
from queue_api.wire.errors import ConfigurationError, MissingExtraError


def plan(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    if result.exception:
        raise result.exception
    return result.stdout


def planned(*arguments: str) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(plan(*arguments, "--json"))
    return report


@pytest.mark.parametrize("strategy", ["uniform", "memory", "compute", "mixed"])
def test_a_plan_is_what_the_engine_loads(strategy: Any) -> None:
    devices = ("cpu", "cpu")
    report = planned("demo", "--devices", ",".join(devices), "--strategy", strategy)
    engine = Engine.load(EngineConfig(str(DEMO_MODEL_PATH), devices=devices, partition=strategy))
    for told, stage in zip(report["stages"], engine.stages, strict=True):
        layers = (stage.spec.first_layer, stage.spec.end_layer)
        assert (told["first_layer"], told["end_layer"]) == layers
        assert told["cache_bytes_per_token"] == stage.slot_bytes
        weights = sum(tensor.numel() for tensor in stage.model.state_dict().values())
        assert told["num_params"] == weights
        assert told["weight_bytes"] == 4 * weights
        assert told["measured"] is None
        assert told["predicted"]["decode_s"] > 0
    assert report["cache_slots"] == engine.scheduler.allocator.num_slots
    engine.close()


def test_quantized_weights_are_counted_as_the_bytes_they_take() -> None:
    plain, quantized = (
        planned("demo", "--devices", "cpu", "--quantization", kind) for kind in ("none", "int8")
    )
    assert (plain["quantization"], quantized["quantization"]) == ("none", "int8")
    (before,), (after,) = plain["stages"], quantized["stages"]
    assert before["num_params"] == after["num_params"]
    layers = before["weight_bytes"] - after["weight_bytes"]
    assert 0 < layers < 3 / 4 * before["weight_bytes"]
    assert after["predicted"]["peak_bytes"] <= before["predicted"]["peak_bytes"]


def test_measured_times_stand_beside_predicted_ones() -> None:
    report = planned("demo", "--devices", "cpu,cpu", "--measure", "--threads", "1")
    assert report["speeds"] == "measured"
    assert report["steps"]["decode"]["num_seqs"] == 64
    for stage in report["stages"]:
        assert stage["measured"]["decode_s"] > 0
        assert stage["measured"]["prefill_s"] > 0
        assert stage["measured"]["bubble_share"] == 0  # they take turns on the one device


def test_a_model_without_attention_has_a_plan(tmp_path: Path) -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=4)
    make_model(config, tmp_path)
    report = planned(str(tmp_path), "--devices", "cpu,cpu", "--max-model-len", "64")
    assert [stage["cache_bytes_per_token"] for stage in report["stages"]] == [0, 0]


def test_the_table_tells_how_to_have_its_cut() -> None:
    shown = plan("demo", "--devices", "cpu,cpu", "--strategy", "custom", "--layer-bounds", "3")
    assert "--partition custom --layer-bounds 3" in shown.replace("\n", " ")
    assert "0-2" in shown


def test_what_cannot_be_is_told_in_a_line() -> None:
    with pytest.raises(ConfigurationError, match="BATCHMILL_PARTITION is 'even'"):
        plan("demo", "--strategy", "even")
    with pytest.raises(ConfigurationError, match="5 stages for a model of 4 layers"):
        plan("demo", "--devices", "cpu,cpu,cpu,cpu,cpu")
    with pytest.raises(ConfigurationError, match="no such device"):
        plan("demo", "--devices", "gpu")


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    with pytest.raises(MissingExtraError, match=r"batchmill\[worker\]"):
        plan("demo")
