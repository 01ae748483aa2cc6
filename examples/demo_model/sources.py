"""Plain text from two of the packages: Jane Austen's novels and Python's documentation.

Both functions take the directory into which the packages were unpacked and give (title, text) pairs in a fixed order.
Paragraphs are unwrapped to one line each and separated by an empty line.
"""

import re
import zlib
from collections.abc import Iterator
from pathlib import Path

# ---------------------------------------------------------------- Jane Austen (r-cran-janeaustenr)

AUSTEN_DATA = "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
_CHAPTER = re.compile(r"chapter ([ivxlc]+|\d+)$", re.IGNORECASE)
_VOLUME = re.compile(r"volume [ivx]+$", re.IGNORECASE)
_END = re.compile(r"(the end|finis|a note on the text)$", re.IGNORECASE)
_REMARK = re.compile(r"\[.*volume", re.IGNORECASE)  # by a modern editor
_R_HEADER = bytes((0x58, 0x0A, 0, 0, 0, 3))  # "X\n", then version 3: R's binary (XDR) serialization
_R_STRINGS, _R_STRING = 16, 9


def _r_strings(data: bytes) -> list[str]:
    """The character vector that R serialized into `data` (R Internals, section 1.8)."""

    def number(at: int) -> int:
        return int.from_bytes(data[at : at + 4], "big")

    at = 18 + number(14)  # behind the versions and the name of the encoding
    if not data.startswith(_R_HEADER) or number(at) & 255 != _R_STRINGS:
        raise ValueError(f"expected an R character vector, got data that begin with {data[:20]!r}")
    count, at = number(at + 4), at + 8
    lines = []
    for _ in range(count):
        if number(at) & 255 != _R_STRING:
            raise ValueError(f"expected an R string at byte {at}, got type {number(at) & 255}")
        length = number(at + 4)
        lines.append(data[at + 8 : at + 8 + length].decode())
        at += 8 + length
    return lines


def _novels(root: Path) -> Iterator[list[str]]:
    """The lines of each novel. The file is a row of blocks, each a 4-byte length and a zlib stream."""
    packed = (root / AUSTEN_DATA).read_bytes()
    while packed:
        stream = zlib.decompressobj()
        data = stream.decompress(packed[4:])
        packed = stream.unused_data
        yield _r_strings(data)


def _unwrap(lines: list[str]) -> str:
    paragraphs = re.split(r"\n\s*\n", "\n".join(line.strip() for line in lines).strip())
    kept = (text for text in paragraphs if not _REMARK.match(text))
    return "\n\n".join(re.sub(r"\s+", " ", paragraph) for paragraph in kept) + "\n"


def austen(root: Path) -> Iterator[tuple[str, str]]:
    """One text for each chapter, headed by the book's and the chapter's name. Front matter and notes are left out."""
    for lines in _novels(root):
        book, volume, chapter, body = lines[0].strip().title().replace(" And ", " and "), "", "", []
        for line in map(str.strip, [*lines, "THE END"]):
            heading, new_volume, end = _CHAPTER.match(line), _VOLUME.match(line), _END.match(line)
            if not (heading or new_volume or end):
                body.append(line.replace("_", ""))
                continue
            if chapter:
                title = f"{book}{volume}, {chapter}"
                yield title, f"{title}\n\n{_unwrap(body)}"
            chapter, body = f"Chapter {heading[1].upper()}" if heading else "", []
            volume = f", {line.title()[:7]}{line[7:]}" if new_volume else volume
            if end:
                break


# ---------------------------------------------------------------- Python's documentation (python3.11-doc)

