"""Helpers to build plugins that keep or break a contract."""

from pydantic import BaseModel, Field


class Options(BaseModel, extra="forbid"):
    size: int = Field(4, description="Values.")


def variant(base, **attributes):
    """Returns a subclass with these attributes."""
    return type(base.__name__, (base,), attributes)
