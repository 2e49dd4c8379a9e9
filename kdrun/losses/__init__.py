"""Pure functions of tensors that methods share.

Arguments come in the order student, teacher, target. Losses return the mean over samples (or over
the positions that count) as a scalar, without a weight; whether T^2 is applied is an argument.
Classes are on the last dimension of logits. Nothing here waits for the device.
"""
