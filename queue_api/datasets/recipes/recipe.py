"""Recipe: what a recipe file says, checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictStr,
    model_validator,
)

from queue_api.datasets.formats.output_columns import OUTPUT_COLUMNS
from queue_api.datasets.formats.output_options import OutputOptions
from queue_api.datasets.layout.layout import Layout
from queue_api.datasets.row_selection import RowSelection
from queue_api.wire.errors import ConfigurationError
from queue_api.wire.sampling import SamplingParams

__all__ = ["Checks", "Recipe", "RecipeStage"]

DEFAULT_REASON = (
    "That answer can't be used: {{ reason }}. Answer again, and only with what was asked for."
)


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names = Annotated[list[StrictStr], BeforeValidator(_as_list), Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Checks(_Part):
    """What a text has to be to be valid; all that is given has to hold."""

    regex: StrictStr | None = None
    """Found anywhere in the text, unless it says ^ and $."""
    one_of: Annotated[list[StrictStr], Field(min_length=1)] | None = None
    """What the text is, blanks around it aside."""
    min_length: Annotated[int, Field(ge=0)] | None = None
    """In characters."""
    max_length: Annotated[int, Field(ge=1)] | None = None
    json_schema: dict[str, Any] | None = None
    """The text is JSON, and that is valid by it."""
    function: Names | None = None
    """Python functions: `package.module:name`, or the name of an entry point in the group
    `batchmill_validators`."""


class _Where(_Part):
    """Where prompts are, as the command line's options say it."""

    prompt_column: StrictStr | None = None
    messages_column: StrictStr | None = None
    template: StrictStr | None = None
    system: StrictStr | None = None
    chat: bool = False
    """A prompt becomes the user's turn of a chat."""


class _Engine(_Part):
    """What answers."""

    model: StrictStr | None = None
    engine: dict[str, Any] = Field(default_factory=dict)
    """The workers' settings: stages, dtype, max_num_seqs, …"""
    workers: Annotated[int, Field(ge=0)] | None = None
    queue: StrictStr | None = None
    """Of workers that run already; `workers` is 0 then."""
    sampling: SamplingParams = SamplingParams()

    @model_validator(mode="after")
    def _has_one_engine(self) -> Self:
        if self.queue is not None and (self.workers or self.model or self.engine):
            raise ValueError(
                "workers that serve 'queue' have their model: leave 'model', 'engine' and "
                "'workers' out"
            )
        return self


class RecipeStage(_Where, _Engine):
    """One question put to each row."""

    name: Annotated[StrictStr, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]
    """Later templates have the text under it, and so has the output."""
    when: StrictStr | None = None
    """A Jinja expression over the columns: rows of which it isn't true aren't asked."""
    checks: Checks | None = Field(default=None, alias="validate")
    """Makes the columns `<name>_valid`, `<name>_invalid` and `<name>_attempts`."""
    repair: Annotated[int, Field(ge=0, le=10)] = 0
    """How often an invalid text is asked for again, with the reason."""
    repair_message: StrictStr = DEFAULT_REASON
    """What is said then: a template over the columns and `reason`."""
    best: Literal["first", "longest", "shortest", "vote"] = "first"
    """Which of several samples (`n`) is the text; valid ones go before others. `vote` takes the one
    that most are equal to, blanks around them aside."""
    picks: StrictStr | None = None
    """The name of an earlier stage with several samples: the first number in this stage's text says
    which of them it is, from 1."""
    keep: StrictStr | None = None
    """A Jinja expression over the columns: rows of which it isn't true are left out from here."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        given = [n for n in ("prompt_column", "messages_column", "template") if getattr(self, n)]
        if len(given) > 1:
            raise ValueError(f"give {given[0]} or {given[1]}, not both")
        if self.repair and self.checks is None:
            raise ValueError("'repair' needs 'validate', which says what is invalid")
        if self.repair and self.sampling.n > 1:
            raise ValueError("'repair' is of stages with one sample (n: 1)")
        for name in self.columns:
            if name in OUTPUT_COLUMNS or name == "id":
                raise ValueError(f"{name!r} is a column of every output: name the stage otherwise")
        return self

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that it adds."""
        names = [self.name]
        if self.sampling.n > 1:
            names.append(f"{self.name}_texts")
        if self.checks is not None:
            names += [f"{self.name}_{what}" for what in ("valid", "invalid", "attempts")]
        if self.picks is not None:
            names.append(f"{self.picks}_picked")
        return tuple(names)

    @property
    def layout(self) -> Layout:
        """Where its prompts are. No column comes back, so that a row is made anew only if what it
        is asked is another."""
        return Layout(
            prompt_column=self.prompt_column,
            messages_column=self.messages_column,
            template=self.template,
            system=self.system,
            chat=self.chat,
            select=(),
        )


class _Rows(_Part):
    """Which rows are asked for."""

    limit: int | None = None
    sample: int | None = None
    sample_percent: float | None = None
    seed: int = 0

    @property
    def selection(self) -> RowSelection:
        """The same, for an input."""
        return RowSelection(**self.model_dump())


class Recipe(_Engine):
    """Stages over the rows of an input."""

    inputs: Names = Field(alias="in")
    format: StrictStr | None = None
    """Of the input; None: its content tells."""
    output: StrictStr = Field(alias="out")
    output_format: Literal["jsonl", "parquet", "datasets"] | None = None
    errors: StrictStr | None = None
    """A file for the rows with an error."""
    rows: _Rows = _Rows()
    select: list[StrictStr] | None = None
    rename: dict[StrictStr, StrictStr] = Field(default_factory=dict)
    drop: list[StrictStr] = Field(default_factory=list)
    stages: Annotated[list[RecipeStage], Field(min_length=1, max_length=50)]

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.sampling.n > 1:
            raise ValueError("several samples are of one stage: write 'n' into its own 'sampling'")
        seen: dict[str, RecipeStage] = {}
        columns = set[str]()
        for stage in self.stages:
            if both := columns & {*stage.columns}:
                raise ValueError(f"two stages make a column {min(both)!r}")
            columns |= {*stage.columns}
            if stage.picks is not None:
                picked = seen.get(stage.picks)
                if picked is None or picked.sampling.n < 2:
                    raise ValueError(
                        f"stage {stage.name!r} picks {stage.picks!r}: name an earlier stage of "
                        "which sampling asks for several (n: 4)"
                    )
            seen[stage.name] = stage
        if self.output == "-" or "://" in self.output:
            raise ValueError("'out' has to be a file or folder here, beside which stages are kept")
        try:
            self.layout, self.outputs, self.rows.selection  # noqa: B018 - are they possible?
            for stage in self.stages:
                stage.layout  # noqa: B018
        except ConfigurationError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def layout(self) -> Layout:
        """Which columns of the input come back."""
        return Layout(select=self.select, rename=self.rename, drop=self.drop)

    @property
    def outputs(self) -> OutputOptions:
        """How the output is written."""
        return OutputOptions(format=self.output_format, errors=self.errors)

    def sampling_of(self, stage: RecipeStage) -> SamplingParams:
        """A stage's sampling: its own fields, then the recipe's."""
        given = self.sampling.model_dump(exclude_unset=True)
        return SamplingParams(**given | stage.sampling.model_dump(exclude_unset=True))
