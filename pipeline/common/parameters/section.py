"""What every section of params.yaml is."""

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Every key is required, of exactly its type, and no other is accepted: params.yaml hides no default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise AttributeError(f"parameter {name!r} is read but not declared: add it to the stage in dvc.yaml")
            return super().__getattr__(name)