PYTHON_SOURCES = "usr/share/doc/python3.11/html/_sources"
_FOLDERS = ("tutorial", "faq", "howto", "library", "reference", "using", "whatsnew", "glossary")
_DIRECTIVE = re.compile(r"\.\. ([a-zA-Z0-9:_-]+)::\s*(.*)$")
_DROPPED = {
    "audit-event", "audit-event-table", "availability", "contents", "cssclass", "currentmodule", "figure",
    "highlight", "image", "include", "index", "limited-api-list", "list-table", "literalinclude", "miscnews",
    "module", "moduleauthor", "only", "program", "raw", "sectionauthor", "sidebar", "table", "tabularcolumns",
    "testcleanup", "testsetup", "toctree",
}  # fmt: skip
_CODE = {
    "code", "code-block", "doctest", "epigraph", "parsed-literal", "productionlist", "sourcecode", "testcode",
    "testoutput",
}  # fmt: skip
_SPOKEN = {
    "note": "Note: ", "warning": "Warning: ", "caution": "Caution: ", "important": "Important: ",
    "seealso": "See also: ", "impl-detail": "CPython implementation detail: ", "topic": "", "rubric": "",
    "glossary": "",
}  # fmt: skip
_VERSION = {
    "versionadded": "New in version", "versionchanged": "Changed in version", "deprecated": "Deprecated since version",
    "deprecated-removed": "Deprecated since version",
}  # fmt: skip
_ADORNMENT = re.compile(r"([=\-~^*#+\"'`:._])\1{2,}$")
_TABLE = re.compile(r"(\+[-=+]{3,}|={2,}( +={2,})+)$")
_BULLET = re.compile(r"([*+-]|#\.|\(?[0-9a-zA-Z][.)]) +\S")
_OPTION = re.compile(r":[a-z-]+:( |$)")
_INLINE = [
    (re.compile(r":[a-zA-Z:+-]+:`[!~]?([^`<]*?)\s*<[^`>]*>`"), r"\1"),  # :role:`text <target>`
    (re.compile(r":[a-zA-Z:+-]+:`~(?:[^`]*\.)?([^`.]+)`"), r"\1"),  # :role:`~module.name`
    (re.compile(r":pep:`(\d+)`"), r"PEP \1"),
    (re.compile(r":issue:`(\d+)`"), r"issue \1"),
    (re.compile(r":[a-zA-Z:+-]+:`!?([^`]+)`"), r"\1"),
    (re.compile(r"`([^`<]+?)\s*<[^`>]*>`__?"), r"\1"),  # `text <url>`_
    (re.compile(r"``(.+?)``"), r"\1"),
    (re.compile(r"(?<!\w)\*\*(?=\S)(.+?)(?<=\S)\*\*(?!\w)"), r"\1"),
    (re.compile(r"(?<![\w*\\])\*(?=[^\s*])([^*]*?)(?<=[^\s\\])\*(?![\w*])"), r"\1"),
    (re.compile(r"`([^`]+)`_?_?"), r"\1"),
    (re.compile(r" ?\[(#\w*|\d+)\]_"), ""),
    (re.compile(r"\\([*_`\\|])"), r"\1"),
    (re.compile(r"\|(?:version|release)\|"), "3.11"),
    (re.compile(r"(\\ )?\|nbsp\|"), ""),
    (re.compile(r" ?\((Patch )?[Cc]ontributed by [^()]*(\([^()]*\)[^()]*)*\)\.?"), ""),
]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _inline(text: str) -> str:
    for pattern, replacement in _INLINE:
        text = pattern.sub(replacement, text)
    return text


