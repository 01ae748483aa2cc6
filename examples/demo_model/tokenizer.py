"""The shipped model's tokenizer: a byte-level BPE of 2048 entries with the family's control tokens.

    python tokenizer.py CACHE_DIR OUT_DIR       # after data.py; writes tokenizer.json, tokenizer_config.json, …

Every UTF-8 text comes back unchanged from encode and decode. Control tokens in a text are control tokens only for
who asks: `tokenizer(text, split_special_tokens=True)` (or `encode_special_tokens = True` on the backend) reads
"<|im_end|>" as ten letters. What a user typed should be encoded so, in pieces between the template's own text.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data

VOCABULARY = 2048
NAMED = {0: "<unk>", 1: "<s>", 2: "</s>", 10: "<|im_start|>", 11: "<|im_end|>", 12: "<think>", 13: "</think>"}
SPECIALS = [NAMED.get(index, f"<SPECIAL_{index}>") for index in range(14)]  # fixed ids, those of Nemotron 3
EOS_TOKEN_IDS = [2, 11]  # a document ends with </s>, a turn with <|im_end|>

# Words with the space before them, single digits, runs of punctuation, line ends with the spaces before them, spaces.
PIECES = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"

CHAT_TEMPLATE = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] if part['type'] == 'text' %}
{{- part['text'] }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train(texts: Iterable[str]) -> Tokenizer:
    """Learns the merges from `texts`. The result depends on the texts alone."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, directory: Path) -> None:
    """Writes what transformers' AutoTokenizer and a generation config read."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[1],
        "eos_token": SPECIALS[2],
        "unk_token": SPECIALS[0],
        "pad_token": SPECIALS[0],  # id 0, as in the family; a byte-level BPE has no unknown bytes
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
    }
    generation = {"bos_token_id": 1, "eos_token_id": EOS_TOKEN_IDS, "pad_token_id": 0}
    for name, content in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def main(cache_dir: Path, directory: Path) -> None:
    data.fetch(cache_dir)
    items, _ = data.split(data.documents(cache_dir))
    control = [text for text in SPECIALS if "|" in text]
    texts = []
    for item in items:
        text = item.text
        for name in control if item.source == "chat" else ():
            text = text.replace(name, "\n")
        texts.append(text)
    tokenizer = train(texts)
    save(tokenizer, directory)
    corpus = data.tokens(cache_dir, tokenizer)
    for name, part in (("train", corpus.train), *corpus.held_out.items()):
        count, size = len(part.token_ids), part.text_bytes
        print(f"{name:8} {size:10,} bytes {count:9,} tokens {size / count:6.3f} bytes per token")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python tokenizer.py CACHE_DIR OUT_DIR")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
