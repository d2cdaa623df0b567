"""The sweep of benchmarks/support_table.py: which entries it has, and how it goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "support_table.py"
OLDER: dict[str, Any] = {
    "name": "gpt2",
    "status": "packed",
    "reason": "",
    "modes": {"1": "packed"},
    "boundaries": [],
    "preemptions": 40,
    "ties": 0,
    "recomputed_otherwise": 0,
    "logit_error": 1e-6,
    "distinct_tokens": 200,
    "sensitivity": 1.0,
    "seconds": 9.0,
}
"""An entry from before there were fields of generation_config."""


def sweep(folder: Path, *names: str) -> tuple[dict[str, dict[str, Any]], str]:
    """The results file and the table behind a sweep over these entries."""
    results, table = folder / "results.json", folder / "table.md"
    subprocess.run(
        [sys.executable, SCRIPT, "--results", results, "--table", table, "--only", *names],
        check=True,
        timeout=600,
        capture_output=True,
    )
    entries = json.loads(results.read_text())["results"]
    return {entry["name"]: entry for entry in entries}, table.read_text()


def test_fields_and_rotary_kinds_join_the_results_of_an_older_sweep(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps({"results": [OLDER]}))
    names = ["mixtral/yarn", "llama@no_repeat_ngram_size", "llama@num_beams", "llama@temperature"]
    found, table = sweep(tmp_path, *names)
    assert {name: entry["status"] for name, entry in found.items()} == {
        "gpt2": "packed",
        "mixtral/yarn": "packed",
        "llama@no_repeat_ngram_size": "packed",
        "llama@num_beams": "warned",
        "llama@temperature": "packed",
    }
    assert found["gpt2"]["preemptions"] == OLDER["preemptions"]
    assert found["llama@no_repeat_ngram_size"]["changed"] > 5
    assert found["llama@temperature"]["changed"] == 0
    head, fields = table.split("## Fields of generation_config (3)")
    assert "of the 1 causal-LM architectures" in head
    assert "| `no_repeat_ngram_size` | packed |" in fields
    assert "| `num_beams` | warned |" in fields