class _Page:
    """One reStructuredText file on its way to plain text: a cursor over lines, and the blocks written so far."""

    def __init__(self, source: str) -> None:
        self.lines = source.expandtabs(8).splitlines()
        self.at = 0
        self.blocks: list[str] = []
        self.prefix = ""  # "Note: " and the like, for the next paragraph

    def text(self) -> str:
        while self.at < len(self.lines):
            line = self.lines[self.at]
            stripped = line.strip()
            if not stripped or _ADORNMENT.match(stripped) or _OPTION.match(stripped):
                self.at += 1
            elif stripped == ".." or stripped.startswith((".. ", "__ ")):
                self._explicit(stripped, _indent(line))
            elif _TABLE.match(stripped):
                self._table()
            elif stripped.startswith((">>>", "...   ")):
                self._code(self._block())
            else:
                self._paragraph(_indent(line))
        return "\n\n".join(self.blocks) + "\n"

    def _block(self) -> list[str]:
        start = self.at
        while self.at < len(self.lines) and self.lines[self.at].strip():
            self.at += 1
        return self.lines[start : self.at]

    def _table(self) -> None:
        """Skips a table: up to the border that an empty line or the end follows."""
        while self.at < len(self.lines):
            border = _TABLE.match(self.lines[self.at].strip())
            self.at += 1
            if border and not "".join(self.lines[self.at : self.at + 1]).strip():
                break

    def _deeper(self, indent: int) -> list[str]:
        """The following lines that are empty or indented by more than `indent`."""
        start = self.at
        while self.at < len(self.lines) and (not self.lines[self.at].strip() or _indent(self.lines[self.at]) > indent):
            self.at += 1
        return self.lines[start : self.at]

    def _code(self, lines: list[str]) -> None:
        while lines and (not lines[0].strip() or _OPTION.match(lines[0].strip())):
            lines = lines[1:]
        margin = min((_indent(line) for line in lines if line.strip()), default=0)
        code = "\n".join("    " + line[margin:].rstrip() if line.strip() else "" for line in lines).strip("\n")
        if code:
            self.blocks.append(re.sub(r"\n{3,}", "\n\n", code))

    def _explicit(self, stripped: str, indent: int) -> None:
        """A line that starts with "..": directive, comment, target or footnote."""
        self.at += 1
        directive = _DIRECTIVE.match(stripped)
        if directive is None or directive[1] in _DROPPED:
            self._deeper(indent)
            return
        name, argument = directive[1], directive[2]
        if name in _CODE:
            self._code(self._deeper(indent))
        elif name in _SPOKEN:
            self.prefix = _SPOKEN[name]
            if argument:
                self._write(argument)
        elif name in _VERSION:
            version, *rest = argument.split(maxsplit=2 if name == "deprecated-removed" else 1) or [""]
            follows = not rest and self.at < len(self.lines) and _indent(self.lines[self.at]) > indent
            self.prefix = f"{_VERSION[name]} {version}{': ' if rest or follows else '.'}"
            if not follows:
                self._write(rest[-1] if rest else "")
        else:  # function, class, method …: the signature, one line for each form
            forms = [argument]
            while self.at < len(self.lines) and _indent(self.lines[self.at]) > indent:
                line = self.lines[self.at].strip()
                if not _OPTION.match(line):
                    forms.append(line)
                self.at += 1
            self.blocks.append(re.sub(r"\s*\\\n", " ", "\n".join(forms)).replace("\\", ""))

    def _paragraph(self, indent: int) -> None:
        bullet = _BULLET.match(self.lines[self.at].strip())
        hanging = indent + (bullet.end() - 1 if bullet else 0)
        words = [self.lines[self.at].strip()]
        self.at += 1
        while self.at < len(self.lines):
            line, stripped = self.lines[self.at], self.lines[self.at].strip()
            if not stripped or _indent(line) != hanging or _BULLET.match(stripped) or _ADORNMENT.match(stripped):
                break
            words.append(stripped)
            self.at += 1
        paragraph = " ".join(words)
        literal = paragraph.endswith("::")
        self._write(re.sub(r"\s*::$", ":", paragraph) if paragraph != "::" else "")
        if literal:
            self._code(self._deeper(hanging))

    def _write(self, text: str) -> None:
        text = self.prefix + re.sub(r"\s+", " ", _inline(text))
        self.prefix = ""
        if text.strip():
            self.blocks.append(text.strip())


def python_docs(root: Path) -> Iterator[tuple[str, str]]:
    """One text for each page of the documentation, without markup, tables and indexes; code is indented by four."""
    top = root / PYTHON_SOURCES
    for path in sorted(top.rglob("*.rst.txt")):
        name = path.relative_to(top).as_posix().removesuffix(".rst.txt")
        if name.split("/")[0] in _FOLDERS:
            yield name, _Page(path.read_text()).text()
