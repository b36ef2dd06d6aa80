"""Seeing experts: where the routers of a model send each token of a text.

What `python sample.py --show_experts` prints: the text, each token in the colour of its first
expert (the one that counts most), and tables of which expert comes first for what. With
`--html FILE` the text is also a page for a browser.
"""

import codecs
import json
import math
import os
import random
import shutil
import string
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import bpe
from data import formats
from data.run.files import write_text

# --- 1. Which experts a text goes to --------------------------------------------------------------


class RoutedText(NamedTuple):
    """A text and where the model sent each of its tokens."""

    source: str  # its file, or "text 1"
    ids: list[int]
    pieces: list[str]  # the text of each token; a character of several comes with the last of them
    experts_LTA: Tensor  # L layers that have experts; the first of A is the one that counts most
    weights_LTA: Tensor
    n_prompt: int = 0  # so many of the tokens were given, and the others written by the model


@torch.inference_mode()
def route(model, tokenizer, source: str, ids: list[int], n_prompt: int = 0) -> RoutedText:
    """Reads ids window by window; each window is read without the one before it."""
    pairs, decoder = [], codecs.getincrementaldecoder("utf-8")("replace")
    ids_1T = torch.tensor([ids], device=model.embed.weight.device)
    for window_1T in ids_1T.split(model.config.seq_len, dim=1):
        out = model(window_1T, return_experts=True)
        # Any router's experts, in whatever order it gave them, and however many.
        weights_LTA, order_LTA = out.expert_weights[:, 0].sort(descending=True, stable=True)
        pairs.append((out.experts[:, 0].gather(-1, order_LTA).cpu(), weights_LTA.cpu()))
    A = max(weights_LTA.shape[-1] for _, weights_LTA in pairs)
    padded = (tuple(F.pad(x_LTA, (0, A - x_LTA.shape[-1])) for x_LTA in pair) for pair in pairs)
    experts_LTA, weights_LTA = (torch.cat(parts, 1) for parts in zip(*padded, strict=True))
    pieces = [decoder.decode(tokenizer.decode_bytes([i])) for i in ids]
    pieces[-1] += decoder.decode(b"", final=True)
    return RoutedText(source, ids, pieces, experts_LTA, weights_LTA, n_prompt)


def read_ids(path: str, tokenizer, most: int = 100_000) -> list[int]:
    """The ids of a UTF-8 file, each document as after `start`; of a long file the first."""
    if not Path(path).exists() or Path(path).is_dir():
        raise ValueError(f"--text {path}: no such file; name a UTF-8 text file")
    ids, before = [], tokenizer.start or [tokenizer.eot]
    for _, text, _ in formats.documents(formats.find(Path(path))):
        ids += [*before, *tokenizer.encode(text)]
        if len(ids) > most:
            print(f"[{path}: the first {most:,} tokens]", file=sys.stderr)
            break
    if set(ids) <= {*before}:
        raise ValueError(f"{path} is empty; name a file with text in it")
    return ids[:most]


def layers_to_show(model, layer: int | None) -> dict[int, int]:
    """{row of `Output.experts`: number of the layer} of all layers with experts, or of one."""
    sparse = model.sparse_layers
    if not sparse:
        raise ValueError("this model is dense, without experts; python train.py makes one with")
    if layer is not None and layer not in sparse:
        raise ValueError(
            f"--layer {layer} has no experts; give one from {sparse[0]} to {sparse[-1]}"
        )
    return {row: i for row, i in enumerate(sparse) if layer in (None, i)}


def check(model, args) -> None:
    """ValueError if `show` could not do what sample.py's arguments ask for."""
    layers_to_show(model, args.layer)
    if args.html:
        check_page(args.html)


def show(named: list[tuple[str, list[int]]], model, tokenizer, args, n_prompt: int = 0) -> None:
    """Prints the experts of each (source, ids), and writes the page if there is to be one.

    args: sample.py's, of which layer, html and model count. n_prompt: see RoutedText.
    """
    texts = [route(model, tokenizer, source, ids, n_prompt) for source, ids in named]
    config, layers = model.config, layers_to_show(model, args.layer)
    for text in texts:
        print_text(text, config.n_experts, layers)
    print_tables(texts, config, tokenizer, layers)
    if args.html:
        all_layers = layers_to_show(model, None)
        page = make_page(texts, config, all_layers, min(layers), f"{args.model}")
        write_text(args.html, page)
        print(f"[{args.html}: open it in a browser]", file=sys.stderr)


# --- 2. As tables ---------------------------------------------------------------------------------


