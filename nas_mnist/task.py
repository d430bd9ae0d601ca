"""The task, in numbers: what a network has to do, and with how little."""

MAX_PARAMS = 8000  # a network has fewer
MAX_EPOCHS = 15
TARGET_ACCURACY = 0.994  # on the test set, in each of the last epochs
N_FINAL_EPOCHS = 2  # accuracy that stays: how many last epochs count
