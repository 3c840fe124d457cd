"""Codes of a few bits in 32-bit words: 32 codes in `bits` words, one after the other from the lowest bit up.

So codes of 2, 4 and 8 bits never cross a word; of 3 bits, codes 10 and 21 do.
"""

from __future__ import annotations

import numpy as np

CODES = 32  # fill whole words, whatever their bits


def pack_words(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 (n, m) to int32 (n * bits / 32, m), packed along the first axis. `n` must be a multiple of 32."""
    runs = codes.reshape(-1, CODES, codes.shape[1])
    words = np.zeros((len(runs), bits, codes.shape[1]), np.uint32)
    for i in range(CODES):
        word, shift = divmod(i * bits, 32)
        code = runs[:, i].astype(np.uint32)
        words[:, word] |= code << np.uint32(shift)
        if shift + bits > 32:
            words[:, word + 1] |= code >> np.uint32(32 - shift)
    return words.reshape(-1, codes.shape[1]).view(np.int32)
