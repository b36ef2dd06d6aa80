"""How well a model predicts a text: what `python sample.py --score FILE` prints.

By the code of train.py's evaluation: windows that begin at documents where they can, each token
scored once, each end of a document as the 13 bytes of <|endoftext|>. So a text's number is the one
that training would log if it were the validation text.
"""

import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from data import formats, tokens
from data.run import machine


def encode_file(path: str, tokenizer) -> np.ndarray:
    """The ids of a text's documents, as training stores them; ValueError if there is no text."""
    if not path or not Path(path).exists():
        raise ValueError(f"--score {path}: no such file; name a UTF-8 text file")
    members = formats.find(Path(path))
    n_bytes = sum(member.path.stat().st_size for member in members)
    pieces = ((text, ends) for _, text, ends in formats.documents(members))
    with tempfile.NamedTemporaryFile(suffix=".ids") as file:
        tokens.write_ids(file, pieces, n_bytes, tokenizer)
        file.flush()
        ids = np.fromfile(file.name, tokenizer.encode_array([]).dtype)
    if len(ids) < 3:  # no more than the ends of no text
        raise ValueError(f"{path} is empty; name a file with text in it")
    return ids


def score(path: str, model, tokenizer, args, train) -> str:
    """A line with the score. train: the module; args: `device` and `dtype` of the flags."""
    ids, length = encode_file(path, tokenizer), model.config.seq_len
    spans = train.windows(ids, tokens.first_id(tokenizer), length)
    data = SimpleNamespace(val_ids=ids, spans=spans, tokenizer=tokenizer)
    dtype = machine.pick_dtype(args.dtype, args.device)
    settings = SimpleNamespace(device=args.device, dtype=dtype)
    found = train.evaluate(model, data, settings, alone=True)
    n_bytes = int(tokens.last_bytes(ids, tokenizer)[-1]) + 1
    nats = found.bits_per_byte * math.log(2)
    of = f"{path}: {len(ids) - 1:,} tokens, {n_bytes:,} bytes, windows of {length}"
    return (
        f"{of}: {found.loss:.4f} nats/token, {nats:.4f} nats/byte, "
        f"{found.bits_per_byte:.4f} bits/byte"
    )
