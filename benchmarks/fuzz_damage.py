"""Random damage to the bytes of a file."""

import pickle
import random

_EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 62, (1 << 64) - 1)
_OPCODES = tuple(
    code.encode("latin1") if isinstance(code, str) else code
    for code in vars(pickle).values()
    if isinstance(code, str | bytes) and len(code) == 1
)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes after one to four random changes."""
    spoilt = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not spoilt:
            break
        at, length = rng.randrange(len(spoilt)), rng.choice((1, 2, 4, 8, 16, 64))
        match rng.randrange(9):
            case 0:
                spoilt[at] ^= 1 << rng.randrange(8)
            case 1:
                spoilt[at : at + length] = rng.randbytes(length)
            case 2:
                del spoilt[at:]
            case 3:
                del spoilt[at : at + length]
            case 4:
                spoilt[at:at] = spoilt[at : at + length]
            case 5:
                other = rng.randrange(len(spoilt))
                spoilt[at : at + length] = spoilt[other : other + length]
            case 6 | 7:
                wide = rng.choice((1, 2, 4, 8))
                value = rng.choice(_EXTREMES) & ((1 << 8 * wide) - 1)
                spoilt[at : at + wide] = value.to_bytes(wide, rng.choice(("little", "big")))
            case 8:
                spoilt[at:at] = b"".join(rng.choice(_OPCODES) for _ in range(rng.randrange(1, 5)))
    return bytes(spoilt)
