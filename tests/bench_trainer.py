"""Trains an export further with transformers' Trainer, and measures here what comes back.

    python tests/bench_trainer.py CHECKPOINT FILE [--steps 200] [--batch_size 16] [--lr 1e-3]

Once as config.json asks, with the balance loss, and once without it. Printed are the bits per byte
of the last tenth of FILE, and how evenly its tokens go to the experts. Needs accelerate, too.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train  # noqa: E402
from data.exchange import export, load  # noqa: E402
from data.run import scoring  # noqa: E402


def windows_of(path: Path, tokenizer, length: int) -> list[dict]:
    ids = torch.from_numpy(scoring.encode_file(path, tokenizer).astype("int64"))
    rows = ids[: len(ids) // length * length].view(-1, length)
    return [{"input_ids": row, "labels": row} for row in rows]


def train_there(folder: Path, out: Path, windows: list[dict], args, balanced: bool) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.config.output_router_logits = balanced
    settings = transformers.TrainingArguments(
        output_dir=out / "work", max_steps=args.steps, per_device_train_batch_size=args.batch_size,
        learning_rate=args.lr, report_to=[], save_strategy="no", logging_strategy="no",
        disable_tqdm=True, use_cpu=True, seed=0,
    )  # fmt: skip
    transformers.Trainer(model, settings, train_dataset=windows).train()
    model.config.output_router_logits = True
    model.save_pretrained(out)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(out)


@torch.no_grad()
def describe(name: str, folder: Path, windows: list[dict], text: Path) -> None:
    """Prints the score, and of the layer with the worst balance the load of its experts."""
    model, tokenizer = load(folder)
    batches = torch.stack([window["input_ids"] for window in windows]).split(16)
    load_LE = torch.stack([model(ids).load for ids in batches]).mean(0) * model.config.n_experts
    args = SimpleNamespace(device="cpu", dtype="fp32")
    line = scoring.score(text, model, tokenizer, args, train).rsplit(",", 1)[1]
    busiest, dead = load_LE.max(), int((load_LE < 0.01).sum())
    print(f"{name:26}{line}, busiest expert {busiest:.2f} times the mean, {dead} dead", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    model, tokenizer = load(args.checkpoint)
    with tempfile.TemporaryDirectory() as work:
        folder, text = Path(work), Path(args.file).read_text(encoding="utf-8")
        cut, sides = len(text) * 9 // 10, []
        for name, part in (("training", text[:cut]), ("held out", text[cut:])):
            (folder / name).write_text(part, encoding="utf-8")
            sides.append(windows_of(folder / name, tokenizer, model.config.seq_len))
        export(model, tokenizer, folder / "export")
        config = json.loads((folder / "export/config.json").read_text())
        print(
            f"{config['architectures'][0]}, router_aux_loss_coef {config['router_aux_loss_coef']}"
        )
        describe("as exported", folder / "export", sides[1], folder / "held out")
        for name, balanced in (("with balance loss", True), ("without", False)):
            train_there(folder / "export", folder / name, sides[0], args, balanced)
            describe(f"{args.steps} steps {name}", folder / name, sides[1], folder / "held out")


if __name__ == "__main__":
    main()
