"""Changes of bytes that know no format, and what every refusal must be."""

import random
from collections.abc import Callable, Sequence

MEMORY = 1536 * 2**20


MAX_PIXELS = 4_000_000


MOST_CHARACTERS = 4000
"""Of an error: more is not one clear line."""


Outcome = str  # "accepted", or the kind of the refusal


NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 16383, 32767, 32768, 60000, 65535, 65536)
NUMBERS += (2**24, 2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1, 2**53, 2**63 - 1, 2**63, 2**64 - 1)


def flip_bits(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8)):
        data[place(data, rng)] ^= 1 << rng.randrange(8)


def overwrite_bytes(data: bytearray, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 16)):
        data[place(data, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFE, 0xFF, rng.randrange(256)))


def overwrite_number(data: bytearray, rng: random.Random) -> None:
    """Lengths, counts, offsets and sides are numbers of 2, 4 or 8 bytes."""
    size = rng.choice((2, 4, 8))
    start = place(data, rng)
    number = rng.choice((*NUMBERS, len(data), len(data) - 1, len(data) + 1)) % 2 ** (8 * size)
    data[start : start + size] = number.to_bytes(size, rng.choice(("little", "big")))


def truncate(data: bytearray, rng: random.Random) -> None:
    del data[place(data, rng) :]


def insert(data: bytearray, rng: random.Random) -> None:
    start = place(data, rng)
    data[start:start] = rng.choice((rng.randbytes(rng.randint(1, 64)), bytes(rng.randint(1, 4096)), b"\xff" * 300))


def delete(data: bytearray, rng: random.Random) -> None:
    start = place(data, rng)
    del data[start : start + rng.randint(1, 64)]


def duplicate(data: bytearray, rng: random.Random) -> None:
    start = place(data, rng)
    block = data[start : start + rng.randint(1, 512)]
    data[start:start] = block * rng.choice((1, 1, 2, 50))


def place(data: bytearray, rng: random.Random) -> int:
    """Often in the header, sometimes at the end (zip keeps its list of files there), else anywhere."""
    size = max(1, len(data))
    return rng.choice((rng.randrange(min(size, 96)), size - 1 - rng.randrange(min(size, 96)), rng.randrange(size)))


BLIND = (flip_bits, overwrite_bytes, overwrite_number, truncate, insert, delete, duplicate)


def mutate(
    corpus: Sequence[bytes],
    aware: Callable[[bytes, random.Random], bytes],
    rng: random.Random,
    *,
    share: float = 0.5,
) -> bytes:
    """One item of the corpus after a change that knows its format (``share``), some that do not, or both."""
    data = rng.choice(corpus)
    if rng.random() < share:
        data = aware(data, rng)
        if rng.random() < share:
            return data
    if rng.random() < 0.1:
        other = rng.choice(corpus)
        data = data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other)) :]
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(BLIND)(changed, rng)
        changed = changed or bytearray(b"\0")
    return bytes(changed)


def check_error(error: Exception) -> None:
    """One line of bearable length, and not the end of memory in disguise."""
    assert len(str(error)) <= MOST_CHARACTERS, f"an error of {len(str(error))} characters: {str(error)[:300]}"
    cause: BaseException | None = error
    while cause is not None:
        assert not isinstance(cause, MemoryError), f"more than {MEMORY >> 20} MiB were asked for: {error}"
        cause = cause.__cause__ or cause.__context__
