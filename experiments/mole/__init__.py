"""MoLE: configurations and studies."""
