"""The parameter decoders that ship with loragen."""

from loragen import hookimpl


@hookimpl
def loragen_decoders() -> dict[str, str]:
    decoders = "loragen.plugins.decoders"
    return {
        "hyperconv": f"{decoders}.hyperconv:HyperConv",
        "mixture": f"{decoders}.mixture:Mixture",
        "neighbours": f"{decoders}.neighbours:Neighbours",
    }
