from .library import build_cpu_kernels, cpu_kernels, forget, without_cpu_kernels

__all__ = ["build_cpu_kernels", "cpu_kernels", "forget", "without_cpu_kernels"]
