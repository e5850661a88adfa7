"""CuTeDSL device code, which needs cutlass, and tilings and specs, which do not."""
