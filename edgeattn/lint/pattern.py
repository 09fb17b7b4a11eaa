"""The pattern language of rules: conditions on a node of a captured graph, written in TOML."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from edgeattn.core import schema

Plain = bool | int | float | str


class Condition(schema.Strict):
    """What an argument or a size has to be; all that is written must hold. Of a list one number is enough.

    A plain value stands for ``{equals = value}``.

    Attributes:
        equals: this value. one_of: one of these. min, max: at least, at most. above, below: more, less.
        given: whether the model says it at all.
    """

    equals: Plain | None = None
    one_of: list[Plain] | None = None
    min: int | float | None = None
    max: int | float | None = None
    above: int | float | None = None
    below: int | float | None = None
    given: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, data: Any) -> Any:
        return {"equals": data} if isinstance(data, bool | int | float | str) else data

    @model_validator(mode="after")
    def _asks(self) -> Condition:
        if not self.model_fields_set:
            raise ValueError("an empty condition asks for nothing")
        return self

    def holds(self, value: Any, given: bool = True) -> bool:
        """Whether ``value`` is so; None is never more or less than anything."""
        if self.given is not None and self.given != (given and value is not None):
            return False
        if not self.model_fields_set - {"given"}:
            return True
        return any(map(self._one, value if isinstance(value, list | tuple) else [value]))

    def _one(self, value: Any) -> bool:
        if self.equals is not None and not _same(value, self.equals):
            return False
        if self.one_of is not None and not any(_same(value, one) for one in self.one_of):
            return False
        if all(bound is None for bound in (self.min, self.max, self.above, self.below)):
            return True
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low = (self.min is None or value >= self.min) and (self.above is None or value > self.above)
        return low and (self.max is None or value <= self.max) and (self.below is None or value < self.below)


def _same(value: Any, wanted: Any) -> bool:
    """Equal, and both truth values or neither: 1 is not True."""
    plain = isinstance(value, bool | int | float | str)
    return plain and isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


class Kind(schema.Strict):
    """What a tensor has to be.

    Attributes:
        rank: its dimensions. dtype: as PyTorch calls it, also with ``*`` and ``?``, or several of them.
        sizes: of dimensions, by axis as text ("1", "-1"). largest: the largest of all.
        constant: computed by the converter once, from parameters and numbers alone.
        dynamic: whether one of its dimensions may vary.
    """

    rank: Condition | None = None
    dtype: str | list[str] | None = None
    sizes: dict[str, Condition] = Field(default_factory=dict)
    largest: Condition | None = None
    constant: bool | None = None
    dynamic: bool | None = None

    @model_validator(mode="after")
    def _axes(self) -> Kind:
        if not self.model_fields_set:
            raise ValueError("nothing is asked of the tensor")
        for axis in self.sizes:
            if not axis.removeprefix("-").isdecimal():
                raise ValueError(f"sizes.{axis}: an axis is a whole number in quotes")
        return self


class Pattern(schema.Strict):
    """What a node has to be; all that is written must hold.

    Attributes:
        op: the operation as aten calls it, without overload (``softmax``), also with ``*`` and ``?``, or several;
            ``input`` is an input of the model, ``output`` in ``after`` the end of its graph.
        args: conditions on its arguments, by the names of its schema; one that the model does not give has its default.
        input, other: what its first and its second tensor have to be. inputs: what one of its tensors has to be.
        output: what the tensor that it gives has to be.
        same: whether all tensors that it reads are one, as in ``x * x``.
        before: something that it reads. after: something that reads it.
        through: what may lie between: ``views``, which change the shape; ``pointwise`` operations too; or ``nothing``.
        unless: what it must not be. any: it has to be one of these, too.
    """

    op: str | list[str] = "*"
    args: dict[str, Condition] = Field(default_factory=dict)
    input: Kind | None = None
    other: Kind | None = None
    inputs: Kind | None = None
    output: Kind | None = None
    same: bool | None = None
    before: Pattern | None = None
    after: Pattern | None = None
    through: Literal["views", "pointwise", "nothing"] = "views"
    unless: Pattern | None = None
    any: list[Pattern] = Field(default_factory=list)

    @model_validator(mode="after")
    def _asks(self) -> Pattern:
        if not self.model_fields_set - {"through"}:
            raise ValueError("a pattern without conditions would be met everywhere")
        return self
