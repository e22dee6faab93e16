"""The training objectives that ship with loragen, one file each. Light."""

from loragen import hookimpl


@hookimpl
def loragen_objectives() -> dict[str, str]:
    objectives = "loragen.core.learning.objectives"
    return {
        "reconstruction": f"{objectives}.reconstruction:Reconstruction",
        "behaviour": f"{objectives}.behaviour:Behaviour",
        "transfer": f"{objectives}.transfer:Transfer",
    }
