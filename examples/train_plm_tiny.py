"""Train a small PLM on Python's own documentation: ``python examples/train_plm_tiny.py``.

Minutes on two idle CPU cores (the committed weights come from busy ones, their metadata says how long it took). Writes
what the recipe ``plm-tiny`` and the tests use, in the layout of the released checkpoints on Hugging Face (rotary rows
interleaved, bfloat16):

    recipes/checkpoints/plm-tiny/        config.json, generation_config.json, tokenizer.json, tokenizer_config.json and
                                         model.safetensors, whose metadata says how the weights came about
    recipes/data/plm-tiny-heldout.txt       whole documents that were never trained on
    recipes/data/plm-tiny-calibration.txt   documents of the training text
    recipes/data/plm-tiny-LICENSE.txt       Python's licence, under which the text is

The text (examples/python_text.py) is that of the Python that runs this: another version trains on, and holds out,
other words.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from python_text import Document, chats, documents, licence, split
from safetensors import safe_open
from safetensors.torch import load_file, save
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from edgeattn.models.layers.mla import LatentAttention
from edgeattn.models.plm import PLM, PLMConfig, half_split, interleaved, plm

RECIPES = Path(__file__).resolve().parent.parent / "recipes"

CONFIG = PLMConfig(
    vocab_size=2048,
    hidden_size=256,
    num_hidden_layers=5,
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=32,
    v_head_dim=32,
    intermediate_size=1024,
)

END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

#: How Qwen2's tokenizers, PLM's among them, cut text before merging: digits one by one.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

#: The released checkpoints' own, letter by letter.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Phase:
    """Steps of one shape: ``rows`` sequences of ``length`` tokens each."""

    length: int
    rows: int
    steps: int


#: Most of the training is on short sequences, which are cheap; the long ones teach what is far away, up to the context.
PHASES = (Phase(256, 8, 1600), Phase(1024, 2, 200), Phase(4096, 1, 60))

LEARNING_RATE = 2e-3


def make_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE as Qwen2's, special tokens last, trained on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [END, TURN, TURN_END]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size - len(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    assert tokenizer.get_vocab_size() == CONFIG.vocab_size, "too little text for the vocabulary"
    return tokenizer


def conversation(question: str, answer: str) -> str:
    """What the chat template makes of them."""
    turns = (("system", "You are a helpful assistant"), ("user", question), ("assistant", answer))
    return "".join(f"{TURN}{role}\n{content}{TURN_END}\n" for role, content in turns)


@dataclass
class Stream:
    """Endless training tokens: all documents and a share of the conversations, shuffled, in every round.

    Args:
        plain, talks: token ids of each, without the end. end: id of ``END``.
    """

    plain: list[list[int]]
    talks: list[list[int]]
    end: int
    rng: random.Random

    def _round(self) -> Tensor:
        chosen = [*self.plain, *self.rng.sample(self.talks, len(self.talks) // 4)]
        self.rng.shuffle(chosen)
        return torch.tensor([token for ids in chosen for token in (*ids, self.end)])

    def batches(self, phase: Phase) -> Iterator[Tensor]:
        """Batches (rows, length + 1) of one phase."""
        rows: list[Tensor] = []
        for _ in range(phase.steps):
            while len(rows) < phase.rows:
                ids = self._round()[self.rng.randrange(phase.length) :]
                count = (len(ids) - 1) // phase.length
                more = [ids[i * phase.length : (i + 1) * phase.length + 1] for i in range(count)]
                self.rng.shuffle(more)
                rows += more
            yield torch.stack([rows.pop() for _ in range(phase.rows)])


class FusedAttention(nn.Module):
    """``LatentAttention`` as PyTorch's fused kernel computes it, which keeps no scores: training at 4,096 tokens."""

    def __init__(self, of: LatentAttention) -> None:
        super().__init__()
        self.heads, self.nope, self.rope, self.value = of.heads, of.nope, of.rope, of.value
        self.weight = of.weight

    def forward(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        """See ``LatentAttention.forward``."""
        batch, tokens = latent.shape[:2]
        expanded = F.linear(latent, self.weight).view(batch, tokens, self.heads, self.nope + self.value)
        k_nope, value = expanded.split([self.nope, self.value], dim=-1)
        k = torch.cat([k_nope, k_rope[:, :, None, :].expand(-1, -1, self.heads, -1)], dim=-1)
        q = torch.cat([q_nope, q_rope], dim=-1)
        value = F.pad(value, (0, self.nope + self.rope - self.value))  # the kernel wants one width for all three
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), value.transpose(1, 2), is_causal=True
        )
        return out.transpose(1, 2)[..., : self.value].reshape(batch, tokens, self.heads * self.value)


