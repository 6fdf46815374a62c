"""Kernel code for NVIDIA GPUs (Pallas Mosaic GPU, Hopper) that several ops share."""
