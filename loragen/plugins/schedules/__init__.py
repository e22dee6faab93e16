"""The schedules that ship with loragen."""

from loragen import hookimpl


@hookimpl
def loragen_schedules() -> dict[str, str]:
    return {
        "two-stage": "loragen.plugins.schedules.two_stage:TwoStage",
        "cosine": "loragen.plugins.schedules.decay:Cosine",
        "linear": "loragen.plugins.schedules.decay:Linear",
        "constant": "loragen.plugins.schedules.constant:Constant",
    }
