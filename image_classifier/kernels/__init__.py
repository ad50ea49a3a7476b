"""Kernels of our own for operations that torch is slow at, and what loads them."""
