"""Where the CPU kernels leave their results and keep their scratch: slots and offsets."""

from rlsparse.definitions import ABS_TOLERANCES, ULP_BINS

# Slots of the int64 results.
CHANGED = 0
WITHIN_ABS = 1  # one per tolerance: changed finite pairs that differ by no more
WITHIN_REL = WITHIN_ABS + len(ABS_TOLERANCES)
WITHIN_ULPS = WITHIN_REL + 1  # one per bin but the last: changed finite pairs up to its end
FINITE = WITHIN_ULPS + len(ULP_BINS) - 1  # changed finite pairs
SIGN_FLIPS = FINITE + 1
ZERO_SIGN_FLIPS = SIGN_FLIPS + 1
NONFINITE = ZERO_SIGN_FLIPS + 1
NAN = NONFINITE + 1
NUM_INTEGERS = NAN + 1

# Slots of the float64 results.
SUM_SQ_BEFORE, SUM_SQ_DELTA, SUM_ABS_DELTA, MAX_ABS_DELTA = range(4)
NUM_FLOATS = 4

MASK_WORDS = 512  # of each mask per pass: the blocks of a tile stay in the fastest cache

# Scratch: changed pairs are collected in blocks; byte offsets of what is made of them.
BLOCK = 1024
_CAPACITY = 2 * BLOCK + 64
NUM_RAW_BINS = 520  # float32 exponent, 256 more where it is exactly a power of two; 512 for zero
BEFORE = 0
AFTER = BEFORE + 8 * _CAPACITY
X = AFTER + 8 * _CAPACITY
Y = X + 4 * _CAPACITY
DELTA = Y + 4 * _CAPACITY
LIMIT = DELTA + 8 * _CAPACITY
ULPS = LIMIT + 8 * _CAPACITY
BINS = ULPS + 4 * _CAPACITY
RAW = BINS + 2 * _CAPACITY
TAIL_BEFORE = RAW + 2 * 4 * NUM_RAW_BINS
TAIL_AFTER = TAIL_BEFORE + 8 * 64
WORKSPACE_BYTES = TAIL_AFTER + 8 * 64
