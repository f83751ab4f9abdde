"""Progress bars of other packages, switched off by their variables: commands have lines of their own.

For processes of our own commands and flows; whoever imports the library keeps them.
"""

import os

# transformers and huggingface_hub; tqdm's own, which transformers uses to read GGUF. Read once, at their import.
_VARIABLES = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1"}


def be_quiet() -> None:
    """Set the variables that the user has not set; child processes inherit them."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
