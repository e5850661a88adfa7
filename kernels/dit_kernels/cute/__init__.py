"""CuTeDSL device code. Only `dit_kernels.compile` imports this package: it needs cutlass."""
