"""The hooks of the package. loragen imports this module to list plugins, so it must stay light."""

from loragen import hookimpl


@hookimpl
def loragen_schedules() -> dict[str, str]:
    return {"linear-decay": "loragen_example_plugin.linear_decay:LinearDecay"}


@hookimpl
def loragen_decoders() -> dict[str, str]:
    return {"mean-mlp": "loragen_example_plugin.mean_mlp:MeanMLP"}
