"""The built-in schedules."""

from loragen import hookimpl


@hookimpl
def loragen_schedules() -> dict[str, str]:
    return {
        "two-stage": "loragen.plugins.schedules.rates:TwoStage",
        "cosine": "loragen.plugins.schedules.rates:Cosine",
        "linear": "loragen.plugins.schedules.rates:Linear",
        "constant": "loragen.plugins.schedules.rates:Constant",
    }
