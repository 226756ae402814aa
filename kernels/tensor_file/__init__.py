from .tensor_file import TensorFile, TensorFileWriter

__all__ = ["TensorFile", "TensorFileWriter"]
