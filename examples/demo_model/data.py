"""The text that the shipped model is trained on: fetched from Debian, cleaned, split, packed into token arrays.

    python data.py CACHE_DIR        # fetches and prints the size of each source

Nothing of a package is run: its archive is unpacked, its files are read. Letters: N tokens, n documents.
"""

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import sources
import wordnet
from numpy.typing import NDArray
from tokenizers import Tokenizer

END_OF_DOCUMENT = 2  # </s>
HELD_OUT = 0.02  # of each source's bytes
SHORTEST_REPEATED_PARAGRAPH = 80  # characters; shorter paragraphs may occur more than once
SHUFFLE_SEED = 0


class Package(NamedTuple):
    """A Debian 12 package, pinned. `license` is that of the text we take from it."""

    name: str
    version: str
    sha256: str
    license: str

    @property
    def file_name(self) -> str:
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


PACKAGES = {
    "austen": Package(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "public domain (Jane Austen's six novels, 1811-1818)",
    ),
    "python": Package(
        "python3.11-doc",
        "3.11.2-6+deb12u8",
        "50eb63e7f636c4281e9ce1b8f10386f1def42159eddce34fc1f41c46261df71b",
        "PSF License Version 2; its code examples also Zero-Clause BSD (Python Software Foundation)",
    ),
    "wordnet": Package(
        "wordnet-base",
        "1:3.0-37",
        "61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        "WordNet 3.0 license (Copyright 2006 by Princeton University)",
    ),
}
LICENSES = {name: package.license for name, package in PACKAGES.items()}
LICENSES["chat"] = f"questions by this project (Apache-2.0), answers: {LICENSES['wordnet']}"


class Document(NamedTuple):
    """`source` is a key of LICENSES; titles are unique within it. A "chat" text is ChatML with its control tokens."""

    source: str
    title: str
    text: str


class Packed(NamedTuple):
    """Documents one after the other, each ended by </s>. Document i is `token_ids[starts[i] : starts[i + 1]]`."""

    token_ids: NDArray[np.int32]  # [N]
    starts: NDArray[np.int64]  # [n + 1], the last one is N
    text_bytes: int  # of the texts in UTF-8


class Corpus(NamedTuple):
    train: Packed  # all sources, documents shuffled
    held_out: dict[str, Packed]  # by source


# ---------------------------------------------------------------- fetching


def fetch(cache_dir: Path) -> None:
    """Downloads and unpacks what `cache_dir` does not hold yet (about 21 MB, 100 MB unpacked).

    Raises RuntimeError when a package cannot be had or is not the pinned one.
    """
    downloads = cache_dir / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for source, package in PACKAGES.items():
        target, archive = cache_dir / "unpacked" / source, downloads / package.file_name
        if target.is_dir():
            continue
        if not archive.is_file():
            print(f"downloading {package.name} {package.version}", file=sys.stderr)
            _run(package, ["apt-get", "download", f"{package.name}={package.version}"], downloads)
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise RuntimeError(f"{archive}: expected sha256 {package.sha256}, got {found}; delete it and try again")
        print(f"unpacking {archive.name}", file=sys.stderr)
        partial = target.with_suffix(".partial")
        partial.mkdir(parents=True, exist_ok=True)
        _run(package, ["dpkg-deb", "--extract", str(archive.resolve()), str(partial.resolve())], downloads)
        partial.rename(target)


def _run(package: Package, command: list[str], directory: Path) -> None:
    wanted = f"{package.file_name} (sha256 {package.sha256})"
    advice = f"run `apt-get update` on Debian 12, or put {wanted} into {directory} yourself"
    try:
        result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise RuntimeError(f"{command[0]} is not installed: {advice}") from error
    if result.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {result.stderr.strip()}\n{advice}")


# ---------------------------------------------------------------- documents


def chatml(messages: Iterable[wordnet.Message]) -> str:
    """What the chat template writes for these (role, content) pairs, without a generation prompt."""
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in messages)


