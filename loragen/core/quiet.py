"""Other libraries' banners, tips and progress bars do not belong among our lines."""

import logging
import os
import warnings

NOISY = (
    "lightning.pytorch",
    "lightning.fabric",
    "transformers",
    "sentence_transformers",
    "peft",
    "huggingface_hub",
)


def quiet_libraries() -> None:
    """Errors still show. Call before the first import of lightning or transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked workers would deadlock
    warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\).*")
    warnings.filterwarnings("ignore", message=r".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", module=r"lightning\..*")
    for name in NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # theirs
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # theirs
