"""The built-in schedules."""

from loragen import hookimpl


@hookimpl
def loragen_schedules() -> dict[str, str]:
    return {
        "two-stage": "loragen.plugins.schedules.two_stage:TwoStage",
        "cosine": "loragen.plugins.schedules.standard:Cosine",
        "linear": "loragen.plugins.schedules.standard:Linear",
        "constant": "loragen.plugins.schedules.standard:Constant",
    }
