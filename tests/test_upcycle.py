"""A dense model made sparse computes the same until training moves its experts apart."""

import shlex
from pathlib import Path

import pytest
import torch
from conftest import assert_close, import_oracle, random_ids, random_model, small_config
from tiny_run import call

import lamoe
import sample
import train
from bpe import Tokenizer
from data.exchange import export, load, weights_from
from data.run import checkpoint

ROUTERS = shlex.quote(f"{Path(__file__).parent.as_posix()}/routers")  # a folder may have spaces
RUN = "--data text.txt --steps 4 --batch_size 2 --seq_len 16 --dtype fp32 --device cpu".split()


pytestmark = pytest.mark.usefixtures("workplace")


def theirs(kind):
    """A folder of transformers with a tiny random Llama or Qwen3, in which every weight matters."""
    tf = import_oracle("transformers")
    sizes = dict(vocab_size=257, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    sizes |= dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32)
    config = {
        "llama": lambda: tf.LlamaConfig(**sizes),
        "mistral": lambda: tf.MistralConfig(**sizes, sliding_window=None),
        "qwen3": lambda: tf.Qwen3Config(**sizes, head_dim=8),
    }[kind]()
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn_like(weight)
    model.save_pretrained(kind)
    for name, text in tokenizer_files().items():
        (Path(kind) / name).write_text(text, encoding="utf-8")
    return model.eval()


def tokenizer_files():
    from data.foreign import tokenizer_files

    return tokenizer_files(Tokenizer([]))


def ours(ffn=24, **changes):
    """dense.pt, a checkpoint of ours."""
    model = random_model(small_config(vocab_size=257, hidden_dim=ffn, n_experts=1, **changes))
    parts = {"config": vars(model.config), "model": model.state_dict()}
    checkpoint.save("dense.pt", {**parts, "tokenizer": Tokenizer([]).state()})
    return model


def first_losses(*flags):
    """(of the dense model, of what training starts with, in training and in evaluation)."""
    flags = train.presets.parse("", train.TrainConfig, [*map(str, (*RUN, *flags))])
    flags.pop("resume"), flags.pop("plot")
    run = train.set_up(flags, False)
    dense, _ = load(flags["init"])
    inputs, targets = run.data.batches(0, "cpu")
    model = run.model
    losses = [
        dense(inputs, targets).loss,
        *(model.train(on)(inputs, targets).loss for on in (True, False)),
    ]
    return [loss.item() for loss in losses], run.model


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--top_k 1",
        "--router deepseek --n_shared_experts 1",
        "--hidden_dim 12",
        "--hidden_dim 6",
    ],
)
def test_training_starts_at_the_loss_of_the_dense_folder(kind, flags):
    hf = theirs(kind)
    (dense, *sparse), model = first_losses("--init", kind, "--n_experts", 8, *shlex.split(flags))
    assert sparse == pytest.approx([dense, dense], abs=1e-5)
    assert model.config.n_experts == 8 and len(model.sparse_layers) == 2
    ids_BT = random_ids(model.config, 2, 12)
    assert_close(model.eval()(ids_BT).logits, hf(ids_BT).logits, 1e-5)


@pytest.mark.parametrize(
    "flags, top_k, active",
    [
        ("", 2, 2),
        ("--router noisy", 2, 2),
        ("--router deepseek --routed_scale 2.5 --n_groups 4 --top_groups 2", 2, 2),
        ("--hidden_dim 12", 2, 1),  # as wide as the dense model, at no more work per token
        ("--hidden_dim 12 --top_k 4", 4, 2),
        ("--hidden_dim 6 --router deepseek", 4, 1),
        ("--hidden_dim 12 --n_dense_layers 1", 2, 1),
        (f"--router {ROUTERS}/hash_router.py", 2, 2),
        (f"--router {ROUTERS}/top_p.py", 2, 2),
    ],
)
def test_training_starts_at_the_loss_of_our_own_dense_checkpoint(flags, top_k, active):
    ours()
    (dense, *sparse), model = first_losses(
        "--init", "dense.pt", "--n_experts", 8, *shlex.split(flags)
    )
    assert sparse == pytest.approx([dense, dense], abs=1e-5)
    c = model.config
    assert c.top_k == top_k and c.top_k * c.hidden_dim == active * 24


