"""Benchmarks: the gateway beside the limits of the machine it runs on, measured in the same run.

docs/benchmarks.md tells the method. What is measured runs in processes of its own (`server`, `client`,
qemu-storage-daemon, fio); this package starts them, interleaves them, and judges the figures.
"""
