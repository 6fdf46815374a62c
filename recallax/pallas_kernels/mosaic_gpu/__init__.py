"""Kernel code for NVIDIA GPUs (Pallas Mosaic GPU) that several ops share."""
