"""What a program is made of: operations, and the columns of the two tables that say what they work on."""

from enum import IntEnum, auto


class Op(IntEnum):
    """What one instruction does. Those of the second group are the gradients of the first, in a program that trains."""

    AUGMENT = auto()  # pixels → y
    CONVOLVE = auto()  # x → y
    MEASURE = auto()  # what `activation` scales y by, from y
    ACTIVATE = auto()  # x → y
    ACTIVATE_POOL = auto()
    DROP_ELEMENTS = auto()
    GLOBAL_POOL = auto()
    LOSS = auto()  # logits x → loss, and the gradient of x

    GLOBAL_POOL_BACKWARD = auto()
    DROP_ELEMENTS_BACKWARD = auto()
    ACTIVATE_POOL_BACKWARD = auto()
    ACTIVATE_BACKWARD = auto()
    WEIGHT_GRADIENT = auto()
    INPUT_GRADIENT = auto()

    SGD = auto()
    ADAMW = auto()
    SOAP = auto()


class Mode(IntEnum):
    """What batch norm does, and whether there is dropout."""

    TRAIN = auto()
    RECALIBRATE = auto()  # statistics of the batch, their mean over all batches kept; no dropout
    EVALUATE = auto()  # the running statistics


class Curve(IntEnum):
    """The activation's function."""

    NONE = 0
    RELU = 1
    HARD_SWISH = 2


# Columns of the instructions. X and Y are maps (C, H, W, N) and (C', H', W', N), GX and GY their gradients: offsets in
# the arena, as WEIGHT, BIAS (−1: none) and SCRATCH are. ACTIVATION is a row of the other table, LAYER a dropout's
# number. SWEEP: so many instructions from here on are done for one channel, then for the next; 0: for all at once.
COLUMNS = (
    "op", "activation", "x", "y", "gx", "gy", "channels", "height", "width", "out_channels", "out_height", "out_width",
    "kernel", "stride", "padding", "depthwise", "weight", "bias", "scratch", "layer", "sweep",
)  # fmt: skip
(
    OP, ACTIVATION, X, Y, GX, GY, CHANNELS, HEIGHT, WIDTH, OUT_CHANNELS, OUT_HEIGHT, OUT_WIDTH,
    KERNEL, STRIDE, PADDING, DEPTHWISE, WEIGHT, BIAS, SCRATCH, LAYER, SWEEP,
) = range(len(COLUMNS))  # fmt: skip

# Columns of the activations. Norm comes first, or the CURVE; GAMMA, BETA and the running statistics are a norm's.
ACTIVATION_COLUMNS = (
    "norm", "norm_first", "curve", "drops", "layer", "n_channels", "rows", "statistics", "gamma", "beta",
    "running_mean", "running_var",
)  # fmt: skip
(
    NORM, NORM_FIRST, CURVE, DROPS, ACTIVATION_LAYER, N_CHANNELS, ROWS, STATISTICS, GAMMA, BETA, RUNNING_MEAN,
    RUNNING_VAR,
) = range(len(ACTIVATION_COLUMNS))  # fmt: skip
