"""What a dataset run tells of how far it is."""

from __future__ import annotations

import io

from rich.console import Console

from batchmill.offline.report import progress_display
from queue_api.datasets.summary import Progress


def test_time_left_is_told_from_the_first_line_on_that_has_new_rows() -> None:
    told = io.StringIO()
    with progress_display(Console(file=told, width=200)) as display:
        display.update(
            Progress(done=40, total=100, errors=0, completion_tokens=80, elapsed_s=2.0, resumed=20)
        )
    assert told.getvalue() == "40/100 rows  40 tokens/s  ETA 0:00:06\n"


def test_no_time_left_is_told_before_there_is_anything_to_tell_it_by() -> None:
    told = io.StringIO()
    with progress_display(Console(file=told, width=200)) as display:
        display.update(
            Progress(done=20, total=100, errors=1, completion_tokens=0, elapsed_s=2.0, resumed=20)
        )
    assert told.getvalue() == "20/100 rows  0 tokens/s  1 errors\n"
