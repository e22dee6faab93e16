"""The built-in encoders."""

from loragen import hookimpl


@hookimpl
def loragen_encoders() -> dict[str, str]:
    encoders = "loragen.plugins.encoders"
    return {
        "hashing": f"{encoders}.hashing:Hashing",
        "sbert": f"{encoders}.sbert:SentenceBert",
        "transformers": f"{encoders}.transformers:Transformers",
    }
