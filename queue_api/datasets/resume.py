"""What of an output stands when a run goes on, and what is to be made again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from queue_api.datasets.columns import RowParser
from queue_api.datasets.formats.maker import Maker
from queue_api.datasets.formats.output_columns import OUTPUT_COLUMNS
from queue_api.datasets.formats.record import Record
from queue_api.datasets.formats.row_sink import RowSink
from queue_api.store.bitmap import Bitmap
from queue_api.wire.errors import DatasetError

__all__ = [
    "changed_rows",
    "check_chosen",
    "check_makers",
    "no_such_row",
    "other_model",
    "other_row",
]

WAYS_OUT = (
    "--redo changed (--redo-changed) takes such rows out and makes them anew, or choose another "
    "output file"
)


def changed_rows(
    records: Iterable[Record], parser: RowParser, sink: RowSink, *, redo: bool
) -> Bitmap:
    """The rows of the output that the input, as it is now, wouldn't make; reads all of it.

    Those with an error are always made again: it was put right, and no text is lost.

    :raises DatasetError: there are others and they aren't to be made again
    """
    changed, index = Bitmap(), 0
    for record in records:
        if index >= sink.end:
            return changed
        if sink.has_other(index, parser.fingerprint(record)):
            if not redo and not sink.has_error(index):
                raise other_row(sink, index, parser.shown(record))
            changed.add(index)
        index += 1
    for row in range(index, sink.end):
        if row in sink:
            if not redo and not sink.has_error(row):
                raise no_such_row(row, index)
            changed.add(row)
    return changed


def check_chosen(changed: Bitmap, sink: RowSink, is_chosen: Callable[[int], bool]) -> None:
    """See that all rows that changed are among those that are asked for now.

    :raises DatasetError: one isn't: nobody would make it anew
    """
    if not len(changed):
        return
    for row in range(sink.end):
        if row in changed and not is_chosen(row):
            raise DatasetError(
                f"row {row} of the output belongs to another input or other options, and isn't "
                "among the rows that are chosen now: make it anew without --limit and --sample, or "
                "choose another output file"
            )


def other_row(sink: RowSink, index: int, columns: Mapping[str, object]) -> DatasetError:
    """What to say of a row of the output that was made of something else.

    :param columns: those that would come back now
    """
    written = sink.find(index)
    if written is not None and not written.has_input:
        what = "was made with other options or columns"
    elif written is None or not written.fingerprint:
        what = "doesn't say what it was made of (it has no 'fingerprint')"
    else:
        what = _difference(columns, written.columns)
    return DatasetError(
        f"the output belongs to another input or other options: its row {index} {what}; {WAYS_OUT}"
    )


def _difference(columns: Mapping[str, object], written: Mapping[str, object]) -> str:
    of_input = (name for name in written if name not in OUTPUT_COLUMNS and name not in columns)
    for name in [*columns, *of_input]:
        was, now = written.get(name), columns.get(name)
        if name == "id" and now is None:
            continue  # the default one
        if was is not None and name not in columns and not name.startswith("input_"):
            return f"was made with a column {name!r}, which the input's hasn't"
        if was is None and now is not None and name not in written:
            return f"was made without the column {name!r}, which the input's has"
        if str(was) != str(now):
            return f"has {was!r:.60} as {name!r}, the input's has {now!r:.60}"
    return "was made with other options or columns"


def no_such_row(row: int, total: int) -> DatasetError:
    """What to say of a row of the output that the input doesn't have."""
    return DatasetError(
        f"the output belongs to another input: it has a row {row}, counted from 0, and the input "
        f"has {total} rows; {WAYS_OUT}"
    )


def check_makers(sink: RowSink, now: Collection[Maker], *, redo: bool) -> set[int]:
    """The rows of the output that other models made than the workers have now.

    :param now: those of the workers; empty if none is there
    :raises DatasetError: there are such rows and they aren't to be made again
    """
    others = sink.makers - set(now) if now else set()
    if not others:
        return set()
    if redo:
        return {row for row in range(sink.end) if row in sink and sink.maker(row) in others}
    raise other_model(others, now)


def other_model(written: Collection[Maker], now: Collection[Maker]) -> DatasetError:
    """What to say of an output whose rows another model made."""
    return DatasetError(
        f"rows of the output were made by {_shown(written)}, the workers have {_shown(now)}; "
        f"{WAYS_OUT}"
    )


def _shown(makers: Collection[Maker]) -> str:
    return " and ".join(sorted(map(str, makers)))
