"""Whether the Hugging Face hub can be asked: one short look, since its libraries retry for half a
minute and more on a machine without network."""

import errno
import os
import socket
from functools import cache
from http.client import HTTPException
from urllib.request import Request, urlopen

SECONDS_TO_ANSWER = 10
SILENT = (socket.gaierror, ConnectionError, TimeoutError, HTTPException)
UNREACHABLE = (errno.ENETUNREACH, errno.EHOSTUNREACH)


@cache
def silence() -> str | None:
    """Why the hub cannot be asked, and what to do; None where it answers or is not to be asked."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_OFFLINE

    if HF_HUB_OFFLINE:
        return None
    try:
        urlopen(Request(ENDPOINT, method="HEAD"), timeout=SECONDS_TO_ANSWER).close()
    except ValueError:
        return f"HF_ENDPOINT {ENDPOINT} is no address: it begins with https://"
    except (OSError, HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, SILENT) or getattr(reason, "errno", None) in UNREACHABLE:
            mirror = "" if os.environ.get("HF_ENDPOINT") else "HF_ENDPOINT names a mirror, "
            return (
                f"{ENDPOINT} does not answer ({reason}); "
                f"{mirror}HF_HUB_OFFLINE=1 reads what was downloaded before"
            )
    return None
