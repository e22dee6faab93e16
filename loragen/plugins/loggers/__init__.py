"""The built-in loggers."""

from loragen import hookimpl


@hookimpl
def loragen_loggers() -> dict[str, str]:
    return {
        "swanlab": "loragen.plugins.loggers.swanlab:SwanLab",
        "tensorboard": "loragen.plugins.loggers.tensorboard:TensorBoard",
    }