def fresh(seed: int) -> PLM:
    """PLM with what writes into the residual stream started smaller, and fused attention."""
    torch.manual_seed(seed)
    model = plm(**asdict(CONFIG))
    for layer in model.model.layers:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            layer.get_submodule(name).weight.data.mul_((2 * CONFIG.num_hidden_layers) ** -0.5)
        layer.self_attn.kv_b_proj = FusedAttention(layer.self_attn.kv_b_proj)
    return model


def rate(done: float) -> float:
    """Warm-up, stable, decay, constant: the schedule that PLM was trained with, as a share of the highest rate."""
    if done < 0.03:
        return done / 0.03
    if done < 0.5:
        return 1.0
    return max(0.04, 1.0 - 0.96 * (done - 0.5) / 0.45)


def optimizer_of(model: PLM) -> torch.optim.Optimizer:
    """AdamW, with weight decay on matrices alone."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), fused=True)


def train(model: PLM, stream: Stream, phases: tuple[Phase, ...]) -> Iterator[dict[str, str]]:
    """Minimize the cross entropy of the next token, in place; yields what was done, now and then and at the end."""
    optimizer, start = optimizer_of(model), time.monotonic()
    total = sum(phase.length * phase.rows * phase.steps for phase in phases)
    step, seen, mean = 0, 0, math.nan
    for phase in phases:
        for batch in stream.batches(phase):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * rate(seen / total)
            loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step, seen = step + 1, seen + phase.length * phase.rows
            mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
            if step % 50 == 0:
                took = time.monotonic() - start
                print(
                    f"step {step:5d}  {seen / total:4.0%}  {phase.length:4d} tokens  loss {mean:.3f}  {took:4.0f} s",
                    flush=True,
                )
            if step % 500 == 0 or seen == total:
                yield {
                    "steps": str(step),
                    "tokens": str(seen),
                    "of_tokens": str(total),
                    "seconds": f"{time.monotonic() - start:.0f}",
                }


@torch.no_grad()
def losses(model: PLM, ids: list[int], window: int) -> Tensor:
    """Cross entropy (windows, window) in nats of tokens in windows side by side; a shorter rest is left out."""
    count = (len(ids) - 1) // window
    found = []
    for i in range(count):
        part = torch.tensor(ids[i * window : (i + 1) * window + 1])
        found.append(F.cross_entropy(model(part[None, :-1])[0], part[1:], reduction="none"))
    return torch.stack(found)


def unigram(train: list[list[int]], heldout: list[int]) -> float:
    """Held-out perplexity of a model that knows only how frequent each token is."""
    counts = torch.ones(CONFIG.vocab_size)
    counts += torch.bincount(torch.tensor([token for ids in train for token in ids]), minlength=CONFIG.vocab_size)
    return float((counts / counts.sum()).log()[torch.tensor(heldout)].neg().mean().exp())


def write_folder(folder: Path, model: PLM, tokenizer: Tokenizer, facts: dict[str, str]) -> None:
    """The checkpoint as Hugging Face has PLM's: bfloat16, rotary rows interleaved."""
    folder.mkdir(parents=True, exist_ok=True)
    end, turn, turn_end = (tokenizer.token_to_id(token) for token in (END, TURN, TURN_END))
    config = {
        "architectures": ["PLMForCausalLM"],
        "model_type": "plm",
        **asdict(CONFIG),
        "num_key_value_heads": CONFIG.num_attention_heads,
        "q_lora_rank": None,
        "hidden_act": "relu2",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rope_scaling": None,
        "rope_interleave": True,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": end,
        "eos_token_id": turn_end,
        "torch_dtype": "bfloat16",
    }
    special = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    names = {end: END, turn: TURN, turn_end: TURN_END}
    tokens = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(i): {"content": name, **special} for i, name in names.items()},
        "additional_special_tokens": [TURN, TURN_END],
        "bos_token": None,
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": TURN_END,
        "errors": "replace",
        "model_max_length": CONFIG.max_position_embeddings,
        "pad_token": END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {"bos_token_id": end, "eos_token_id": [turn_end, end], "pad_token_id": end}
    for name, content in (
        ("config.json", config),
        ("tokenizer_config.json", tokens),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    state = interleaved(model.state_dict(), CONFIG)
    half = {name: value.to(torch.bfloat16).contiguous() for name, value in state.items()}
    written = folder / "model.safetensors.part"
    written.write_bytes(save(half, metadata={"format": "pt", **facts}))
    written.replace(folder / "model.safetensors")
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"wrote {folder} ({size / 1e6:.2f} MB)")


