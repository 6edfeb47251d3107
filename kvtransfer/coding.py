"""Whether coding KV for the wire pays: the bytes it saves against the time it takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class CodingSpeed:
    """What coding costs on this machine, in plain KV bytes a second, and what it leaves."""

    ratio: float
    """Coded bytes for each plain byte."""
    encode_Bps: float  # noqa: N815  a unit
    decode_Bps: float  # noqa: N815


def transfer_s(nbytes: int, bandwidth_Bps: float, speed: CodingSpeed | None = None) -> float:  # noqa: N803
    """Predicted time of a pull; coding, moving and decoding follow one another."""
    if speed is None:
        return nbytes / bandwidth_Bps
    coding = nbytes / speed.encode_Bps + nbytes / speed.decode_Bps
    return coding + nbytes * speed.ratio / bandwidth_Bps


def break_even_Bps(speed: CodingSpeed) -> float:  # noqa: N802
    """Coding pays on links slower than this."""
    return (1 - speed.ratio) / (1 / speed.encode_Bps + 1 / speed.decode_Bps)


@dataclass(frozen=True, slots=True)
class Coding:
    """A codec, or None to send KV as it is."""

    codec: str | None
    why: str


def choose_coding(
    wanted: str,
    nbytes: int,
    link_Bps: float | None,  # noqa: N803
    speeds: Mapping[str, CodingSpeed],
) -> Coding:
    """The wanted codec, or the fastest for `auto`, where it makes this pull shorter."""
    if link_Bps is None:
        return Coding(None, "nothing is known of the link yet")
    names = sorted(speeds) if wanted == "auto" else [wanted]
    best = min(names, key=lambda name: transfer_s(nbytes, link_Bps, speeds[name]))
    plain_s, coded_s = transfer_s(nbytes, link_Bps), transfer_s(nbytes, link_Bps, speeds[best])
    why = (
        f"{nbytes} bytes at {link_Bps / 1e6:.0f} MB/s take {plain_s * 1e3:.1f} ms, "
        f"by {best} {coded_s * 1e3:.1f} ms"
    )
    return Coding(best if coded_s < plain_s else None, why)
