"""The demo model: a toy Llama of two million parameters that ships inside the wheel.

It answers the short questions and tells the short stories of `corpus.py`, and nothing else. It
is here so that the demo, the tests and the examples run on real text without a download.
`python -m engine.demo_model.train` makes it again from nothing. It imports nothing else of the
house. Begin with corpus.py.
"""

from pathlib import Path

DEMO_MODEL_PATH: Path = Path(__file__).resolve().parent / "batchmill-demo"
"""Folder to give to `from_pretrained`; its name is the model's in results."""

__all__ = ["DEMO_MODEL_PATH"]
