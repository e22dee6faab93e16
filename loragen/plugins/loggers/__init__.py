"""The built-in loggers."""

from loragen import hookimpl


@hookimpl
def loragen_loggers() -> dict[str, str]:
    loggers = "loragen.plugins.loggers"
    return {
        "csv": f"{loggers}.csv:Csv",
        "mlflow": f"{loggers}.mlflow:MLflow",
        "swanlab": f"{loggers}.swanlab:SwanLab",
        "tensorboard": f"{loggers}.tensorboard:TensorBoard",
        "trackio": f"{loggers}.trackio:Trackio",
        "wandb": f"{loggers}.wandb:WandB",
    }
