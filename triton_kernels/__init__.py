"""Triton kernels of the ops: functions with the arguments and results of the native operators."""
