"""Models in other people's formats, in and out.

    from data.exchange import load, export

    model, tokenizer = load("runs/stories/best.pt")  # or a Hugging Face folder
    export(model, tokenizer, "my-model")

Both are functions here, and modules under the same names.
"""

from data.exchange.export import export
from data.exchange.load import load
from data.exchange.upcycle import weights_from

__all__ = ["export", "load", "weights_from"]
