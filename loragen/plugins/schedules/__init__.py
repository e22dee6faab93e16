"""The built-in schedules."""

from loragen import hookimpl


@hookimpl
def loragen_schedules() -> dict[str, str]:
    rates = "loragen.plugins.schedules.rates"
    return {
        "two-stage": f"{rates}:TwoStage",
        "cosine": f"{rates}:Cosine",
        "linear": f"{rates}:Linear",
        "polynomial": f"{rates}:Polynomial",
        "constant": f"{rates}:Constant",
        "wsd": f"{rates}:WarmupStableDecay",
    }
