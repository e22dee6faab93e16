"""The parameter decoders that ship with loragen."""

from loragen import hookimpl


@hookimpl
def loragen_decoders() -> dict[str, str]:
    return {"hyperconv": "loragen.plugins.decoders.hyperconv:HyperConv"}
