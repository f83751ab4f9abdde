"""Variables of the processes of our own commands and flows; whoever imports the library keeps what is set there."""

import os

_VARIABLES = {
    # Progress bars: commands have lines of their own. transformers and huggingface_hub; tqdm's own, which transformers
    # uses to read GGUF.
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    # How long torch's threads spin for one another. Where other programs keep the cores busy, GCC's default of 300,000
    # spins through whole time slices: beside one such program, Cholesky factors and small products on two cores took
    # 6 to 24 s, with 3,000 about 1 s. Alone there is no difference (with 0, models take 1.3 to 1.6 times as long).
    "GOMP_SPINCOUNT": "3000",
}


def set_variables() -> None:
    """Set what the user has not set, before the packages that read it are imported; child processes inherit it."""
    for name, value in _VARIABLES.items():
        os.environ.setdefault(name, value)