def read_folder(folder: Path) -> PLM:
    """The model as it was written: rounded to bfloat16, computed in float32."""
    model = plm(**asdict(CONFIG)).eval()
    state = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(half_split(state, CONFIG), strict=True)
    return model


def write_texts(folder: Path, train: list[Document], held: list[Document], seed: int) -> str:
    """The held-out text, which is returned, a sample of the training text, and the licence of both."""
    folder.mkdir(parents=True, exist_ok=True)
    sample, size = [], 0
    for document in random.Random(seed + 1).sample(train, len(train)):
        if len(document.text) <= 8_000 and size < 60_000:
            sample.append(document.text)
            size += len(document.text)
    heldout = "\n\n".join(document.text for document in held) + "\n"
    for name, text in (
        ("heldout", heldout),
        ("calibration", "\n\n".join(sample) + "\n"),
        ("LICENSE", licence()),
    ):
        path = folder / f"plm-tiny-{name}.txt"
        path.write_text(text, "utf-8", newline="\n")
        print(f"wrote {path} ({path.stat().st_size / 1e3:.0f} kB)")
    return heldout


def measure(folder: Path, heldout: list[int], size: int) -> dict[str, str]:
    """Held-out perplexity of the checkpoint in a folder, over windows of the whole context.

    Args:
        size: bytes that the tokens ``heldout`` stand for.
    """
    model = read_folder(folder)
    count = len(heldout) - (len(heldout) - 1) % CONFIG.max_position_embeddings  # the same tokens for all windows
    found = {window: losses(model, heldout[:count], window) for window in (256, 1024, 4096)}
    whole = found[CONFIG.max_position_embeddings]
    bits = float(whole.mean()) / math.log(2) * len(heldout) / size
    return {
        "heldout_perplexity": f"{whole.mean().exp():.3f}",
        "heldout_bits_per_byte": f"{bits:.4f}",
        "heldout_perplexity_per_byte": f"{2**bits:.4f}",
        "heldout_tokens": str(whole.numel()),
        "heldout_perplexity_by_window": ", ".join(f"{n} tokens: {x.mean().exp():.2f}" for n, x in found.items()),
    }


def main() -> None:
    """Train, measure the written checkpoint on the held-out text, and write the files."""
    parser = argparse.ArgumentParser(description="Train plm-tiny on Python's documentation.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--brief", action="store_true", help="two steps of each phase: to see that it runs")
    parser.add_argument("--data-only", action="store_true", help="write the texts alone")
    parser.add_argument(
        "--out", type=Path, default=RECIPES, help="folder of checkpoints/ and data/ (default: recipes/)"
    )
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    found = documents()
    trained, held = split(found, args.seed, characters=100_000, most=15_000)
    text = write_texts(args.out / "data", trained, held, args.seed)
    size = sum(len(document.text) for document in trained)
    print(f"{len(trained)} documents of {size / 1e6:.2f} M characters, {len(held)} held out")
    if args.data_only:
        return

    talks = [conversation(*pair) for pair in chats(trained, args.seed)]
    tokenizer = make_tokenizer([*(document.text for document in trained), *talks])
    plain = [one.ids for one in tokenizer.encode_batch([document.text for document in trained])]
    heldout = tokenizer.encode(text).ids
    stream = Stream(
        plain,
        [one.ids for one in tokenizer.encode_batch(talks)],
        tokenizer.token_to_id(END),
        random.Random(args.seed),
    )
    print(
        f"{sum(map(len, plain)):,} tokens, {sum(map(len, stream.talks)):,} of conversations, {len(heldout):,} held out"
    )

    facts = {
        "model": "edgeattn.models.plm:plm",
        "text": "docstrings, topics and licence of Python (PSF License Agreement), examples/python_text.py",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "seed": str(args.seed),
        "learning_rate": str(LEARNING_RATE),
        "phases": ", ".join(f"{p.steps} x {p.rows} x {p.length} tokens" for p in PHASES),
        "unigram_perplexity": f"{unigram(plain, heldout):.1f}",
    }
    folder, model = args.out / "checkpoints" / "plm-tiny", fresh(args.seed)
    phases = tuple(Phase(p.length, p.rows, 2) for p in PHASES) if args.brief else PHASES
    for done in train(model, stream, phases):
        facts |= done
        write_folder(folder, model, tokenizer, facts)
    facts |= measure(folder, heldout, len(text.encode()))
    write_folder(folder, model, tokenizer, facts)
    with safe_open(folder / "model.safetensors", "pt") as file:
        print(json.dumps(file.metadata(), indent=1, sort_keys=True))


if __name__ == "__main__":
    main()
