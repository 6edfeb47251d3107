"""What each token stands for in bytes, as the checkpoint's own decoder would have it."""

from __future__ import annotations

import re
from enum import Enum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

WORD_START = "▁"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Spelling(str, Enum):
    BYTE_LEVEL = "ByteLevel"
    """Each character of a token stands for one byte (GPT-2's alphabet)."""
    SENTENCEPIECE = "Metaspace"
    """U+2581 stands for a space, and <0xNN> for a byte that no token covers."""


def spelling_of(decoder: Mapping[str, Any] | None) -> Spelling | None:
    """How tokens are spelled under the `decoder` of a tokenizer.json; None if not known here."""
    if decoder is None:
        return None
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {part["type"] for part in parts}
    if kinds <= {"ByteLevel", "Fuse"} and "ByteLevel" in kinds:
        return Spelling.BYTE_LEVEL
    if kinds <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}:
        return Spelling.SENTENCEPIECE
    return None


def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 stands for itself, the other bytes lie from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + index): byte for index, byte in enumerate(others)
    }


def spell_byte_level(token: str, alphabet: Mapping[str, int]) -> bytes:
    """A token with a character outside the alphabet (an added token) stands for itself."""
    spelled = [alphabet.get(character) for character in token]
    known = [byte for byte in spelled if byte is not None]
    return bytes(known) if len(known) == len(spelled) else token.encode()


def spell_sentencepiece(token: str) -> bytes:
    if byte := BYTE_TOKEN.fullmatch(token):
        return bytes([int(byte[1], 16)])
    return token.replace(WORD_START, " ").encode()


def spell_all(tokens: Mapping[str, int], size: int, spelling: Spelling) -> list[bytes]:
    """The bytes of every token id; an id that no token has stands for nothing."""
    alphabet = byte_alphabet()
    table = [b""] * size
    for token, index in tokens.items():
        if spelling is Spelling.BYTE_LEVEL:
            table[index] = spell_byte_level(token, alphabet)
        else:
            table[index] = spell_sentencepiece(token)
    return table
