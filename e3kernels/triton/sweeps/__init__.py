"""Sweeps of one program over a part of a row: statistics, mixture sums, gradient.

A program of LANES threads' worth of lanes takes LANES × VEC × UNROLL columns per step. A lane owns UNROLL times VEC
neighbouring columns, one or two 128-bit accesses each, so the sweep needs no exchange between threads until its end. A
part is [first, last) with `last − first` a multiple of the step unless it ends at V.

Rows of an odd V begin anywhere between the boundaries of such accesses. There (ODD) columns are counted from the last
boundary before the row, `lead` columns before its first: only the step in which it begins and the one in which it ends
are masked, and all other accesses are whole, as long as all tensors of the sweep begin at the same distance.
"""
