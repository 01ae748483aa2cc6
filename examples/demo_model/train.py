"""Trains the small model that ships with the package: about 1.9 million parameters, about 20 minutes on two cores.

    python train.py CACHE_DIR OUT_DIR --minutes 20

Fetches the text when CACHE_DIR has none, trains the tokenizer when OUT_DIR has none. The state of the run is in
CACHE_DIR/run: Ctrl-C writes it, the same command goes on from it. The learning rate follows the clock, so the run
always ends with its last decay. Letters: B rows · T tokens of a row · N tokens of the corpus.
"""

import argparse
import json
import math
import signal
import sys
import threading
import time
from pathlib import Path

import card
import numpy as np
import tokenizer as bpe
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import GenerationConfig

import data
from nemotron_h import NemotronHConfig, NemotronHForCausalLM

CONFIG = {
    "vocab_size": bpe.VOCABULARY,
    "hidden_size": 160,
    "hybrid_override_pattern": "MEM*EM-M*E",  # M mamba, E experts, * attention, - feed-forward
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 320,
    "mamba_num_heads": 8,
    "mamba_head_dim": 32,
    "mamba_n_groups": 2,
    "ssm_state_size": 32,
    "mamba_chunk_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_latent_size": 64,
    "moe_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 128,
    "num_nextn_predict_layers": 1,
    "mtp_hybrid_override_pattern": "*E",
    "mtp_loss_coef": 0.3,
    "mtp_loss_depths": 1,
    "router_aux_loss_coef": 1e-4,
}
ROUTER_BIAS_RATE = 1e-3
WARMUP, FINAL_LR = 0.03, 0.02  # a share of the run, and of the highest learning rate
WEIGHT_DECAY, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
LOG_EVERY, SAVE_EVERY = 20, 500  # steps


def rows(packed: data.Packed, first_N: np.ndarray, T: int) -> dict[str, Tensor]:
    """Rows of T tokens that begin at the given places of the corpus, as arguments of the model, each `[B, T]` int64.

    A row may hold several documents: positions restart at each, and no document's first token is a label.
    """
    index_BT = first_N[:, None] + np.arange(T)
    document_BT = np.searchsorted(packed.starts, index_BT, side="right") - 1
    position_BT = index_BT - np.maximum(packed.starts[document_BT], first_N[:, None])
    ids_BT = packed.token_ids[index_BT].astype(np.int64)
    labels_BT = np.where(position_BT == 0, -100, ids_BT)
    arrays = {"input_ids": ids_BT, "position_ids": position_BT, "labels": labels_BT}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def training_batch(packed: data.Packed, step: int, B: int, T: int) -> dict[str, Tensor]:
    """Batch number `step`. Each epoch cuts the corpus at other places and reads the rows in another order."""
    rows_per_epoch = (len(packed.token_ids) - T) // (B * T) * B
    epoch, start = divmod(step * B, rows_per_epoch)
    random = np.random.default_rng(epoch)
    offset = int(random.integers(T))
    order = random.permutation(rows_per_epoch)
    return rows(packed, order[start : start + B] * T + offset, T)


def learning_rate(highest: float, progress: float) -> float:
    """Linear warm-up, then a cosine, over `progress` from 0 to 1."""
    if progress < WARMUP:
        return highest * (progress + 0.001) / (WARMUP + 0.001)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - WARMUP) / (1 - WARMUP))))
    return highest * (FINAL_LR + (1 - FINAL_LR) * cosine)


def build_optimizer(model: torch.nn.Module) -> torch.optim.AdamW:
    """Matrices decay; norms, biases, A_log, D and the convolution's filters do not."""
    parameters = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    decayed = [value for name, value in parameters if value.ndim >= 2 and "conv1d" not in name]
    others = [value for name, value in parameters if value.ndim < 2 or "conv1d" in name]
    groups = [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS)


@torch.inference_mode()
def bits_per_byte(model: torch.nn.Module, packed: data.Packed, tokenizer: Tokenizer, B: int, T: int) -> float:
    """Cross-entropy over the bytes of the tokens it was taken over. Rows stand alone, as in training, and the end of a
    document costs bits but has no bytes."""
    names = [tokenizer.id_to_token(index) or "" for index in range(tokenizer.get_vocab_size())]
    sizes = [len(name) for name in names]  # one letter stands for one byte
    sizes[data.END_OF_DOCUMENT] = 0
    token_bytes = torch.tensor(sizes)
    first_N = np.arange(0, len(packed.token_ids) - T + 1, T)
    nats, size = 0.0, 0
    for start in range(0, len(first_N), B):
        batch = rows(packed, first_N[start : start + B], T)
        labels_BT = batch.pop("labels")
        nats += next_token_loss(model(**batch, use_cache=False).logits, labels_BT, "sum")
        size += int(token_bytes[labels_BT[labels_BT != -100]].sum())
    return nats / math.log(2) / size


