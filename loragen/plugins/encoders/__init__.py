"""The built-in encoders."""

from loragen import hookimpl


@hookimpl
def loragen_encoders() -> dict[str, str]:
    return {"sbert": "loragen.plugins.encoders.sbert:SentenceBert"}
