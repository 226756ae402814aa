"""`python -m tenfold.kernels.native_build`: build the CPU kernels and say where they are."""

from .library import build_cpu_kernels

print(build_cpu_kernels())