def save_state(path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int, seconds: float) -> None:
    partial = path.with_suffix(".partial")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
    torch.save(state, partial)
    partial.replace(path)


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor, reduction: str) -> float:
    """Cross-entropy in nats of each label, predicted at the position before it; -100 is left out."""
    logits, labels = logits_BTV[:, :-1].detach().float().flatten(0, 1), labels_BT[:, 1:].flatten()
    return torch.nn.functional.cross_entropy(logits, labels, reduction=reduction).item()


def train(
    model: NemotronHForCausalLM, packed: data.Packed, run: Path, options: argparse.Namespace
) -> tuple[int, float]:
    """Trains until the time is up or Ctrl-C; (steps, seconds) of the whole run, earlier parts included."""
    optimizer, step, before = build_optimizer(model), 0, 0.0
    state_path = run / "state.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]
        print(f"going on from step {step} of {state_path}; delete it to begin anew", file=sys.stderr)
    budget, began, seconds = options.minutes * 60, time.monotonic(), before
    stop = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: stop.set())  # finish the step, then save
    model.train()
    with (run / "log.jsonl").open("a") as log:
        while seconds < budget and not stop.is_set():
            batch = training_batch(packed, step, options.batch, options.length)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options.lr, seconds / budget)
            out = model(**batch, use_cache=False, output_router_logits=True)
            optimizer.zero_grad()
            out.loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP, error_if_nonfinite=True)
            optimizer.step()
            model.update_router_bias(rate=ROUTER_BIAS_RATE)
            step, last, seconds = step + 1, seconds, before + time.monotonic() - began
            if step % LOG_EVERY == 0:
                line = {"step": step, "seconds": seconds, "loss": out.loss.item(), "gradient_norm": norm.item()}
                line["next_token"] = next_token_loss(out.logits, batch["labels"], "mean")
                line["lr"] = optimizer.param_groups[0]["lr"]
                line["tokens_per_second"] = options.batch * options.length / (seconds - last)
                print(json.dumps(line), file=log, flush=True)
                print(" ".join(f"{name} {value:.4g}" for name, value in line.items()), file=sys.stderr)
            if step % SAVE_EVERY == 0:
                save_state(state_path, model, optimizer, step, seconds)
    save_state(state_path, model, optimizer, step, seconds)
    return step, seconds


def finish(
    model: NemotronHForCausalLM, corpus: data.Corpus, tokenizer: Tokenizer, options: argparse.Namespace
) -> dict[str, float]:
    """Saves the model in bfloat16 and scores what was saved: bits per byte for each source."""
    model.eval()
    model.generation_config = GenerationConfig.from_pretrained(options.out_dir)
    model.to(torch.bfloat16).save_pretrained(options.out_dir)
    saved = NemotronHForCausalLM.from_pretrained(options.out_dir, dtype=torch.float32)
    return {
        source: bits_per_byte(saved, packed, tokenizer, options.batch, options.length)
        for source, packed in corpus.held_out.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cache_dir", type=Path)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--batch", type=int, default=16, help="rows of a batch")
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate")
    options = parser.parse_args()
    data.fetch(options.cache_dir)
    if not (options.out_dir / "tokenizer.json").exists():
        bpe.main(options.cache_dir, options.out_dir)
    tokenizer = Tokenizer.from_file(str(options.out_dir / "tokenizer.json"))
    corpus = data.tokens(options.cache_dir, tokenizer)
    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**CONFIG))
    run = options.cache_dir / "run"
    run.mkdir(exist_ok=True)
    steps, seconds = train(model, corpus.train, run, options)
    if seconds < options.minutes * 60:
        sys.exit(130)  # Ctrl-C
    scores = finish(model, corpus, tokenizer, options)
    tokens_seen = steps * options.batch * options.length
    card.write(options.out_dir, model.config, corpus, scores, tokens_seen, seconds, options.length)
    card.draw(run)
    for source, score in scores.items():
        print(f"{source:8} {score:.3f} bits per byte, held out")


if __name__ == "__main__":
    main()