def _raw_documents(cache_dir: Path) -> Iterator[Document]:
    unpacked = cache_dir / "unpacked"
    for title, text in sources.austen(unpacked / "austen"):
        yield Document("austen", title, text)
    for title, text in sources.python_docs(unpacked / "python"):
        yield Document("python", title, text)
    talked, listed = wordnet.split_synsets(unpacked / "wordnet")
    for title, text in wordnet.dictionary(listed):
        yield Document("wordnet", title, text)
    for title, messages in wordnet.conversations(talked):
        yield Document("chat", title, chatml(messages))


def documents(cache_dir: Path) -> list[Document]:
    """All documents in a fixed order; no text comes twice, and outside the chat no long paragraph either."""
    seen: set[str] = set()
    result = []
    for document in _raw_documents(cache_dir):
        pieces = [document.text] if document.source == "chat" else re.split(r"\n\n", document.text.strip("\n"))
        kept = [text for text in pieces if len(text) < SHORTEST_REPEATED_PARAGRAPH or text not in seen]
        seen.update(pieces)
        text = kept[0] if document.source == "chat" and kept else "\n\n".join(kept) + "\n"
        if text.strip():
            result.append(document._replace(text=text))
    return result


def split(items: list[Document]) -> tuple[list[Document], list[Document]]:
    """(train, held-out). Per source, the titles with the smallest hashes are held out until they hold 2 % of the bytes;
    titles that differ only behind " #" stay together. A larger piece than is still wanted is passed over."""
    sizes: dict[str, dict[str, int]] = {}
    for document in items:
        groups = sizes.setdefault(document.source, {})
        groups[_group(document)] = groups.get(_group(document), 0) + len(document.text.encode())
    held_out: set[tuple[str, str]] = set()
    for source, groups in sizes.items():
        wanted = HELD_OUT * sum(groups.values())
        for group in sorted(groups, key=lambda name: hashlib.sha256(name.encode()).digest()):
            if groups[group] <= 1.1 * wanted:
                held_out.add((source, group))
                wanted -= groups[group]
    return (
        [document for document in items if (document.source, _group(document)) not in held_out],
        [document for document in items if (document.source, _group(document)) in held_out],
    )


def _group(document: Document) -> str:
    return document.title.split(" #")[0]


# ---------------------------------------------------------------- tokens


def pack(items: list[Document], tokenizer: Tokenizer) -> Packed:
    """Encodes and concatenates. Only a chat's control tokens are taken for what they are; in other texts the same
    letters stay letters."""
    encoded: dict[bool, list[list[int]]] = {}
    for is_chat in (False, True):
        tokenizer.encode_special_tokens = not is_chat
        texts = [item.text for item in items if (item.source == "chat") == is_chat]
        encoded[is_chat] = [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]
    tokenizer.encode_special_tokens = False
    queues = {is_chat: iter(rows) for is_chat, rows in encoded.items()}
    rows = [[*next(queues[item.source == "chat"]), END_OF_DOCUMENT] for item in items]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    token_ids = np.concatenate([np.array(row, dtype=np.int32) for row in rows])
    starts = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)])
    return Packed(token_ids, starts, sum(len(item.text.encode()) for item in items))


def tokens(cache_dir: Path, tokenizer: Tokenizer) -> Corpus:
    """The packed training and held-out tokens; the same for the same packages and tokenizer."""
    train, held_out = split(documents(cache_dir))
    order = np.random.default_rng(SHUFFLE_SEED).permutation(len(train))
    by_source = {source: [item for item in held_out if item.source == source] for source in LICENSES}
    return Corpus(
        pack([train[index] for index in order], tokenizer),
        {source: pack(items, tokenizer) for source, items in by_source.items()},
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python data.py CACHE_DIR")
    fetch(Path(sys.argv[1]))
    for part_name, part in zip(("train", "held out"), split(documents(Path(sys.argv[1]))), strict=True):
        for source_name in LICENSES:
            texts = [item.text.encode() for item in part if item.source == source_name]
            print(f"{part_name:9} {source_name:8} {len(texts):6} documents {sum(map(len, texts)):10,} bytes")
