"""Runs the PTX of the compiled kernels on the CPU, with checks that hardware does not make. README.md says how."""