def kind_of(token: str) -> str:
    """By its first character that is no space; half a character and <|endoftext|> are `other`.

    >>> [kind_of(token) for token in (" the", "\\n", "7", ", ", "\\ufffd")]
    ['letter', 'space', 'digit', 'punctuation', 'other']
    """
    first = token.strip()[:1] or " "
    if first in string.punctuation and token != bpe.SPECIAL:
        return "punctuation"
    names = {"L": "letter", "N": "digit", "P": "punctuation", "Z": "space"}
    return names.get(unicodedata.category(first)[0], "other")


def entropy(symbols) -> float:
    """-sum p log2 p [bits] of the counted shares p, and (K - 1) / 2N nats.

    A sample of N looks more regular than its source of K symbols, by that much (Miller 1955).
    """
    counts = Counter(symbols).values()
    n = sum(counts)
    bits = -sum(count / n * math.log2(count / n) for count in counts)
    return bits + (len(counts) - 1) / (2 * n * math.log(2))


def mutual_information(xs, ys) -> float:
    """H(X) + H(Y) - H(X, Y): how many bits of x one knows from y.

    >>> x, same, independent = "aabb" * 1000, "ccdd" * 1000, "cdcd" * 1000
    >>> f"{mutual_information(x, same):.2f} {mutual_information(x, independent):.2f}"
    '1.00 -0.00'
    """
    return entropy(xs) + entropy(ys) - entropy(zip(xs, ys, strict=True))


def labels_of(texts: list[RoutedText], tokenizer, seq_len: int) -> dict[str, list]:
    """What may tell the expert: for each name, a label of every token of all texts."""
    ids = [i for text in texts for i in text.ids]
    kinds = {i: kind_of(tokenizer.decode([i])) for i in set(ids)}
    quarters = [f"quarter {4 * t // seq_len + 1}" for t in range(seq_len)]
    positions = ["first position", *quarters[1:]]
    labels = {
        "token": ids,
        "kind": [kinds[i] for i in ids],
        "position": [positions[t % seq_len] for text in texts for t in range(len(text.ids))],
    }
    if len(texts) > 1:
        labels["source"] = [text.source for text in texts for _ in text.ids]
    return labels


def print_tables(texts: list[RoutedText], config, tokenizer, layers: dict[int, int]) -> None:
    """Which expert comes first for what, and how many bits of that choice each thing tells."""
    known, summary, chance = labels_of(texts, tokenizer, config.seq_len), [], random.Random(0)
    for row, layer in layers.items():
        firsts = [e for text in texts for e in text.experts_LTA[row, :, 0].tolist()]
        print_shares(f"layer {layer}", firsts, known, config.n_experts)
        summary.append(f"{f'layer {layer}':10}{entropy(firsts):8.2f}")
        shuffled = chance.sample(firsts, len(firsts))
        for labels in known.values():
            told = (mutual_information(es, labels) for es in (firsts, shuffled))
            bits, by_chance = (round(bits, 2) + 0.0 for bits in told)  # + 0.0: no "-0.00"
            summary[-1] += f"{bits:9.2f} ({by_chance:5.2f})"
    print("\nbits of the first expert: all, and those told by (in brackets: the same, shuffled)")
    print(f"{'all':>18}" + "".join(f"{name:>17}" for name in known), *summary, sep="\n")


def print_shares(title: str, firsts: list[int], known: dict[str, list], n_experts: int) -> None:
    """A row per label: how many tokens have it, and the share of each first expert among them."""
    busiest = sorted(e for e, _ in Counter([*range(n_experts), *firsts]).most_common(12))
    some = f" (the 12 busiest of {n_experts})" if n_experts > 12 else ""
    print(f"\n{title:20}  tokens   % with this first expert{some}")
    print(f"{'':28}" + "".join(f"{e:6}" for e in busiest))
    everything = ["all"] * len(firsts)
    for labels in (everything, *(known[name] for name in known if name != "token")):
        counts, totals = Counter(zip(labels, firsts, strict=True)), Counter(labels)
        for label in sorted(totals):
            shares = "".join(f"{100 * counts[label, e] / totals[label]:6.1f}" for e in busiest)
            print(f"{label[-20:]:20}{totals[label]:8,}{shares}")


# --- 3. In the terminal ---------------------------------------------------------------------------

# Nine colours that colour-blind eyes tell apart, for dark text (Paul Tol, scheme "light"), and the
# nearest of a terminal's 256. The tenth expert begins again, with its number or a line to tell.
PALETTE = "#77aadd #ee8866 #eedd88 #44bb99 #ffaabb #99ddff #bbcc33 #aaaa00 #dddddd".split()
TERMINAL = (110, 209, 222, 72, 217, 117, 149, 142, 253)


