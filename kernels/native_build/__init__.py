from .library import build_cpu_kernels, cpu_kernels, forget

__all__ = ["build_cpu_kernels", "cpu_kernels", "forget"]
