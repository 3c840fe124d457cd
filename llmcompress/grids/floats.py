from numba.extending import register_jitable
import numpy as np
@register_jitable
def half_to_float(low, high):
    """The float16 in two bytes, low byte first, as float32."""
    bits = np.uint32(low) | (np.uint32(high) << np.uint32(8))
    exponent = (bits >> np.uint32(10)) & np.uint32(31)
    fraction = bits & np.uint32(1023)
    if exponent == np.uint32(0):
        size = np.float32(fraction) * np.float32(2.0**-24)
    else:
        shift = np.uint32(224 if exponent == np.uint32(31) else 112)
        size = (((exponent + shift) << np.uint32(23)) | (fraction << np.uint32(13))).view(np.float32)
    return -size if bits & np.uint32(0x8000) else size