def colour(text: str, expert: int) -> str:
    """Black on the expert's colour, to be read on dark and on light terminals."""
    return f"\x1b[38;5;16;48;5;{TERMINAL[expert % len(TERMINAL)]}m{text}\x1b[0m"


def paint(pieces: list[str], experts: list[int], n_experts: int, colours: bool, width: int) -> str:
    """The text in lines, each token on its expert's colour, or with its expert's number below it.

    >>> print(paint(["Once", ",", " upon"], [3, 0, 12], 16, False, 80))  # numbers read downwards
    Once, upon
    0   01
    3   02
    """
    digits = len(str(n_experts - 1)) if not colours or n_experts > len(PALETTE) else 0
    lines, column = [""] * (1 + digits), 0  # the last lines: text, and a line per digit
    for piece, e in zip(pieces, experts, strict=True):
        shown = "".join(c if c.isprintable() else " " for c in piece)  # no escape codes of its own
        cells = sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in shown)
        if column and column + cells > width:
            lines, column = lines + [""] * (1 + digits), 0
        lines[-1 - digits] += colour(shown, e) if colours else shown
        for d in range(digits if cells else 0):
            lines[d - digits] += f"{e:0{digits}}"[d].ljust(cells)
        column += width if "\n" in piece else cells
    return "\n".join(line.rstrip() for line in lines)


def print_text(text: RoutedText, n_experts: int, layers: dict[int, int], most: int = 500) -> None:
    """Coloured where the terminal has colours (https://no-color.org), with numbers elsewhere."""
    if os.name == "nt":
        os.system("")  # makes older Windows consoles obey colour codes
    colours = sys.stdout.isatty() and not os.getenv("NO_COLOR") and os.getenv("TERM") != "dumb"
    width = min(100, shutil.get_terminal_size().columns)
    for row, layer in layers.items():
        print(f"\nlayer {layer}: {text.source}{cut_note(text, most)}")
        experts = text.experts_LTA[row, :most, 0].tolist()
        print(paint(text.pieces[:most], experts, n_experts, colours, width))
    legend = [colour(f" {e} ", e) for e in range(n_experts)] if colours else ["see below it"]
    print("\nfirst expert of a token:", *legend)


def cut_note(text: RoutedText, most: int) -> str:
    n = len(text.ids)
    return f", the first {most:,} of {n:,} tokens" if n > most else ""


# --- 4. As a page ---------------------------------------------------------------------------------

PAGE = Path(__file__).with_name("experts.html")  # DATA in it stands for the JSON of make_page


def check_page(path: str) -> None:
    """ValueError unless a page can be written there: a new file, or over an older page of ours."""
    target, opening = Path(path), b"".join(PAGE.read_bytes().splitlines(True)[:2])  # its author
    if not target.parent.is_dir():
        raise ValueError(f"--html {path}: there is no folder {target.parent}; make it first")
    is_ours = target.is_file() and target.read_bytes().startswith(opening)
    if target.exists() and not is_ours:
        raise ValueError(f"--html {path} is there and is no page of sample.py; give another name")


def make_page(
    texts: list[RoutedText], c, layers: dict[int, int], start: int, model="", most=10_000
):
    """HTML in ASCII, of all layers; the browser shows that of row `start` first.

    c: the model's config; model: its name.
    """
    names, shown = ("text", "id", "position", "experts", "weights"), []
    for text in texts:
        experts_TLA = text.experts_LTA[:, :most].transpose(0, 1).tolist()
        weights_TLA = text.weights_LTA[:, :most].double().round(decimals=3).transpose(0, 1).tolist()
        positions = [t % c.seq_len for t in range(len(experts_TLA))]
        columns = zip(text.pieces, text.ids, positions, experts_TLA, weights_TLA, strict=False)
        tokens = [dict(zip(names, column, strict=True)) for column in columns]
        source = text.source + cut_note(text, most)
        shown.append({"source": source, "n_prompt": text.n_prompt, "tokens": tokens})
    router = f"{c.n_experts} experts a layer, {c.n_active} for each token, router {c.router}"
    about = f"{model}: {c.n_layers} layers, {router}."
    data = {"about": about, "n_experts": c.n_experts, "palette": PALETTE}
    data["layers"] = [*layers.values()]
    # Without a "<" no text can end the script that the data is in.
    safe = json.dumps({**data, "start": start, "texts": shown}).replace("<", "\\u003c")
    return PAGE.read_text(encoding="ascii").replace("DATA", safe)
