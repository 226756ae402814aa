"""Studies of MemoryFormer."""