def test_the_logits_are_the_same_for_many_tokens():
    """Slices of one copy score the same, bit for bit: no token gets a half each of two copies."""
    dense = ours(seq_len=512)
    config = small_config(vocab_size=257, hidden_dim=6, n_experts=32, top_k=8, seq_len=512)
    torch.manual_seed(1)
    sparse = lamoe.LaMoE(config)
    sparse.load_state_dict(weights_from(dense, sparse))
    ids_BT = random_ids(config, 16, 512)
    out = sparse.eval()(ids_BT, return_experts=True)
    assert_close(out.logits, dense(ids_BT).logits, 1e-5)
    assert out.experts.unique().numel() == 32  # and routers do tell tokens apart
    copies = out.experts.sort(-1).values // 4
    assert torch.equal(copies[..., ::4].repeat_interleave(4, -1), copies)


def test_it_trains_apart_resumes_writes_text_and_goes_on_as_it_is():
    ours()
    flags = ["--init", "dense.pt", "--n_experts", 4, "--hidden_dim", 12, *RUN]
    assert call(train, *flags, "--out", "run") == 0
    model, _ = load("run/last.pt")
    up = model.blocks[0].ffn.experts.gate_up_proj
    assert not torch.equal(up[0], up[2])  # two copies of a slice
    assert not torch.equal(
        model.blocks[0].ffn.router.weight[0], model.blocks[0].ffn.router.weight[1]
    )
    assert call(train, "--resume", "--out", "run") == 0
    assert call(sample, "a cat", "--model", "run/best.pt", "--max_new_tokens", 3) == 0
    assert call(train, *RUN, "--init", "run/last.pt", "--out", "again") == 0


@pytest.mark.oracle
def test_what_transformers_opens_after_it_equals_what_it_opened_before(tmp_path):
    tf, hf = import_oracle("transformers"), theirs("qwen3")
    assert call(train, *RUN, "--init", "qwen3", "--n_experts", 4, "--lr", 0, "--out", "run") == 0
    model, tokenizer = load("run/best.pt")
    assert model.config.n_experts == 4
    first, _ = load("qwen3")
    fresh = lamoe.LaMoE(model.config)
    fresh.load_state_dict(weights_from(first, fresh))
    export(fresh.eval(), tokenizer, "sparse")
    ids_BT = random_ids(model.config, 2, 12)
    opened = tf.AutoModelForCausalLM.from_pretrained("sparse").eval()
    assert type(opened).__name__ == "Qwen3MoeForCausalLM"
    assert_close(opened(ids_BT).logits, hf(ids_BT).logits, 1e-5)


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--router switch", "router='switch' do not begin as the dense model; try --router topk"),
        (f"--router {ROUTERS}/expert_choice.py", "do not begin as the dense model"),
        ("--router noisy --hidden_dim 6", "do not begin as the dense model"),
        ("--router deepseek --hidden_dim 6 --n_experts 12 --n_groups 2", "do not begin as"),
        ("--hidden_dim 7", "--hidden_dim 7 does not divide the 24 hidden units of dense.pt"),
        (
            "--hidden_dim 48",
            "--hidden_dim 48 does not divide the 24 hidden units of dense.pt; leave ",
        ),
        ("--hidden_dim 9", "leave it out, or try --hidden_dim 12"),
        ("--hidden_dim 8", "--n_experts 8 is no multiple of 3: experts of 8 hidden units are 3"),
        ("--hidden_dim 12 --top_k 3", "--top_k 3 is no multiple of 2: experts of 12 hidden"),
        ("--n_dense_layers 1", "1 dense layers of top_k x hidden_dim hidden units are not the 24"),
        ("--n_dense_layers 2", "--n_dense_layers 2 leaves no experts; leave it out"),
        ("--dim 32", "--dim 32 differs from the 16 of dense.pt"),
    ],
)
def test_what_would_not_begin_as_the_dense_model_is_refused_in_one_line(flags, told, capsys):
    ours()
    line = ["--init", "dense.pt", "--n_experts", 8, *RUN, *shlex.split(flags), "--out", "run"]
    assert call(train, *line) == 2
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == 1 and told in printed[0], printed
    assert not Path("run").exists()


def test_the_width_that_a_remedy_names_divides(capsys):
    ours(ffn=9)
    for width, remedy in ((4, 3), (0, 3), (9 * 9, 3)):
        line = ["--init", "dense.pt", "--n_experts", 9, *RUN, "--hidden_dim", width]
        assert call(train, *line, "--out", "run") == 2
        assert f"try --hidden_dim {remedy}\n" in capsys.readouterr().err
