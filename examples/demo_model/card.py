"""The shipped model's card (README.md) and the picture of its loss curve."""

import json
import sys
from pathlib import Path

import torch

import data
from nemotron_h import NemotronHConfig, family

CARD = """\
---
license: apache-2.0
language: en
library_name: nemotron-h
pipeline_tag: text-generation
---
# The small model that ships with nemotron-h

A Nemotron-H of {parameters:,} parameters ({megabytes:.2f} MB in bfloat16), for trying the package, for its examples and
for its tests. It has all of the family's parts: Mamba-2, attention, latent mixture of experts and feed-forward blocks
(`{pattern}`), and a multi-token prediction head (`{mtp_pattern}`). Its byte-level BPE has {vocabulary} entries.

## What it is good for
It writes text that looks like its three sources for a sentence or two, and answers "What is a dog?" in a dictionary's
tone. **It knows almost nothing:** what it says is often wrong, it loses the thread after some sentences, it speaks
English only, it does not reason, and it cannot call tools. Do not use it for anything that matters.
It was trained and scored on rows of {length} tokens; longer texts are untested. Austen's novels carry the views of
their time, WordNet and Python's documentation those of their authors; nothing was filtered.

## Training
{tokens:,} tokens in {minutes:.0f} minutes with {threads} CPU thread(s), by `examples/demo_model/train.py`: AdamW, next
token loss and 0.3 times the multi-token prediction loss, experts balanced by the router's bias. The corpus has
{corpus_tokens:,} tokens.

| source | held-out bits per byte | held-out bytes | license of the text |
|---|---|---|---|
{table}

Bits per byte are those of the saved weights, on documents that training never saw (2 % of each source), in rows of
{length} tokens that stand alone. The chat is built from templates, which is why its number is low.

## Sources
- Jane Austen's novels: Debian's `r-cran-janeaustenr`, public domain.
- Python's documentation: Debian's `python3.11-doc`. Copyright 2001-2023 Python Software Foundation, PSF License
  Version 2.
- Definitions and examples: Debian's `wordnet-base`. WordNet 3.0 Copyright 2006 by Princeton University. All rights
  reserved. The WordNet license asks for this notice: the software and database is provided "as is" and Princeton
  University makes no representations or warranties, express or implied.

None of the texts is part of this package. The weights are under the Apache License 2.0.
"""


def write(
    directory: Path,
    config: NemotronHConfig,
    corpus: data.Corpus,
    scores: dict[str, float],
    tokens_seen: int,
    seconds: float,
    length: int,
) -> None:
    """Writes README.md beside the weights. `scores`: held-out bits per byte by source."""
    table = "\n".join(
        f"| {source} | {score:.3f} | {corpus.held_out[source].text_bytes:,} | {data.LICENSES[source]} |"
        for source, score in scores.items()
    )
    text = CARD.format(
        parameters=family.count(config).total,
        megabytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1e6,
        pattern=config.hybrid_override_pattern,
        mtp_pattern=config.mtp_hybrid_override_pattern,
        vocabulary=config.vocab_size,
        length=length,
        tokens=tokens_seen,
        minutes=seconds / 60,
        threads=torch.get_num_threads(),
        corpus_tokens=len(corpus.train.token_ids),
        table=table,
    )
    (directory / "README.md").write_text(text)


def draw(run: Path) -> None:
    """Draws run/log.jsonl as run/loss.png when matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no loss.png: `pip install matplotlib`", file=sys.stderr)
        return
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="minutes", ylabel="nats per token")
    minutes = [line["seconds"] / 60 for line in lines]
    for name, label in (("next_token", "next token"), ("loss", "with the shares of MTP and balance")):
        axes.plot(minutes, [line[name] for line in lines], linewidth=0.8, label=label)
    axes.set_title("Training loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(run / "loss.png", dpi=150)
