"""Registry of quantization schemes; other packages add theirs in the entry point group ``coalora.schemes``."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from coalora.registry import Registry

if TYPE_CHECKING:
    from coalora.quant.scheme import Scheme

SCHEMES: Registry[type[Scheme]] = Registry(
    "quantization scheme",
    "coalora.schemes",
    "coalora.quant.scheme:Scheme",
    {
        "nf": "coalora.quant.nf.scheme:NFScheme",
        "int": "coalora.quant.integer.scheme:IntScheme",
        "gptq": "coalora.quant.gptq.scheme:GPTQScheme",
        "gguf": "coalora.quant.gguf.scheme:GGUFScheme",
        "float": "coalora.quant.float16:FloatScheme",
    },
)


@cache
def get_scheme(name: str) -> Scheme:
    """The scheme of a name, one instance for a process.

    Raises:
        CoaloraError: no such scheme.

    Example:
        >>> from coalora.quant.registry import get_scheme
        >>> len(get_scheme("nf").choices())
        432
    """
    scheme = SCHEMES[name]()
    scheme.name = name  # what configurations and files call it, and what gives it back
    return scheme
