"""Attention kernels: what each of them can do, and the list to choose from.

A kernel is called through `attend` only, which gives all of them one contract.
"""
