"""Plugins that keep or break a promise are made of these."""

from pydantic import BaseModel, Field


class Options(BaseModel, extra="forbid"):
    size: int = Field(4, description="Values.")


def variant(base, **attributes):
    """The same class but for these attributes."""
    return type(base.__name__, (base,), attributes)
